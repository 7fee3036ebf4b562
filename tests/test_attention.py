"""Attention against a float64 oracle; tensor parallel against one device; the cache's edges."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from model_support import (
    attention,
    check_replicas,
    directional,
    mesh_of,
    named,
    randomize,
    rope,
    shard_map,
    specs_of,
    value_and_grads,
)

from moejax.config import AttentionConfig
from moejax.model.attention import Attention
from moejax.model.cache import LayerCache
from moejax.model.rope import rotate

B, S, D, EPS = 2, 8, 32, 1e-5


def make(qk_norm, rng, num_heads=8, num_kv_heads=4):
    config = AttentionConfig(num_heads, num_kv_heads, 8, qk_norm=qk_norm)
    module = Attention(D, config, norm_eps=EPS, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    return config, graphdef, randomize(state, rng)


def inputs(rng):
    x = rng.normal(size=(B, S, D)).astype(np.float32)
    positions = np.arange(S, dtype=np.int32) + np.array([[0], [5]], np.int32)
    weights = rng.normal(size=(B, S, D)).astype(np.float32)
    return x, positions, weights


def weighted_sum(module, x, positions, weights):
    return jnp.sum(module(x, positions)[0] * weights)


def run(tensor, graphdef, state, batch):
    return value_and_grads(
        mesh_of(tensor=tensor), graphdef, state, weighted_sum, batch, (P(),) * 3, wrt_input=True
    )


def test_rotate_is_multiplication_of_complex_numbers(rng):
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 2000, size=(2, 5)).astype(np.int32)
    got = jax.jit(functools.partial(rotate, theta=1e4))(x, positions)
    np.testing.assert_allclose(got, rope(x.astype(np.float64), positions, 1e4), atol=2e-3)
    small = np.minimum(positions, 7)
    got = jax.jit(functools.partial(rotate, theta=1e4))(x, small)
    np.testing.assert_allclose(got, rope(x.astype(np.float64), small, 1e4), atol=3e-6)
    assert rotate(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions), 1e4).dtype == jnp.bfloat16


@pytest.mark.parametrize(("qk_norm", "tensor"), [("none", 2), ("head", 4), ("full", 4)])
def test_matches_oracle_and_splits_over_tensor(qk_norm, tensor, rng):
    config, graphdef, state = make(qk_norm, rng)
    batch = inputs(rng)
    value, grads, dx = run(1, graphdef, state, batch)

    params = {k: v.astype(np.float64) for k, v in named(state).items()}
    params["x"] = batch[0].astype(np.float64)

    def oracle(p):
        return np.sum(attention(p, p["x"], batch[1], config, EPS) * batch[2])

    np.testing.assert_allclose(value, oracle(params), rtol=1e-4, atol=1e-3)
    got = {**named(grads), "x": np.asarray(dx)}
    assert got.keys() == params.keys()
    for name in params:  # each parameter alone, so that a wrong one cannot hide
        direction = {k: np.zeros_like(v) for k, v in params.items()}
        direction[name] = rng.normal(size=params[name].shape)
        expected = directional(oracle, params, direction)
        size = np.sqrt(np.sum(np.square(got[name])) + 1.0)
        assert abs(np.sum(got[name] * direction[name]) - expected) < 1e-3 * size, name

    split_value, split_grads, split_dx = run(tensor, graphdef, state, batch)
    check_replicas((split_value, split_grads, split_dx))
    np.testing.assert_allclose(split_value, value, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(split_dx, dx, rtol=1e-4, atol=2e-5)
    for name, grad in named(split_grads).items():
        np.testing.assert_allclose(grad, got[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_bfloat16_stays_near_float32(rng):
    _, graphdef, state = make("head", rng)
    x, positions, _ = inputs(rng)

    def local(state, x):
        return nnx.merge(graphdef, state)(x, jnp.asarray(positions))[0]

    mesh = mesh_of()
    exact = shard_map(local, mesh, (specs_of(state), P()), P())(state, x)
    rounded = shard_map(local, mesh, (specs_of(state), P()), P())(state, jnp.asarray(x, "bfloat16"))
    assert rounded.dtype == jnp.bfloat16
    error = np.asarray(rounded, np.float32) - np.asarray(exact)
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(np.square(exact)))


def test_a_full_cache_row_drops_writes_and_keeps_what_it_has(rng):
    _, graphdef, state = make("none", rng, num_heads=4, num_kv_heads=2)
    x, _, _ = inputs(rng)
    x = x[:, :2]
    old = rng.normal(size=(2, B, 6, 2, 8)).astype(np.float32)
    lengths = np.array([5, 1], np.int32)  # row 0 has room for one of its two tokens

    def local(state, x, cache, lengths):
        positions = lengths[:, None] + jnp.arange(2, dtype=jnp.int32)
        return nnx.merge(graphdef, state)(x, positions, cache=cache, lengths_B=lengths)[1]

    heads = P(None, None, "tensor", None)
    specs = LayerCache(heads, heads)
    run = shard_map(local, mesh_of(tensor=2), (specs_of(state), P(), specs, P()), specs)
    new = run(state, x, LayerCache(*old), lengths)
    for before, after in zip(old, (new.k_BLMh, new.v_BLMh)):
        changed = np.any(before != np.asarray(after), axis=(2, 3))
        expected = np.zeros((B, 6), bool)
        expected[0, 5] = expected[1, 1] = expected[1, 2] = True
        np.testing.assert_array_equal(changed, expected)
