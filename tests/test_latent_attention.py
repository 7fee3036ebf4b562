"""Latent attention against a float64 oracle and transformers; its cache against no cache."""

import dataclasses

import jax
import numpy as np
import pytest
from draws import draws
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from model_support import (
    check_replicas,
    directional,
    mesh_of,
    mixed_config,
    named,
    randomize,
    rms,
    shard_map,
    specs_of,
    value_and_grads,
)

from moejax.config import AttentionConfig, LatentConfig, YarnConfig
from moejax.errors import UserError
from moejax.model.cache import LayerCache
from moejax.model.decoder import check_mesh
from moejax.model.latent_attention import LatentAttention, absorbs
from sharding.mesh import MeshShape

B, S, D, EPS = 2, 8, 32, 1e-6
N, NOPE, ROPE, VALUE, RANK = 4, 4, 4, 6, 16


def make(rng, query_rank=None, **options):
    latent = LatentConfig(RANK, ROPE, VALUE, query_rank)
    config = AttentionConfig(N, N, NOPE + ROPE, latent=latent, **options)
    module = nnx.eval_shape(lambda: LatentAttention(D, config, norm_eps=EPS, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return config, graphdef, randomize(state, rng)


def inputs(rng, length=S):
    x = rng.normal(size=(B, length, D)).astype(np.float32)
    positions = np.arange(length, dtype=np.int32) + np.array([[0], [5]], np.int32)
    weights = rng.normal(size=(B, length, D)).astype(np.float32)
    return x, positions, weights


def turn(x, positions_BS, config):
    """Pairs as complex numbers, side by side or half the width apart."""
    half = x.shape[-1] // 2
    first, second = (
        (x[..., ::2], x[..., 1::2]) if config.rope_interleaved else (x[..., :half], x[..., half:])
    )
    angle = positions_BS[..., None, None] * config.rope_theta ** (-np.arange(half) / half)
    numbers = (first + 1j * second) * np.exp(1j * angle)
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def oracle(p, x, positions, config):
    """Loops over heads and queries; p from parameter name to float64 array."""
    if config.latent.query_rank is None:
        q = np.einsum("bsd,dnh->bsnh", x, p["w_q"])
    else:
        q = np.einsum("bsq,qnh->bsnh", rms(x @ p["w_q_down"], p["q_scale"], EPS), p["w_q_up"])
    down = x @ p["w_kv_down"]
    latent = rms(down[..., :RANK], p["kv_scale"], EPS)
    shared = turn(down[:, :, None, RANK:], positions, config)[:, :, 0]
    q = np.concatenate([q[..., :NOPE], turn(q[..., NOPE:], positions, config)], axis=-1)
    out = np.zeros(x.shape)
    for n in range(N):
        up = latent @ p["w_kv_up"][:, n]
        k, v = np.concatenate([up[..., :NOPE], shared], axis=-1), up[..., NOPE:]
        for s in range(x.shape[1]):
            first = 0 if config.window is None else max(0, s + 1 - config.window)
            score = np.einsum("bh,bth->bt", q[:, s, n], k[:, first : s + 1])
            score = np.exp((score - score.max(-1, keepdims=True)) / np.sqrt(NOPE + ROPE))
            mean = np.einsum("bt,btv->bv", score, v[:, first : s + 1]) / score.sum(-1)[:, None]
            out[:, s] += mean @ p["w_o"][n]
    return out


@pytest.mark.parametrize(
    "options",
    [{"query_rank": None}, {"query_rank": 10, "rope_interleaved": True, "window": 3}],
    ids=["plain", "query-rank-window"],
)
def test_matches_oracle_and_splits_over_tensor(options, rng):
    config, graphdef, state = make(rng, **options)
    batch = inputs(rng)

    def weighted_sum(module, x, positions, weights):
        return jnp.sum(module(x, positions)[0] * weights)

    params = {k: v.astype(np.float64) for k, v in named(state).items()}
    params["x"] = batch[0].astype(np.float64)

    def loss(p):
        return np.sum(oracle(p, p["x"], batch[1], config) * batch[2])

    expected = {}
    directions = {k: rng.normal(size=v.shape) for k, v in params.items()}
    for name in params:  # each parameter alone, so that a wrong one cannot hide
        direction = {k: np.zeros_like(v) for k, v in params.items()}
        expected[name] = directional(loss, params, {**direction, name: directions[name]})
    for tensor in 1, 2, 4:
        value, grads, dx = value_and_grads(
            mesh_of(tensor=tensor), graphdef, state, weighted_sum, batch, (P(),) * 3, wrt_input=True
        )
        check_replicas((value, grads, dx))
        np.testing.assert_allclose(value, loss(params), rtol=1e-4, atol=1e-3)
        got = {**named(grads), "x": np.asarray(dx)}
        assert got.keys() == params.keys()
        for name in params:
            size = np.sqrt(np.sum(np.square(got[name])) + 1.0)
            assert abs(np.sum(got[name] * directions[name]) - expected[name]) < 1e-3 * size, name


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"query_rank": 10, "window": 4}], ids=["all", "window"])
def test_pieces_with_a_cache_equal_the_whole(options, tensor, rng):
    """Long pieces expand the latents, short ones attend to them; rows at different places."""
    yarn = YarnConfig(4.0, 8, mscale=1.0, mscale_all_dim=0.7)
    config, graphdef, state = make(rng, yarn=yarn, rope_interleaved=True, **options)
    length, page_len, pages = 20, 4, 13
    x, _, _ = inputs(rng, length)
    mesh, specs = mesh_of(tensor=tensor), LayerCache(P(), None)

    def whole(state, x):
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), x.shape[:2])
        return nnx.merge(graphdef, state)(x, positions)[0]

    def piece(state, x, cache, lengths, tables):
        positions = lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        return nnx.merge(graphdef, state)(
            x, positions, cache=cache, lengths_B=lengths, tables_BN=tables
        )

    whole = shard_map(whole, mesh, (specs_of(state), P()), P())
    piece = shard_map(piece, mesh, (specs_of(state), P(), specs, P(), P()), (P(), specs))
    want = np.asarray(whole(state, x))

    tables = rng.permutation(pages)[:12].reshape(B, 6).astype(np.int32)
    tables[:, 5] = -1
    cache = LayerCache(jnp.zeros((1, pages, page_len, RANK + ROPE), jnp.float32), None)
    done = np.zeros(B, np.int32)
    ways = []
    for width, counts in [(7, (7, 4)), (1, (1, 1)), (4, (2, 4)), (9, (9, 0)), (1, (1, 1))]:
        rows = [x[row, done[row] : done[row] + width] for row in range(B)]
        part = np.stack([np.pad(r, ((0, width - len(r)), (0, 0))) for r in rows])
        got, cache = piece(state, part, cache, done, tables)
        check_replicas((got, cache))
        for row, count in enumerate(counts):
            span = slice(done[row], done[row] + count)
            np.testing.assert_allclose(got[row, :count], want[row, span], rtol=1e-5, atol=1e-5)
        done = done + np.array(counts, np.int32)
        ways.append(absorbs(config, width))
    assert ways == [False, True, True, False, True]


