"""Placement arrays in the train step: they change where experts are computed, and nothing else."""

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from oracle import relative_error
from train_support import SEQ, batches, blueprint_of, host, initial, make_config

from moejax.placement.arrays import Placement, from_slots, home_slots
from moejax.training.state import from_logical, to_logical
from moejax.training.step import BATCH_SPEC, make_train_step

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


@pytest.mark.parametrize("sizes, scan_layers", [((1, 4, 1), False), ((2, 4, 1), True)])
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
