"""Placement arrays in the train step: they change where experts are computed, and nothing else."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import relative_error
from planner_support import run_config
from train_support import SEQ, batches, blueprint_of, host, initial, make_config

from moejax.model.canonical import canonical
from moejax.placement.arrays import Placement, from_slots, home_slots
from moejax.placement.fetch import fetch, fetch_traffic
from moejax.training.optimizer import init_moments
from moejax.training.state import Blueprint, TrainState, from_logical, to_logical
from moejax.training.step import BATCH_SPEC, make_train_step
from sharding.mesh import AXES, EXPERT, MeshShape, abstract_mesh
from sharding.traffic import collectives_of
from sharding.traffic_formulas import fetch_collectives

EXPERTS, LAYERS, REPLICAS = 10, 2, 2  # 3 slots on each of 4 devices: two remain for replicas
SLOTS = 12
TOKENS = batches(np.random.default_rng(1), 1)  # fixed: no two router scores are almost equal


def config_of(scan_layers):
    return make_config(EXPERTS, model={"top_k_by_layer": (), "scan_layers": scan_layers})


@pytest.fixture(scope="module")
def start():
    return initial(config_of(False))


def stacked(slots_LP) -> Placement:
    """One placement for each MoE layer; arrays in host memory."""
    layers = [from_slots(slots_P, EXPERTS, REPLICAS) for slots_P in slots_LP]
    return jax.tree.map(lambda *a: np.stack(a), *layers)


def home() -> np.ndarray:
    slots_LP = np.full((LAYERS, SLOTS), -1)
    slots_LP[:, home_slots(EXPERTS, 4)] = np.arange(EXPERTS)
    return slots_LP


def replicated(rng) -> np.ndarray:
    """Every slot taken, another order in each layer; an expert's replicas on different devices."""
    rows = []
    for _ in range(LAYERS):
        first = rng.permutation(EXPERTS)
        devices = np.array([*first, first[0], first[1]]).reshape(4, 3)  # replicas on the last
        rows.append(rng.permutation(rng.permuted(devices, axis=1), axis=0).reshape(-1))
    return np.stack(rows)


