"""The softmax over the chosen within top-k, against numpy in float64: values and gradients."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.config import RouterConfig
from moejax.routing.router import route
from pallas_kernels.hopper import simt
from pallas_kernels.hopper.compat import interpreted
from pallas_kernels.route import api

ON_GPU = jax.default_backend() == "gpu"


@partial(jax.jit, static_argnames=("k", "backend"))
def _top_k(scores, values, ct, tangent, k, backend):
    def weights(scores, values):
        ids, weights = api.top_k(scores, k, values_TE=values, softmax=True, backend=backend)
        return weights, ids

    out, pull, ids = jax.vjp(weights, scores, values, has_aux=True)
    tangent_out = jax.jvp(lambda values: weights(scores, values)[0], (values,), (tangent,))[1]
    return ids, out, pull(ct), tangent_out


def run(scores, values, ct, tangent, k, backend):
    with nullcontext() if ON_GPU else interpreted():
        found = _top_k(scores, values, ct, tangent, k=k, backend=backend)
        return jax.tree.map(np.asarray, found)


def float32(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def numpy_softmax(values):
    values = values.astype(np.float64)
    exponential = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("backend", api.BACKENDS)
@pytest.mark.parametrize("tokens,experts,k", [(9, 8, 2), (70, 40, 8), (5, 64, 32), (6, 3, 1)])
def test_weights_and_gradients(rng, backend, tokens, experts, k):
    shape = (tokens, experts)
    scores, values, tangent = (float32(rng, *shape) for _ in range(3))
    values *= 4  # differences of exponents round to 1e-6 at most
    ct = float32(rng, tokens, k)
    ids, out, (scores_ct, values_ct), tangent_out = run(scores, values, ct, tangent, k, backend)
    rows = np.arange(tokens)[:, None]
    weights = numpy_softmax(values[rows, ids])
    assert np.array_equal(ids, np.argsort(-scores, axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(out, weights, rtol=3e-6, atol=1e-37)

    def derivative(taken):  # symmetric: of tangents and of cotangents
        return weights * (taken - np.sum(weights * taken, axis=1, keepdims=True))

    wanted = np.zeros(shape)
    wanted[rows, ids] = derivative(ct.astype(np.float64))
    np.testing.assert_allclose(values_ct, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        tangent_out, derivative(tangent[rows, ids].astype(np.float64)), rtol=1e-5, atol=1e-6
    )
    assert not scores_ct.any()


@pytest.mark.parametrize("backend", api.BACKENDS)
def test_values_that_are_not_finite(rng, backend):
    """Exactly as a plain softmax: −inf weighs nothing; a NaN, +inf or only −inf spoil the row."""
    values = float32(rng, 7, 4)
    values[0, 1], values[1], values[2, 3], values[3, 0] = -np.inf, -np.inf, np.nan, np.inf
    values[4, 2] = np.array(0xFFC00000, np.uint32).view(np.float32)  # a NaN with a sign
    values[5] = np.finfo(np.float32).min, 0.0, -0.0, -120.0
    ids, out, _, _ = run(float32(rng, 7, 4), values, float32(rng, 7, 4), values, 4, backend)
    taken = np.take_along_axis(values, ids, axis=1)
    wanted = np.asarray(jax.nn.softmax(jnp.asarray(taken), axis=-1))
    np.testing.assert_allclose(out, wanted, rtol=3e-6, atol=1e-37)
    assert np.isnan(out[1:5]).all() and not np.isnan(out[[0, 5, 6]]).any()


def test_second_derivative(rng):
    """Along a line, that of a plain softmax."""
    values, along = float32(rng, 3, 6), float32(rng, 3, 6)

    def twice(softmax_of_chosen):
        def line(t):
            return jnp.sum(softmax_of_chosen(jnp.asarray(values) + t * along) ** 2)

        return jax.grad(jax.grad(line))(0.0)

    kernel = twice(lambda values: api.top_k(values, 3, softmax=True)[1])
    plain = twice(lambda values: jax.nn.softmax(api.top_k(values, 3)[1], axis=-1))
    np.testing.assert_allclose(kernel, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score_function", ["softmax", "topk_softmax", "sigmoid"])
def test_router_weights(rng, score_function):
    """What the router makes of it, and the gradient of its logits by differences."""
    config = RouterConfig(
        num_experts=8, top_k=3, score_function=score_function, renormalize=True, scaling_factor=1.5
    )
    logits, ct = float32(rng, 6, 8), float32(rng, 6, 3)

    @jax.jit
    def weights(logits):
        routing = route(logits, config, axes=())
        return routing.scores_TK, routing.experts_TK

    out, pull, ids = jax.vjp(weights, jnp.asarray(logits), has_aux=True)
    rows, ids = np.arange(6)[:, None], np.asarray(ids)

    def plain(logits):  # float64, for fixed ids
        scores = 1 / (1 + np.exp(-logits)) if score_function == "sigmoid" else np.exp(logits)
        taken = scores[rows, ids]
        return 1.5 * taken / taken.sum(axis=1, keepdims=True)

    exact = logits.astype(np.float64)
    np.testing.assert_allclose(out, plain(exact), rtol=1e-5)
    wanted, step = np.zeros((6, 8)), 1e-5
    for place in np.ndindex(6, 8):
        up, down = exact.copy(), exact.copy()
        up[place] += step
        down[place] -= step
        wanted[place] = np.sum(ct * (plain(up) - plain(down))) / (2 * step)
    np.testing.assert_allclose(pull(jnp.asarray(ct))[0], wanted, rtol=1e-4, atol=1e-6)
    forced = route(jnp.asarray(logits), replace(config, forced_balance=True), axes=())
    dealt = plain_of(exact, np.asarray(forced.experts_TK), score_function)
    np.testing.assert_allclose(forced.scores_TK, dealt, rtol=1e-5)


def plain_of(logits, ids, score_function):
    scores = 1 / (1 + np.exp(-logits)) if score_function == "sigmoid" else np.exp(logits)
    taken = np.take_along_axis(scores, ids, axis=1)
    return 1.5 * taken / taken.sum(axis=1, keepdims=True)


def test_no_softmax_is_left(rng):
    """The program of a layer's routing has none beside the kernel."""

    def weights(scores):
        return api.top_k(scores, 8, softmax=True, backend="mosaic_gpu")

    scores = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    text = jax.export.export(jax.jit(weights), platforms=["cuda"])(scores).mlir_module()
    assert "mosaic_gpu" in text and "stablehlo.exponential" not in text