def test_bfloat16_cache_stays_near_float32(rng):
    _, graphdef, state = make(rng, query_rank=10)
    x, _, _ = inputs(rng)
    x = 0.3 * x
    at = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))

    def last(state, x, dtype):
        """The last output, of a cache that is filled token by token."""
        module = nnx.merge(graphdef, state)
        cache = LayerCache(jnp.zeros((1, B, S, RANK + ROPE), dtype), None)
        tables = jnp.arange(B, dtype=jnp.int32)[:, None]
        for s in range(S):
            y, cache = module(
                x[:, s : s + 1], at[:, s : s + 1], cache=cache, lengths_B=at[:, s], tables_BN=tables
            )
        return y[:, 0]

    def run(dtype):
        return shard_map(
            lambda state, x: last(state, x, dtype), mesh_of(), (specs_of(state), P()), P()
        )(state, jnp.asarray(x, dtype))

    exact, rounded = run("float32"), run("bfloat16")
    assert rounded.dtype == jnp.bfloat16
    error = np.asarray(rounded, np.float32) - np.asarray(exact)
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(np.square(exact)))


def test_absorbing_is_chosen_by_counting_products():
    """DeepSeek-V3: 512 · 256 products to expand a latent, 192 + 128 a query then, else 2 · 576."""
    config = AttentionConfig(128, 128, 192, latent=LatentConfig(512, 64, 128))
    assert [absorbs(config, queries) for queries in (1, 157, 158, 4096)] == [
        True,
        True,
        False,
        False,
    ]


