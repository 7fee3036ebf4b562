"""The router as a module and over a mesh; balancing by bias; metrics."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from routing_support import (
    BOTH,
    VARIANTS,
    D,
    E,
    T,
    oracle_choice,
    oracle_grad,
    oracle_values,
    route_jit,
    softmax,
)

from moejax.config import RouterConfig
from moejax.routing import Router, RouterBias, route, router_metrics, update_bias
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh

# ---- the module -------------------------------------------------------------------------------


def test_router_module_against_the_oracle(rng):
    config = RouterConfig(E, 2, bias=True, selection_bias=True, **BOTH)
    router = Router(D, config, rngs=nnx.Rngs(int(rng.integers(2**31))))
    router.b_E[...] = jnp.asarray(rng.standard_normal(E), jnp.float32)
    router.selection_bias_E[...] = jnp.asarray(0.3 * rng.standard_normal(E), jnp.float32)
    bias = np.asarray(router.selection_bias_E[...], np.float64)
    w, b = (np.asarray(v[...], np.float64) for v in (router.w_DE, router.b_E))
    while True:
        x = rng.standard_normal((T, D)).astype(np.float32)
        logits = x.astype(np.float64) @ w + b
        experts, gap = oracle_choice(logits, config, bias)
        if gap > 1e-5:
            break
    c_TK = rng.standard_normal((T, 2)).astype(np.float32)

    @nnx.jit
    def grads(router, x):
        def functional(router, x):
            out = router(x, axes=())
            return jnp.sum(out.scores_TK * c_TK) + out.losses.total, out

        diff = nnx.DiffState(0, nnx.Param)
        return nnx.grad(functional, argnums=(diff, 1), has_aux=True)(router, x)

    (grad, grad_x), out = grads(router, x)

    def functional(logits):
        scores, balance, z, *_ = oracle_values(logits, experts, np.ones(T, bool), config)
        return np.sum(scores * c_TK) + balance + z

    grad_logits = oracle_grad(functional, logits)
    np.testing.assert_array_equal(out.experts_TK, experts)
    np.testing.assert_allclose(grad["w_DE"][...], x.T @ grad_logits, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(grad["b_E"][...], grad_logits.sum(0), rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(grad_x, grad_logits @ w.T, rtol=1e-4, atol=5e-6)
    assert "selection_bias_E" not in grad


def test_variables_carry_their_metadata():
    router = Router(D, RouterConfig(E, 2, bias=True, selection_bias=True), rngs=nnx.Rngs(0))
    for variable in (router.w_DE, router.b_E, router.selection_bias_E):
        assert variable.spec == P() and variable.float32
        assert variable[...].dtype == jnp.float32
    _, params, biases = nnx.split(router, nnx.Param, RouterBias)
    assert set(params) == {"w_DE", "b_E"} and set(biases) == {"selection_bias_E"}
    plain = Router(D, RouterConfig(E, 2), rngs=nnx.Rngs(0))
    assert plain.b_E is None and plain.selection_bias_E is None
    wide = Router(400, RouterConfig(E, 2), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(np.std(wide.w_DE[...]), 0.05, rtol=0.1)


def test_bfloat16_inputs_route_as_their_float32_values(rng):
    config = RouterConfig(300, 8)
    router = Router(64, config, rngs=nnx.Rngs(int(rng.integers(2**31))))
    x = jnp.asarray(rng.standard_normal((16, 64)), jnp.bfloat16)
    call = nnx.jit(lambda router, x: router(x, axes=()))
    half, full = call(router, x), call(router, x.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6 if a.dtype == jnp.float32 else 0)
    logits = np.asarray(x, np.float64) @ np.asarray(router.w_DE[...], np.float64)
    scores, *_ = oracle_values(logits, np.asarray(half.experts_TK), np.ones(16, bool), config)
    np.testing.assert_allclose(half.scores_TK, scores, rtol=1e-5)
    w_half = router.w_DE[...].astype(jnp.bfloat16).astype(jnp.float32)
    rounded = route_jit(jnp.dot(x.astype(jnp.float32), w_half), config)
    assert not np.allclose(rounded.scores_TK, scores, rtol=1e-5)  # the check above can tell


# ---- several devices --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_global_statistics_over_the_mesh(name, rng):
    config = VARIANTS[name]
    per_device = 3
    tokens = 8 * per_device
    router = Router(D, config, rngs=nnx.Rngs(int(rng.integers(2**31))))
    graph, state = nnx.split(router)
    x = rng.standard_normal((tokens, D)).astype(np.float32)
    mask = rng.random(tokens) < 0.7  # unequal numbers of tokens
    mask[:per_device] = False  # a device without any
    c_TK = rng.standard_normal((tokens, config.top_k)).astype(np.float32)

    def share(state, x, mask, c_TK, axes):
        out = nnx.merge(graph, state)(x, token_mask_T=mask, axes=axes)
        return jnp.sum(out.scores_TK * c_TK) + out.losses.total, out

    def grads(state, x, mask, c_TK, axes):
        fn = jax.value_and_grad(partial(share, axes=axes), argnums=(0, 1), has_aux=True)
        (value, out), (grad, grad_x) = fn(state, x, mask, c_TK)
        summed = (value, grad, out.losses, out.counts_E, out.entropy_sum, out.num_tokens)
        if axes:
            summed = lax.psum(summed, axes)
        return *summed, grad_x, out.experts_TK, out.scores_TK

    mesh = make_mesh(MeshShape(2, 4, 1))
    split = P(TOKEN_AXES)
    many = jax.jit(
        jax.shard_map(
            partial(grads, axes=TOKEN_AXES),
            mesh=mesh,
            in_specs=(P(), split, split, split),
            out_specs=(P(),) * 6 + (split,) * 3,
            check_vma=False,
        )
    )(state, x, mask, c_TK)
    one = jax.jit(partial(grads, axes=()))(state, x, mask, c_TK)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("experts", "top_k", "per_device"), [(8, 3, 5), (7, 7, 1), (13, 2, 3)])
def test_forced_balance_is_even_over_the_mesh(experts, top_k, per_device, rng):
    config = RouterConfig(experts, top_k, renormalize=False, forced_balance=True)
    mesh = make_mesh(MeshShape(2, 4, 1))
    logits = rng.standard_normal((8 * per_device, experts)).astype(np.float32)

    def fn(logits):
        def total(x):
            out = route(x, config)
            return out.scores_TK.sum(), out

        grad, out = jax.grad(total, has_aux=True)(logits)
        return lax.psum(out.counts_E, TOKEN_AXES), out.experts_TK, out.scores_TK, grad

    split = P(TOKEN_AXES)
    counts, ids, scores, grad = jax.jit(
        jax.shard_map(
            fn, mesh=mesh, in_specs=split, out_specs=(P(), split, split, split), check_vma=False
        )
    )(logits)
    assert np.ptp(counts) <= 1 and counts.sum() == 8 * per_device * top_k
    assert all(len(set(row)) == top_k for row in np.asarray(ids))
    for t, row in enumerate(logits.astype(np.float64)):
        np.testing.assert_allclose(scores[t], softmax(row)[ids[t]], rtol=1e-5)
    assert top_k == experts or np.all(np.any(grad != 0, axis=1))
    plain = dataclasses.replace(config, forced_balance=False)
    assert top_k == experts or np.any(route_jit(logits, plain).experts_TK != ids)


# ---- balancing and metrics --------------------------------------------------------------------


def test_update_bias():
    counts = np.array([[4, 0, 2, 2], [1, 1, 1, 1]], np.int32)
    got = jax.jit(update_bias)(np.ones((2, 4), np.float32), counts, 0.25)
    np.testing.assert_allclose(got, [[0.75, 1.25, 1, 1], [1, 1, 1, 1]])
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_bias_balances_a_skewed_router(score_function, rng):
    config = RouterConfig(
        E, 2, score_function, selection_bias=True, bias_update_rate=0.002, load_balance_coef=0.0
    )
    skew = np.linspace(0, 3, E)
    # Fresh tokens each step, so that the bias cannot learn them by heart.
    logits = (skew + rng.standard_normal((300, 1024, E))).astype(np.float32)

    @jax.jit
    def balance(logits):
        def step(bias, logits):
            counts = route(logits, config, bias_E=bias, axes=()).counts_E
            return update_bias(bias, counts, config.bias_update_rate), counts

        return lax.scan(step, jnp.zeros(E, jnp.float32), logits)[1]

    counts = np.asarray(balance(logits))
    over_mean = counts.max(-1) / counts.mean(-1)
    assert over_mean[0] > 2 and counts[0].min() < 0.3 * counts[0].mean()
    assert np.mean(over_mean[-20:]) < 1.2
    late = counts[-20:].sum(0)
    assert late.max() / late.mean() < 1.1


@pytest.mark.parametrize("xp", [np, jnp])
def test_metrics(xp):
    counts = xp.asarray([[6, 0, 0, 2], [2, 2, 2, 2], [0, 0, 0, 0]], dtype=xp.int32)
    entropy = xp.asarray([2.0, 4.0, 0.0], dtype=xp.float32)
    tokens = xp.asarray([4, 4, 0], dtype=xp.int32)
    got = router_metrics(counts, entropy, tokens)
    np.testing.assert_array_equal(got["tokens_per_expert"], counts)
    np.testing.assert_allclose(got["entropy"], [0.5, 1, 0])
    np.testing.assert_allclose(got["max_over_mean"], [3, 1, 0])
    assert got["entropy"].dtype == got["max_over_mean"].dtype == np.float32
    one = router_metrics(np.array([3, 1]), np.float32(1.0), np.int32(2))
    assert one["max_over_mean"] == 1.5 and one["entropy"] == 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_does_not_reach_the_weight_gradient(rng, dtype):
    """NaN in a masked token times a cotangent of 0 would be NaN."""
    router = Router(16, RouterConfig(8, 2), rngs=nnx.Rngs(int(rng.integers(2**31))))
    x = jnp.asarray(rng.standard_normal((6, 16)), dtype)
    mask = jnp.arange(6, dtype=jnp.int32) > 0

    @nnx.jit
    def gradient(router, x):
        def loss(router):
            scores_TK = router(x, token_mask_T=mask, axes=()).scores_TK
            return jnp.sum(scores_TK**2)

        return nnx.grad(loss)(router).w_DE[...]

    clean, dirty = gradient(router, x.at[0].set(0)), gradient(router, x.at[0].set(jnp.nan))
    assert np.isfinite(dirty).all() and np.abs(dirty).max() > 0
    np.testing.assert_array_equal(clean, dirty)