def arithmetic(m, a, b, sums, differences, ratios, powers, exchanged, _block):
    x, y = m.load(a, m.thread), m.load(b, m.thread)
    m.store(sums, m.thread, m.float_add(x, y))
    m.store(differences, m.thread, m.float_sub(x, y))
    m.store(ratios, m.thread, m.float_div(x, y))
    m.store(powers, m.thread, m.float_exp(x))
    m.store(exchanged, m.thread, m.exchange(x, 5))


def test_float_operations(rng):
    """Of single threads, on numbers of all sizes; compiled on a GPU."""
    a = np.concatenate([rng.uniform(-90, 80, 96), -(10.0 ** rng.uniform(-30, 30, 32))])
    a, b = a.astype(np.float32), float32(rng, 128)
    out_type = [jax.ShapeDtypeStruct((128,), jnp.float32)] * 5
    launch = partial(simt.launch, arithmetic, "arithmetic", blocks=1, threads=128)
    with nullcontext() if ON_GPU else interpreted():
        found = jax.jit(lambda a, b: launch(inputs=[a, b], out_type=out_type))(a, b)
    sums, differences, ratios, powers, exchanged = map(np.asarray, found)
    assert np.array_equal(sums, a + b) and np.array_equal(differences, a - b)
    np.testing.assert_allclose(ratios, a / b, rtol=1e-7)
    np.testing.assert_allclose(powers, np.exp(a.astype(np.float64)), rtol=5e-7, atol=2e-38)
    assert np.array_equal(exchanged, a[np.arange(128) ^ 5])
