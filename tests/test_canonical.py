"""Parameter names for checkpoints: the same whether layers are scanned or not."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model_support import (
    RouterBias,
    TinyMoE,
    dense_config,
    mesh_of,
    mixed_config,
    randomize,
    shapes,
    specs_of,
)

from moejax.errors import UserError
from moejax.model import block
from moejax.model.canonical import canonical, from_canonical

D = 32


@pytest.fixture(autouse=True)
def tiny_moe(monkeypatch):
    monkeypatch.setattr(block, "MoELayer", TinyMoE)


def test_canonical_names_go_from_scanned_to_unrolled_and_back(rng):
    scanned = randomize(shapes(mixed_config(scan_layers=True))[1], rng)
    unrolled = shapes(mixed_config())[1]
    flat = canonical(scanned)
    assert flat.keys() == canonical(unrolled).keys()
    assert {"layers.3.attention.w_q", "embedding.w", "final_norm.scale", "layers.3.moe.bias"} <= (
        flat.keys()
    )
    assert type(flat["layers.3.moe.bias"]) is RouterBias
    for name, other in canonical(unrolled).items():
        assert flat[name].shape == other.shape
        assert flat[name].get_metadata()["spec"] == other.get_metadata()["spec"], name
        assert flat[name].get_metadata()["float32"] == other.get_metadata()["float32"], name
    filled = from_canonical(flat, unrolled)
    assert jax.tree.structure(filled) == jax.tree.structure(unrolled)
    back = from_canonical({k: v.get_value() for k, v in canonical(filled).items()}, scanned)
    assert jax.tree.structure(back) == jax.tree.structure(scanned)
    jax.tree.map(np.testing.assert_array_equal, back, scanned)


def test_canonical_of_shapes_only():
    config, mesh = dense_config(scan_layers=True), mesh_of(tensor=2)
    state = shapes(config)[1]
    state = jax.tree.map(
        lambda v, s: v.replace(
            jax.ShapeDtypeStruct(v.shape, jnp.float32, sharding=NamedSharding(mesh, s))
        ),
        state,
        specs_of(state),
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    leaf = canonical(state)["layers.1.attention.w_o"].get_value()
    assert leaf.shape == (4, 8, D) and leaf.sharding.spec == P("tensor", None, None)
    assert jax.tree.leaves(from_canonical(canonical(state), state)) == jax.tree.leaves(state)


def test_canonical_refuses_another_model():
    state = shapes(dense_config())[1]
    flat = canonical(state)
    flat["layers.7.attention.w_q"] = flat.pop("layers.1.attention.w_q")
    with pytest.raises(UserError, match=r"1 missing.*layers\.1\..*1 unknown.*layers\.7\."):
        from_canonical(flat, state)
