"""RMSNorm: values and gradients against float64, and what is kept for the backward."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.model.norm import rms_branch, rms_normalize

EPS = 1e-3


def oracle(x, scale, ct):
    """The result and both cotangents in float64, the gradient written as a matrix product."""
    *lead, width = x.shape
    x, ct = (a.reshape(-1, width).astype(np.float64) for a in (x, ct))
    root = np.sqrt(np.mean(x**2, axis=1) + EPS)
    y = scale * x / root[:, None]
    x_ct = np.empty_like(x)
    for row in range(len(x)):
        jacobian = np.eye(width) / root[row] - np.outer(x[row], x[row]) / (width * root[row] ** 3)
        x_ct[row] = (ct[row] * scale) @ jacobian
    scale_ct = np.sum(ct * x / root[:, None], axis=0)
    return y.reshape(*lead, width), x_ct.reshape(*lead, width), scale_ct


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 4, 8), (7,)])
def test_gradients(rng, shape):
    x, ct = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    scale = rng.normal(size=shape[-1]).astype(np.float32)
    y, pull = jax.vjp(lambda x, s: rms_normalize(x, s, EPS), jnp.asarray(x), jnp.asarray(scale))
    for got, want in zip((y, *pull(jnp.asarray(ct))), oracle(x, scale, ct), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_gradients_are_rounded_once(rng):
    x, ct = (jnp.asarray(rng.normal(size=(6, 32)), jnp.bfloat16) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=32), jnp.float32)
    y, pull = jax.vjp(lambda x, s: rms_normalize(x, s, EPS), x, scale)
    x_ct, scale_ct = pull(ct)
    assert (y.dtype, x_ct.dtype, scale_ct.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wanted = oracle(np.asarray(x, np.float32), np.asarray(scale), np.asarray(ct, np.float32))
    for got, want in zip((y, x_ct), wanted[:2], strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(scale_ct, wanted[2], rtol=1e-4, atol=1e-4)


def test_keeps_no_float32_copy(rng):
    """Of bfloat16 rows the backward needs the rows themselves and one number each."""
    x = jnp.asarray(rng.normal(size=(6, 32)), jnp.bfloat16)
    scale = jnp.ones(32, jnp.float32)
    _, pull = jax.vjp(lambda x, s: rms_normalize(x, s, EPS), x, scale)
    kept = {(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(pull)}
    assert kept <= {("bfloat16", (6, 32)), ("float32", (32,)), ("float32", (6, 1))}


@pytest.mark.parametrize("summed", [True, False])
def test_a_branch_is_a_sum_and_its_normalisation(rng, summed):
    x, other, ct_total, ct = rng.normal(size=(4, 2, 3, 16)).astype(np.float32)
    scale = rng.normal(size=16).astype(np.float32)

    def apart(x, other, scale):
        total = x + other if summed else x
        return total, rms_normalize(total, scale, EPS)

    def joined(x, other, scale):
        return rms_branch(x, other if summed else None, scale, EPS)

    wanted, pull_wanted = jax.vjp(apart, x, other, scale)
    made, pull = jax.vjp(joined, x, other, scale)
    pairs = zip((*made, *pull((ct_total, ct))), (*wanted, *pull_wanted((ct_total, ct))))
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
