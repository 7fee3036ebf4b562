"""States in logical order: the same on every mesh, padded or not, scanned or not."""

import dataclasses

import jax
import numpy as np
import pytest
from draws import draws
from flax import nnx
from jax import numpy as jnp
from train_support import blueprint_of, host, make_config

from moejax.errors import UserError
from moejax.placement.arrays import home_slots
from moejax.training.state import (
    Blueprint,
    from_logical,
    init_state,
    load_weights,
    logical_targets,
    to_logical,
)
from sharding import zero
from sharding.mesh import MeshShape, abstract_mesh
from sharding.specs import specs_of

CONFIG = make_config(10, model={"top_k_by_layer": ()})


def scanned(config):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=True))


def random_state(rng, config=CONFIG):
    targets = logical_targets(Blueprint(config.model, abstract_mesh(MeshShape())))
    return {
        name: np.asarray(rng.normal(size=t.shape) if name != "step" else 7, t.dtype)
        for name, t in targets.items()
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(np.asarray(got[name]), value, err_msg=name)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(zero, "SMALLEST", 2)


def test_names_and_shapes():
    flat = random_state(draws(__name__))
    assert flat["step"].shape == ()
    parts = {name.partition("/")[0] for name in flat}
    assert parts == {"params", "mu", "nu", "bias", "step"}
    for part in ("mu", "nu"):
        names = {n.partition("/")[2]: v.shape for n, v in flat.items() if n.startswith(part)}
        assert names == {n[7:]: v.shape for n, v in flat.items() if n.startswith("params/")}
    banks = [v for n, v in flat.items() if n.startswith("params/layers.1.moe.bank.")]
    assert banks and all(v.shape[0] == 10 for v in banks)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 3, 1), (2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("scan", [False, True])
def test_round_trip(rng, sizes, scan):
    flat = random_state(rng)
    blueprint = blueprint_of(scanned(CONFIG) if scan else CONFIG, sizes)
    state = jax.block_until_ready(from_logical(flat, blueprint))
    assert_same(host(jax.block_until_ready(to_logical(state))), flat)
    # It lies as the blueprint says, so that a step takes it without moving anything.
    for variables, specs in (
        (state.masters, blueprint.stored_specs),
        (state.moments[1], blueprint.stored_specs),
        (state.biases, blueprint.bias_specs),
    ):
        specs = dict(nnx.to_flat_state(specs))
        for path, variable in nnx.to_flat_state(variables):
            value = variable.get_value()
            spec = jax.sharding.NamedSharding(blueprint.mesh, specs[path])
            assert value.sharding.is_equivalent_to(spec, value.ndim), path


def test_experts_lie_at_home_and_padding_is_zero(rng):
    flat = random_state(rng)
    state = jax.block_until_ready(from_logical(flat, blueprint_of(CONFIG, (1, 8, 1))))
    home = home_slots(10, 8)
    banks = 0
    for path, variable in nnx.to_flat_state(state.masters):
        if "bank" not in path:
            continue
        banks += 1
        value = np.asarray(variable.get_value())
        assert value.shape[0] == 16
        np.testing.assert_array_equal(
            value[home], flat["params/" + ".".join(map(str, path))], err_msg=str(path)
        )
        assert not np.delete(value, home, axis=0).any()
    assert banks >= 4


def test_targets_are_read_where_they_belong(rng):
    """What `restore` is asked for has the logical shapes, split where the mesh divides them."""
    flat = random_state(rng)
    for sizes in ((1, 8, 1), (1, 3, 1), (2, 2, 2)):
        targets = logical_targets(blueprint_of(scanned(CONFIG), sizes))
        assert {n: (t.shape, t.dtype) for n, t in targets.items()} == {
            n: (v.shape, v.dtype) for n, v in flat.items()
        }
        for target in targets.values():
            target.sharding.shard_shape(target.shape)  # raises where it does not divide
    parts = logical_targets(blueprint_of(CONFIG, (2, 2, 2)), ("params", "bias"))
    assert {n.partition("/")[0] for n in parts} == {"params", "bias"}


def test_a_fresh_state_is_the_same_on_every_mesh():
    want = host(to_logical(init_state(blueprint_of(CONFIG, (1, 1, 1)), 3)))
    assert int(want["step"]) == 0
    for name, value in want.items():
        if name.startswith(("mu/", "nu/", "bias/")):
            assert not value.any(), name
    state = jax.block_until_ready(init_state(blueprint_of(CONFIG, (1, 4, 2)), 3))
    assert_same(host(jax.block_until_ready(to_logical(state))), want)


@pytest.mark.parametrize("sizes, scan", [((1, 3, 1), True), ((2, 2, 2), False)])
def test_weights_for_inference(rng, sizes, scan):
    flat = random_state(rng)
    flat = {n: v for n, v in flat.items() if n.startswith(("params/", "bias/"))}
    blueprint = blueprint_of(scanned(CONFIG) if scan else CONFIG, sizes)
    params, biases = jax.block_until_ready(load_weights(flat, blueprint, jnp.bfloat16))
    storage = dict(nnx.to_flat_state(blueprint.storage))
    specs = dict(nnx.to_flat_state(specs_of(blueprint.params)))
    wide = 0
    for path, variable in nnx.to_flat_state(params):
        value = variable.get_value()
        assert value.dtype == (storage[path].dtype or jnp.bfloat16)
        wide += value.dtype == jnp.float32
        where = jax.sharding.NamedSharding(blueprint.mesh, specs[path])
        assert value.sharding.is_equivalent_to(where, value.ndim)
    assert 0 < wide < len(storage)
    for path, variable in nnx.to_flat_state(biases):
        assert variable.get_value().dtype == jnp.float32, path
    if not scan:
        for path, variable in nnx.to_flat_state(params):
            value = np.asarray(variable.get_value())
            want = flat["params/" + ".".join(map(str, path))]
            np.testing.assert_array_equal(value, want.astype(value.dtype), err_msg=str(path))


def test_states_of_other_models_are_refused(rng):
    flat = random_state(rng)
    blueprint = blueprint_of(CONFIG, (1, 1, 1))
    name = next(n for n in flat if n.startswith("params/layers.2"))
    with pytest.raises(UserError, match=r"should be .* and is nothing: .*another model"):
        from_logical({n: v for n, v in flat.items() if n != name}, blueprint)
    with pytest.raises(UserError, match=f"{name} should be .* and is .*another model"):
        from_logical(flat | {name: flat[name][:-1]}, blueprint)
    deeper = dataclasses.replace(CONFIG.model, num_layers=4)
    with pytest.raises(UserError, match=r"layers\.3.* is nothing"):
        from_logical(flat, blueprint_of(dataclasses.replace(CONFIG, model=deeper), (1, 1, 1)))
    weights = {n: v for n, v in flat.items() if n.startswith(("params/", "bias/"))}
    for wrong in (
        {n: v for n, v in weights.items() if n != name},
        weights | {name: weights[name][:-1]},
        weights | {"params/layers.9.more": weights[name]},
    ):
        with pytest.raises(UserError, match="another model"):
            load_weights(wrong, blueprint, jnp.float32)
