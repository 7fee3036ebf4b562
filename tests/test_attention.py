"""Attention against a float64 oracle; tensor parallel against one device; the cache's edges."""

import dataclasses

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
    shard_map,
    specs_of,
    value_and_grads,
)

from moejax.config import AttentionConfig, LatentConfig, ModelConfig, YarnConfig
from moejax.model.attention import Attention, choose_attention
from moejax.model.cache import LayerCache
from pallas_kernels.heads import api as heads_api
from pallas_kernels.hopper.compat import interpreted

B, S, D, EPS = 2, 8, 32, 1e-5


def make(qk_norm, rng, num_heads=8, num_kv_heads=4, **changes):
    config = AttentionConfig(num_heads, num_kv_heads, 8, qk_norm=qk_norm, **changes)
    module = Attention(D, config, norm_eps=EPS, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    return config, graphdef, randomize(state, rng)


def inputs(rng):
    x = rng.normal(size=(B, S, D)).astype(np.float32)
    positions = np.arange(S, dtype=np.int32) + np.array([[0], [5]], np.int32)
    weights = rng.normal(size=(B, S, D)).astype(np.float32)
    return x, positions, weights


def weighted_sum(module, x, positions, weights):
    return jnp.sum(module(x, positions)[0].astype(weights.dtype) * weights)


def run(tensor, graphdef, state, batch):
    return value_and_grads(
        mesh_of(tensor=tensor), graphdef, state, weighted_sum, batch, (P(),) * 3, wrt_input=True
    )


YARN = YarnConfig(4.0, 32, beta_fast=8.0, mscale=0.7, mscale_all_dim=1.2)
CASES = {
    "plain": (2, {}),
    "norm of heads": (4, {"qk_norm": "head"}),
    "norm of all heads": (4, {"qk_norm": "full"}),
    "biases": (4, {"bias": True, "output_bias": True, "qk_norm": "head"}),
    "as in gpt-oss": (
        2,
        {"bias": True, "output_bias": True, "sinks": True, "window": 3, "yarn": YARN},
    ),
    "window, pairs side by side": (
        4,
        {"bias": True, "window": 5, "rope_interleaved": True, "yarn": YARN},
    ),
    "sinks alone": (4, {"sinks": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle_and_splits_over_tensor(name, rng):
    tensor, changes = CASES[name]
    config, graphdef, state = make(**{"qk_norm": "none", **changes}, rng=rng)
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


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("changes", [{"qk_norm": "head"}, {"qk_norm": "none", "bias": True}])
def test_one_kernel_for_all_heads(rng, monkeypatch, tensor, changes):
    """In bfloat16 it errs about as little as products, norms and rotations one by one."""
    config = AttentionConfig(4, 2, 16, yarn=YARN, **changes)
    module = Attention(D, config, norm_eps=EPS, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    state = randomize(state, rng)
    x, positions, weights = inputs(rng)

    def results(x):
        with jax.numpy_dtype_promotion("standard"):  # JAX's attention mixes them in its backward
            _, grads, dx = run(tensor, graphdef, state, (x, positions, weights))
        found = {**named(grads), "x": np.asarray(dx)}  # of w_o it is of what was attended
        return {name: array.astype(np.float64) for name, array in found.items()}

    rounded = jnp.asarray(x, jnp.bfloat16)
    exact, apart = results(rounded.astype(jnp.float32)), results(rounded)
    called = []

    def refusal(tokens, heads, head_dim, dtype, *, forced):
        called.append(heads)
        return heads_api.hopper_refusal(dtype, forced=True)

    monkeypatch.setattr(heads_api, "refusal", refusal)
    with interpreted():
        joined = results(rounded)
    assert 8 // tensor in called
    for name, right in exact.items():
        errors = [np.linalg.norm(made[name] - right) for made in (apart, joined)]
        size = np.linalg.norm(right)
        assert errors[1] <= 2 * errors[0] + 5e-3 * size and errors[1] <= 0.05 * size, name


def test_a_full_cache_row_drops_writes_and_keeps_what_it_has(rng):
    _, graphdef, state = make("none", rng, num_heads=4, num_kv_heads=2)
    x, _, _ = inputs(rng)
    x = x[:, :2]
    old = rng.normal(size=(2, 2, B, 6, 8)).astype(np.float32)  # a page of 6 positions for each row
    lengths = np.array([5, 1], np.int32)  # row 0 has room for one of its two tokens
    tables = np.array([[1], [0]], np.int32)

    def local(state, x, cache, lengths, tables):
        positions = lengths[:, None] + jnp.arange(2, dtype=jnp.int32)
        module = nnx.merge(graphdef, state)
        return module(x, positions, cache=cache, lengths_B=lengths, tables_BN=tables)[1]

    heads = P("tensor", None, None, None)
    specs = LayerCache(heads, heads)
    run = shard_map(local, mesh_of(tensor=2), (specs_of(state), P(), specs, P(), P()), specs)
    new = run(state, x, LayerCache(*old), lengths, tables)
    for before, after in zip(old, (new.k_MPLh, new.v_MPLh)):
        changed = np.any(before != np.asarray(after), axis=(0, 3))
        expected = np.zeros((B, 6), bool)
        expected[1, 5] = expected[0, 1] = expected[0, 2] = True
        np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("name", ["as in gpt-oss", "window, pairs side by side"])
def test_token_by_token_with_a_cache_is_the_whole_text(name, rng):
    tensor, changes = CASES[name]
    _, graphdef, state = make(**{"qk_norm": "none", **changes}, rng=rng)
    x = inputs(rng)[0]
    cache = LayerCache(*np.zeros((2, 4, 2 * B, S // 2, 8), np.float32))
    tables = np.array([[2, 1], [0, 3]], np.int32)

    def local(state, x, cache, tables):
        module = nnx.merge(graphdef, state)
        start, out = 0, []
        for count in 3, 1, S - 4:
            positions = jnp.broadcast_to(
                jnp.arange(start, start + count, dtype=jnp.int32), (B, count)
            )
            lengths = jnp.full(B, start, jnp.int32)
            new = x[:, start : start + count]
            y, cache = module(new, positions, cache=cache, lengths_B=lengths, tables_BN=tables)
            start, out = start + count, [*out, y]
        positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        return jnp.concatenate(out, axis=1), module(x, positions)[0]

    heads = P("tensor", None, None, None)
    specs = LayerCache(heads, heads)
    run = shard_map(local, mesh_of(tensor=tensor), (specs_of(state), P(), specs, P()), P())
    parts, whole = run(state, x, cache, tables)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=2e-5)


def test_is_the_attention_of_gpt_oss(rng):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False}
    theirs = transformers.GptOssConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        layer_types=["sliding_attention"],
        sliding_window=3,
        rope_parameters={**rope, "original_max_position_embeddings": 32},
        max_position_embeddings=128,
        attn_implementation="eager",
    )
    yarn = YarnConfig(4.0, 32, truncate=False)
    changes = {"bias": True, "output_bias": True, "sinks": True, "window": 3, "yarn": yarn}
    _, graphdef, state = make("none", rng, num_heads=4, num_kv_heads=2, **changes)
    x, positions, _ = inputs(rng)

    attention = GptOssAttention(theirs, 0)
    p = {k: torch.from_numpy(np.array(v)) for k, v in named(state).items()}
    weights = {"sinks": p["sinks"], "o_proj.weight": p["w_o"].reshape(-1, D).T}
    weights["o_proj.bias"] = p["b_o"]
    for name in "qkv":
        weights[f"{name}_proj.weight"] = p[f"w_{name}"].reshape(D, -1).T
        weights[f"{name}_proj.bias"] = p[f"b_{name}"].reshape(-1)
    attention.load_state_dict(weights)
    before = np.arange(S)[:, None] - np.arange(S)
    mask = np.where((before >= 0) & (before < 3), 0.0, -np.inf).astype(np.float32)
    tensor = torch.from_numpy(x)
    turns = GptOssRotaryEmbedding(theirs)(tensor, torch.from_numpy(positions))
    with torch.no_grad():
        want = attention(tensor, turns, torch.from_numpy(mask)[None, None])[0].numpy()

    def local(state, x, positions):
        return nnx.merge(graphdef, state)(x, positions)[0]

    got = shard_map(local, mesh_of(tensor=2), (specs_of(state), P(), P()), P())(state, x, positions)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_cudnn_is_chosen_only_where_it_serves():
    attention = AttentionConfig(4, 4, 64)
    for changes, want in (
        ({}, "cudnn"),
        ({"window": 7, "bias": True, "yarn": YARN}, "cudnn"),
        ({"sinks": True}, None),
        ({"latent": LatentConfig(16, 32, 64)}, "cudnn"),
        ({"latent": LatentConfig(16, 32, 32)}, None),
    ):
        config = ModelConfig(attention=dataclasses.replace(attention, **changes))
        assert choose_attention("gpu", config) == want, changes
