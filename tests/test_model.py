"""The decoder: against a float64 oracle, on meshes, scanned, rematerialised."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from model_support import (
    TinyMoE,
    check_replicas,
    decoder_nll,
    dense_config,
    directional,
    mesh_of,
    mixed_config,
    randomize,
    shapes,
    shard_map,
    specs_of,
    split,
    tokens_and_targets,
    value_and_grads,
)

from moejax.config import AttentionConfig, ExpertsConfig, MoEConfig
from moejax.errors import UserError
from moejax.model import block
from moejax.model.canonical import canonical, from_canonical
from moejax.model.decoder import Decoder, check_mesh
from moejax.model.groups import layer_groups
from pallas_kernels.tuning.lookup import use_table
from sharding.mesh import TOKEN_AXES, MeshShape

S, D = 8, 32
BATCH = P(TOKEN_AXES, None)


@pytest.fixture(autouse=True)
def tiny_moe(monkeypatch):
    monkeypatch.setattr(block, "MoELayer", TinyMoE)


def mean_loss(model, tokens, targets, *, total):
    hidden = model(tokens).hidden_BSD
    return jnp.sum(model.nll(hidden, targets, chunk=5)) / total


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ((2, 1, 4), {"activation": "swiglu"}),
        (
            (1, 2, 2),
            {"activation": "relu2", "tie_embeddings": True, "scan_layers": True, "remat": "dots"},
        ),
    ],
    ids=["untied-unrolled", "tied-scanned"],
)
def test_decoder_on_a_mesh_matches_oracle(sizes, changes, rng):
    config = dense_config(**changes)
    graphdef, state = shapes(config, MeshShape(*sizes))
    state = randomize(state, rng, scale=0.2)
    batch = tokens_and_targets(rng)
    loss = functools.partial(mean_loss, total=2 * S)
    mesh = mesh_of(*sizes)
    value, grads = value_and_grads(mesh, graphdef, state, loss, batch, (BATCH, BATCH))
    check_replicas((value, grads))
    params = {k: np.asarray(v.get_value(), np.float64) for k, v in canonical(state).items()}
    oracle = functools.partial(decoder_nll, tokens_BS=batch[0], targets_BS=batch[1], config=config)
    np.testing.assert_allclose(value, oracle(params), rtol=1e-5)
    for name, grad in canonical(grads).items():  # one by one, so that a small one cannot hide
        direction = {k: np.zeros_like(v) for k, v in params.items()}
        direction[name] = rng.normal(size=params[name].shape)
        got = np.asarray(grad.get_value(), np.float64)
        error = np.sum(got * direction[name]) - directional(oracle, params, direction)
        assert abs(error) < 1e-4 * np.linalg.norm(got) + 1e-6, name


def test_equal_neighbours_are_grouped():
    names = [g.name for g in layer_groups(mixed_config(scan_layers=True))]
    assert names == ["0", "1:3", "3"]
    assert [g.layer.moe and g.layer.moe.router.top_k for g in layer_groups(mixed_config())] == [
        None,
        2,
        2,
        1,
    ]


def test_scanned_unrolled_and_rematerialised_layers_agree(rng):
    batch = (*tokens_and_targets(rng), (rng.normal(size=3) + 1.0).astype(np.float32))
    mask = np.ones((2, S), bool)
    mask[1, 5:] = False

    def loss(model, tokens, targets, gain):
        out = model(tokens, placement={"gain": gain}, token_mask_BS=jnp.asarray(mask))
        assert out.aux["tokens"].shape == (3,)
        extra = jnp.sum(out.aux["output"] * jnp.arange(1.0, 4.0)) * 1e-3
        counted = jax.lax.stop_gradient(out.aux["tokens"].astype(jnp.float32)).sum()
        return jnp.mean(model.nll(out.hidden_BSD, targets)) + extra + counted

    drawn = canonical(randomize(shapes(mixed_config())[1], rng))
    results = []
    for scan, remat in [(False, "none"), (True, "layer"), (True, "local")]:
        graphdef, state = shapes(mixed_config(scan_layers=scan, remat=remat))
        state = from_canonical(drawn, state)
        specs = (P(), P(), P())
        value, grads = value_and_grads(mesh_of(), graphdef, state, loss, batch, specs)
        results.append((value, canonical(grads)))
    value, grads = results[0]
    assert value > 3 * 13  # the mask reached every MoE layer
    for other_value, other_grads in results[1:]:
        np.testing.assert_allclose(other_value, value, rtol=1e-6)
        assert other_grads.keys() == grads.keys() == drawn.keys()
        for name in grads:
            want = np.asarray(grads[name].get_value())
            tolerance = 1e-5 * max(1.0, np.abs(want).max())
            got = other_grads[name].get_value()
            np.testing.assert_allclose(got, want, atol=tolerance, err_msg=name)


def test_a_seed_gives_the_same_weights_scanned_or_not():
    unrolled, scanned = (canonical(split(mixed_config(scan_layers=s))[1]) for s in (False, True))
    assert unrolled.keys() == scanned.keys()
    for name in unrolled:
        np.testing.assert_array_equal(scanned[name].get_value(), unrolled[name].get_value())
    one, two = (unrolled[f"layers.{i}.attention.w_q"].get_value() for i in (1, 2))
    assert not np.any(np.asarray(one) == np.asarray(two))


def test_bfloat16_model_keeps_scales_and_logits_float32():
    graphdef, state = shapes(mixed_config(compute_dtype="bfloat16", scan_layers=True))
    flat = canonical(state)
    wide = {name for name, v in flat.items() if v.get_metadata()["float32"]}
    assert {n for n in flat if n.endswith("scale")} <= wide
    assert not any(n.rsplit(".", 1)[-1] in ("w_q", "w_o", "w_in", "b_in") for n in wide)

    def local(state):
        model = nnx.merge(graphdef, state)
        hidden = model(jnp.zeros((1, 4), jnp.int32)).hidden_BSD
        return hidden, model.logits(hidden)

    hidden, logits = jax.eval_shape(shard_map(local, mesh_of(), (specs_of(state),), P()), state)
    assert hidden.dtype == jnp.bfloat16 and hidden.shape == (1, 4, D)
    assert logits.dtype == jnp.float32 and logits.shape == (1, 4, 64)


def test_products_into_the_residual_start_smaller():
    flat = canonical(split(dense_config(num_layers=8, first_dense_layers=8))[1])
    for name, expected in [("attention.w_q", 0.02), ("attention.w_o", 0.005), ("mlp.w_out", 0.005)]:
        values = np.concatenate([np.ravel(v.get_value()) for k, v in flat.items() if name in k])
        assert abs(values.std() / expected - 1) < 0.05, name


def test_check_mesh_names_the_axis_and_the_width():
    config = mixed_config(attention=AttentionConfig(6, 6, 8))
    wide = mixed_config(attention=AttentionConfig(16, 16, 8), d_model=128)
    check_mesh(config, MeshShape(1, 4, 2))
    for broken, shape, message in [
        (config, MeshShape(tensor=8), "tensor=8 with num_kv_heads=6"),
        (config, MeshShape(tensor=4), "tensor=4 with num_heads=6"),
        (config, MeshShape(expert=5), "expert=5 with num_experts=4"),
        (dataclasses.replace(wide, dense_hidden=24), MeshShape(tensor=16), "dense_hidden=24"),
        (
            dataclasses.replace(wide, moe=MoEConfig(experts=ExpertsConfig(hidden=20))),
            MeshShape(tensor=8),
            "tensor=8 with hidden=20",
        ),
        (
            dataclasses.replace(
                wide, moe=MoEConfig(experts=ExpertsConfig(hidden=16, shared_hidden=4))
            ),
            MeshShape(tensor=8),
            "tensor=8 with shared_hidden=4",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            check_mesh(broken, shape)
    with pytest.raises(UserError, match="num_kv_heads=6"):
        Decoder(config, MeshShape(tensor=8), nnx.Rngs(0))


def test_another_table_of_kernels_is_another_trace(rng, monkeypatch):
    """Equal layers share a trace, but not with calls for which kernels are cut up otherwise."""
    config = dataclasses.replace(mixed_config(), scan_layers=False)
    graph, state = nnx.split(Decoder(config, MeshShape(), nnx.Rngs(params=0)))
    mesh, tokens = mesh_of(), jnp.asarray(rng.integers(0, 20, (1, S)), jnp.int32)
    traced, call = [], block.Block.__call__
    monkeypatch.setattr(
        block.Block, "__call__", lambda self, *a, **k: traced.append(1) or call(self, *a, **k)
    )

    def traces():
        def forward(state, tokens):
            return nnx.merge(graph, state)(tokens).hidden_BSD

        traced.clear()
        mapped = shard_map(forward, mesh=mesh, in_specs=(P(), BATCH), out_specs=BATCH)
        jax.eval_shape(mapped, state, tokens)
        return len(traced)

    assert traces() == 3  # dense, with experts 2 of a token, and 1
    assert traces() == 0
    with use_table(None):
        assert traces() == 3