@pytest.mark.parametrize(
    "sizes, scan_layers",
    [pytest.param((1, 4, 1), False, marks=pytest.mark.slow), ((2, 4, 1), True)],
)
def test_placement_changes_nothing_and_compiles_nothing(rng, start, sizes, scan_layers):
    config = config_of(scan_layers)
    blueprint = blueprint_of(config, sizes)
    assert any(group.scanned for group in blueprint.groups) == scan_layers
    step = make_train_step(blueprint, config)
    batch = jax.device_put(
        TOKENS.reshape(1, -1, SEQ + 1), NamedSharding(blueprint.mesh, BATCH_SPEC)
    )

    def run(placement):
        state = jax.block_until_ready(from_logical(start, blueprint))
        if placement is not None:
            step.trace(state, batch, placement)  # our code, under strict promotion
        with jax.numpy_dtype_promotion("standard"):  # JAX's attention mixes dtypes
            state, metrics = jax.block_until_ready(step(state, batch, placement))
        return host(to_logical(state)), jax.device_get(metrics)

    plain, plain_metrics = run(None)
    contiguous, contiguous_metrics = run(stacked(home()))
    compiled = step._cache_size()
    assert compiled == 2  # without arrays, and with them
    chex.assert_tree_all_finite(plain)
    chex.assert_trees_all_close(contiguous, plain, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(contiguous_metrics, plain_metrics, rtol=1e-6, atol=1e-6)

    rows_self = [plain_metrics["moe"].counters.rows_self]
    for slots_LP in (rng.permuted(home(), axis=1), replicated(rng)):
        moved, metrics = run(stacked(slots_LP))
        chex.assert_trees_all_close(moved, plain, rtol=1e-5, atol=1e-5)
        for name in moved:
            if name.startswith("mu/"):  # the gradient, which is small beside the masters
                assert relative_error(moved[name], plain[name]) < 1e-5, name
        for name in ("loss", "aux_loss", "grad_norm"):
            np.testing.assert_allclose(metrics[name], plain_metrics[name], rtol=1e-5, err_msg=name)
        moe, plain_moe = metrics["moe"], plain_metrics["moe"]
        chex.assert_trees_all_equal(moe.counts_E, plain_moe.counts_E)
        np.testing.assert_array_equal(moe.counters.assignments, plain_moe.counters.assignments)
        rows_self.append(moe.counters.rows_self)
    assert np.ptp(rows_self, axis=0).any(), "nothing was computed elsewhere"
    assert step._cache_size() == compiled


TWENTY = 20


def twenty_steps(config, sizes, start, placements):
    """Losses, gradient norms and choices of each step, the state (logical, and as it is)."""
    blueprint = blueprint_of(config, sizes)
    step = make_train_step(blueprint, config)
    state = jax.block_until_ready(from_logical(start, blueprint))
    tokens, found = batches(np.random.default_rng(2), TWENTY), []
    where = NamedSharding(blueprint.mesh, BATCH_SPEC)
    with jax.numpy_dtype_promotion("standard"):  # JAX's attention mixes dtypes
        for rows, placement in zip(tokens, placements, strict=True):
            batch = jax.device_put(rows.reshape(1, -1, SEQ + 1), where)
            state, metrics = jax.block_until_ready(step(state, batch, placement))
            moe = metrics["moe"]
            found.append(jax.device_get([metrics["loss"], metrics["grad_norm"], moe.counts_E]))
            if len(found) == TWENTY // 2:
                programs = step._cache_size()
    assert step._cache_size() == programs, "a migration must not compile"
    return found, host(to_logical(state)), state


def fetched(state, blueprint, slots_LP):
    """Each bank's slots [G·S, …] on all devices of the mesh, by name: [devices · S, …]."""
    found = {}
    for name, variable in canonical(state.masters).items():
        if ".bank." not in name:
            continue
        placement = from_slots(slots_LP[int(name.split(".")[1]) - 1], EXPERTS, REPLICAS)

        def body(bank, placement=placement):
            return fetch(bank, placement, EXPERTS)

        run = jax.shard_map(
            body, mesh=blueprint.mesh, in_specs=P(EXPERT), out_specs=P(AXES), check_vma=False
        )
        found[name] = np.asarray(jax.jit(run)(variable.get_value()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sizes, remat", [((1, 4, 1), "none"), ((2, 4, 1), "layer")])
def test_twenty_steps_with_replicas_and_a_migration(rng, sizes, remat):
    """Replicas from the start, others from step 10 on: the run without any, to 1e-5."""
    config = config_of(sizes[0] > 1)
    model = dataclasses.replace(config.model, remat=remat)
    # A small rate: with larger ones rounding grows from step to step, on any mesh.
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.003)
    config = dataclasses.replace(config, model=model, optimizer=optimizer, steps=TWENTY)
    start = initial(config)
    want, plain, _ = twenty_steps(config, sizes, start, [None] * TWENTY)
    slots = [replicated(rng), replicated(rng)]
    placements = [stacked(slots[step >= TWENTY // 2]) for step in range(TWENTY)]
    got, moved, state = twenty_steps(config, sizes, start, placements)
    for number, (a, b) in enumerate(zip(got, want)):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-5, err_msg=f"loss of step {number}")
        np.testing.assert_allclose(a[1], b[1], rtol=1e-5, err_msg=f"gradient of step {number}")
        np.testing.assert_array_equal(a[2], b[2], err_msg=f"experts of step {number}")
    assert want[-1][0] < 0.98 * want[0][0], "nothing was learned"
    for name, value in plain.items():
        scale = float(np.abs(value).max()) if name.startswith(("mu/", "nu/")) else 1.0
        np.testing.assert_allclose(moved[name], value, rtol=1e-5, atol=1e-5 * scale, err_msg=name)

    # The copies a next step would compute with: alike in every bit, on all ranks of `data`.
    for name, copies in fetched(state, blueprint_of(config, sizes), slots[1]).items():
        content = np.tile(slots[1][int(name.split(".")[1]) - 1], sizes[0])
        assert len(copies) == len(content)
        for expert in range(EXPERTS):
            found = {copies[p].tobytes() for p in np.flatnonzero(content == expert)}
            assert len(found) == 1, f"{name}: replicas of expert {expert} differ"
            logical = moved[f"params/{name}"][expert]
            assert found == {logical.tobytes()}


@pytest.mark.parametrize("remat", ["none", "layer", "dots"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_bytes_of_the_copies(rng, remat, scan_layers):
    """What the formula says of a placement's waves is what the traced step sends in them."""
    mesh, slots = MeshShape(2, 4, 2), 3
    config = run_config(
        experts={"bias": not scan_layers},
        model={"remat": remat, "scan_layers": scan_layers},
        train={"accumulate": 2},
    )
    blueprint = Blueprint(config.model, abstract_mesh(mesh))
    contents = [rng.permutation(np.r_[np.arange(8), 3, 5, 5, 7]) for _ in range(2)]
    placement = jax.tree.map(lambda *a: np.stack(a), *(from_slots(c, 8, 3) for c in contents))

    def state(params, biases):
        return TrainState(jnp.zeros((), jnp.int32), params, init_moments(params), biases)

    step = make_train_step(blueprint, config)
    batch = jax.ShapeDtypeStruct((2, 8, 17), jnp.int32)
    arguments = jax.eval_shape(state, blueprint.params, blueprint.biases), batch, placement
    with jax.numpy_dtype_promotion("standard"):
        traced = step.trace(*arguments)
    found = collectives_of(traced.jaxpr, dict(zip(AXES, mesh.sizes)))
    counted = {c.phase: (c.times, c.sent) for c in found if c.name == "replica fetch"}
    one_wave = fetch_collectives(config, mesh, slots, [1, 1])
    assert counted == {c.phase: (c.times, pytest.approx(c.sent)) for c in one_wave}
    assert all(c.extra for c in one_wave)
    assert ("recomputed" in counted) == (remat != "none")

    waves = [fetch_traffic(content, 4).waves for content in contents]
    numbers = 128 * 2 * 32 + 32 * 128 + (2 * 32 + 128 if not scan_layers else 0)
    passes = 2 * (2 if remat == "none" else 3)  # of two microbatches
    total = sum(c.sent for c in fetch_collectives(config, mesh, slots, waves))
    assert total == pytest.approx(sum(waves) * passes * 3 * numbers * 2)  # to 3 others, bfloat16
    assert sum(c.sent for c in fetch_collectives(config, mesh, slots, [0, 0])) == 0