YARN = YarnConfig(4.0, 16, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.7)


@pytest.mark.parametrize("query_rank", [None, 10])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
def test_equals_transformers(yarn, interleaved, query_rank, rng):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    if yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_context,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    theirs = modeling.DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=N,
        num_key_value_heads=N,
        q_lora_rank=query_rank,
        kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        max_position_embeddings=64,
        rope_interleave=interleaved,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    _, graphdef, state = make(rng, query_rank, rope_interleaved=interleaved, yarn=yarn)
    p = named(state)
    weights = {
        "kv_a_proj_with_mqa.weight": p["w_kv_down"].T,
        "kv_a_layernorm.weight": p["kv_scale"],
        "kv_b_proj.weight": p["w_kv_up"].reshape(RANK, -1).T,
        "o_proj.weight": p["w_o"].reshape(-1, D).T,
    }
    if query_rank is None:
        weights["q_proj.weight"] = p["w_q"].reshape(D, -1).T
    else:
        weights["q_a_proj.weight"] = p["w_q_down"].T
        weights["q_a_layernorm.weight"] = p["q_scale"]
        weights["q_b_proj.weight"] = p["w_q_up"].reshape(query_rank, -1).T
    x, positions, _ = inputs(rng, 24)
    module = modeling.DeepseekV3Attention(theirs, 0)
    module.load_state_dict({k: torch.tensor(np.ascontiguousarray(v)) for k, v in weights.items()})
    with torch.no_grad():
        states = torch.tensor(x)
        angles = modeling.DeepseekV3RotaryEmbedding(theirs)(states, torch.tensor(positions))
        future = torch.full((24, 24), -torch.inf).triu(1)[None, None]
        want = module(states, angles, future)[0].numpy()

    def local(state, x):
        return nnx.merge(graphdef, state)(x, jnp.asarray(positions))[0]

    got = shard_map(local, mesh_of(tensor=2), (specs_of(state), P()), P())(state, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_only_query_heads_must_divide_over_tensor():
    attention = make(draws(__name__))[0]
    config = dataclasses.replace(mixed_config(), attention=attention)
    check_mesh(config, MeshShape(tensor=4))
    with pytest.raises(UserError, match="tensor=8 with num_heads=4"):
        check_mesh(config, MeshShape(tensor=8))


def test_a_cache_and_the_output_keep_their_dtypes(rng):
    _, graphdef, state = make(rng)
    cache = LayerCache(jnp.zeros((1, 1, S, RANK + ROPE), jnp.bfloat16), None)

    def local(state, x, cache):
        zeros = jnp.zeros(1, jnp.int32)
        return nnx.merge(graphdef, state)(
            x, zeros[:, None], cache=cache, lengths_B=zeros, tables_BN=zeros[:, None]
        )

    specs = (specs_of(state), P(), LayerCache(P(), None))
    run = shard_map(local, mesh_of(), specs, (P(), specs[2]))
    y, new = jax.eval_shape(run, state, jnp.zeros((1, 1, D), jnp.float32), cache)
    assert (y.dtype, new.k_MPLh.dtype) == (jnp.float32, jnp.bfloat16)
