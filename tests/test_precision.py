"""Float32 means float32: no product of a train step is left to a platform's default precision."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from oracle import relative_error
from train_support import blueprint_of, make_config

from pallas_kernels.precision import float32_dot, precision_of
from sharding.planner import trace_step
from sharding.traffic import inner_jaxprs


def products(jaxpr):
    """(dtypes of the factors, precision) of every product, in loops and branches too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield {v.aval.dtype for v in eqn.invars}, eqn.params["precision"]
        for inner in inner_jaxprs(eqn):
            yield from products(inner)


def test_precision_of():
    assert precision_of(np.float32) == precision_of(jnp.zeros(1).dtype) == lax.Precision.HIGHEST
    assert precision_of(jnp.bfloat16) == precision_of(np.dtype("float16")) == lax.Precision.DEFAULT


@jax.jit
def dot_and_gradients(x, w, ct):
    out, pull = jax.vjp(float32_dot, x, w)
    return out, *pull(ct)


@pytest.mark.parametrize("dtype,x_bound", [("float32", 1e-6), ("bfloat16", 3e-3)])
def test_float32_dot(rng, dtype, x_bound):
    """As accurate as float32 under jit too, where a compiler may leave out conversions.

    Only the gradient of bfloat16 rows is rounded to their dtype.
    """
    x = jnp.asarray(rng.normal(size=(64, 200)), dtype)
    w, ct = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((200, 24), (64, 24)))
    out, x_ct, w_ct = dot_and_gradients(x, w, ct)
    wide_x, wide_w, wide_ct = (np.asarray(a, np.float64) for a in (x, w, ct))
    assert out.dtype == w_ct.dtype == jnp.float32 and x_ct.dtype == x.dtype
    assert relative_error(out, wide_x @ wide_w) < 1e-6
    assert relative_error(w_ct, wide_x.T @ wide_ct) < 1e-6
    assert relative_error(x_ct, wide_ct @ wide_w.T) < x_bound


def test_products_of_another_program_are_found():
    x = jnp.ones((2, 2), jnp.float32)
    loop = jax.make_jaxpr(lambda x: lax.fori_loop(0, 3, lambda _, y: jax.jit(jnp.dot)(y, x), x))(x)
    assert list(products(loop.jaxpr)) == [({np.dtype("float32")}, None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_float32_product_of_a_step(dtype):
    """Forward and backward: attention, MLP, experts, router, head."""
    config = make_config(bucket_rows=4, loss_chunk=8)
    model = dataclasses.replace(config.model, compute_dtype=dtype, remat="layer")
    config = dataclasses.replace(config, model=model)
    found = list(products(trace_step(blueprint_of(config, (1, 2, 1)), config).jaxpr))
    float32 = np.dtype("float32")
    exact = [precision for dtypes, precision in found if dtypes == {float32}]
    assert dtype == "bfloat16" or len(exact) > 60
    assert set(exact) <= {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
    fast = [precision for dtypes, precision in found if dtypes == {np.dtype(jnp.bfloat16)}]
    assert (dtype == "bfloat16") == bool(fast)
    assert (lax.Precision.HIGHEST, lax.Precision.HIGHEST) not in fast
