"""A layer that knows where its experts are, whole, on a mesh; and training with it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from locality_support import distances_from, oracle, random_slots, scales
from moe_harness import check_report, errors, random_weights, run_oracle, sharded_layer
from run_support import TINY, rows, run, write_text
from train_support import batches, blueprint_of, initial, make_config, train

from moejax.config import (
    ExchangeConfig,
    ExpertsConfig,
    LocalityConfig,
    MoEConfig,
    RouterConfig,
)
from moejax.data.pipeline import HeldOutWindows
from moejax.placement.arrays import from_slots, slots_at_home
from moejax.placement.choice import FEW
from moejax.placement.choice_reference import reference
from moejax.placement.controller import stacked
from moejax.placement.topology import Topology
from moejax.routing.metrics import router_metrics
from moejax.training.evaluate import Evaluator
from moejax.training.state import init_state

D, TOKENS = 16, 8
# As in test_layer_oracle: float32 against float64, relative to the norm.
FLOAT32_BOUND = 1.2e-6
HOSTS_8, HOSTS_4 = (0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1)


def moe(num_experts, top_k, mode, locality, renormalize=True):
    router = RouterConfig(
        num_experts, top_k, renormalize=renormalize, load_balance_coef=0.1, z_loss_coef=0.05
    )
    return MoEConfig(router, ExpertsConfig(hidden=8), ExchangeConfig(mode), locality)


def draw(rng, config, sharded, slots, hosts):
    """Weights, tokens and mask whose choice is not within rounding of another; and the choice."""
    devices, tokens = sharded.expert, sharded.num_tokens
    weights = random_weights(rng, config, D)
    x = np.zeros((tokens, D), np.float32)
    chosen = np.zeros((tokens, config.router.top_k), int)
    scale = np.ones((tokens, config.router.num_experts))
    open_NG = np.zeros((tokens, devices), bool)
    for n in range(tokens):
        me, gap = n // TOKENS % devices, 0.0
        while gap < 1e-4:
            x[n] = rng.normal(size=D)
            row = x[n].astype(np.float64) @ weights["router"].astype(np.float64)
            token = oracle(row, config.router, config.locality, 0.0, slots, me, hosts, devices)
            chosen[n], gap = token[0], token[2]
        open_NG[n, list(token[1])] = True
        if config.locality.weights == "scaled":
            scale[n] = scales(config.locality, distances_from(me, slots, hosts, devices))
    mask = rng.random(tokens) > 0.1
    return weights, x, mask, chosen, scale, open_NG


def run_case(rng, shape, config, slots, hosts, max_replicas=None):
    """Outputs, gradients, losses and counters against the dense oracle of the same routing."""
    sharded = sharded_layer(shape, config, D, TOKENS, hosts)
    devices, slots = shape[1], np.asarray(slots)
    weights, x, mask, chosen, scale, open_NG = draw(rng, config, sharded, slots, hosts)
    ct = rng.normal(size=x.shape).astype(np.float32)
    placement = None
    if max_replicas is not None:
        placement = from_slots(slots, config.router.num_experts, max_replicas)
    found = sharded(weights, x, ct, mask, placement)
    want = run_oracle(config, weights, x, ct, mask, chosen=chosen, scale=scale)
    for name, error in errors(found, want).items():
        assert error <= FLOAT32_BOUND, f"{name} is off by {error:.1e} of its norm"
    # Each row along `data` is a batch of its own.
    source = np.repeat(np.arange(devices), TOKENS)
    topology = Topology(devices, len(slots) // devices, hosts)
    correct = TOKENS * config.router.top_k >= FEW * topology.slots
    where = [
        reference(e, slots, topology, source, correct, open_G)
        for e, open_G in zip(np.split(want.experts, shape[0]), np.split(open_NG, shape[0]))
    ]
    where = np.concatenate(where)
    check_report(found, want, sharded, hosts, where, placement=placement)
    aux = found[2]
    assert int(aux.counters.assignments) == mask.sum() * config.router.top_k
    assert 0 < float(aux.kept) <= mask.sum()
    return where, open_NG, mask, aux


@pytest.mark.parametrize("mode", ["all_to_all", "ring"])
def test_penalties_on_eight_devices(rng, mode):
    """Experts at home on two hosts, weights from the scaled scores."""
    locality = LocalityConfig(0.3, 0.6, weights="scaled")
    config = moe(16, 3, mode, locality)
    run_case(rng, (1, 8, 1), config, slots_at_home(16, 8), HOSTS_8)


@pytest.mark.parametrize("mode", ["all_to_all", pytest.param("ring", marks=pytest.mark.slow)])
def test_few_devices_of_copies(rng, mode):
    """2 × 4 devices on two hosts, copies and empty slots, everything on at once."""
    locality = LocalityConfig(0.2, local_threshold=0.12, max_devices=2)
    config = moe(12, 3, mode, locality, renormalize=False)
    local = 0
    for extra in (0, 4):
        slots = random_slots(rng, extra)
        where, open_NG, mask, aux = run_case(rng, (2, 4, 1), config, slots, HOSTS_4, 3)
        fan_out = [len(set((row // 4).tolist())) for row in where[mask]]
        assert max(fan_out) <= 2
        local += sum(n == 1 for n in fan_out)
        own = int(aux.counters.rows_self + aux.counters.rows_host + aux.counters.rows_network)
        assert own == sum(fan_out)
        for n in np.flatnonzero(mask & (open_NG.sum(1) == 1)):
            assert set(where[n] // 4) == set(np.flatnonzero(open_NG[n]))
    assert local, "no token stayed on one device"


def test_one_device_is_as_without(rng):
    """All experts are near: the same bits, and all of the score mass."""
    locality = LocalityConfig(0.5, local_threshold=0.1, max_devices=1, weights="scaled")
    config = moe(6, 2, "auto", locality)
    without = dataclasses.replace(config, locality=LocalityConfig())
    weights = random_weights(rng, config, D)
    x, ct = rng.normal(size=(2, TOKENS, D)).astype(np.float32)
    mask = rng.random(TOKENS) > 0.2
    got = sharded_layer((1, 1, 1), config, D, TOKENS)(weights, x, ct, mask)
    want = sharded_layer((1, 1, 1), without, D, TOKENS)(weights, x, ct, mask)
    assert want[2].kept is None and float(got[2].kept) == mask.sum()
    same = dataclasses.replace(got[2], kept=None)
    jax.tree.map(np.testing.assert_array_equal, got[:2], want[:2])
    jax.tree.map(np.testing.assert_array_equal, (same, got[3]), (want[2], want[3]))


@pytest.mark.slow
def test_training_sends_less(rng):
    """With penalties from the first step on; what tells it is in the metrics."""
    config = make_config(
        model={"num_layers": 1, "first_dense_layers": 0, "dense_hidden": 0, "top_k_by_layer": ()}
    )
    near = dataclasses.replace(config.model.moe, locality=LocalityConfig(0.6))
    model = dataclasses.replace(config.model, moe=near)
    start, tokens = initial(config), batches(rng, 2)
    off = train(config, (1, 4, 1), start, tokens).metrics
    on = train(dataclasses.replace(config, model=model), (1, 4, 1), start, tokens).metrics
    for before, after in zip(off, on):
        assert before["moe"].kept is None
        sent = [m["moe"].counters.rows_host.sum() for m in (before, after)]
        assert 0 < sent[1] < sent[0]
        moe = after["moe"]
        assert moe.counters.assignments.sum() == before["moe"].counters.assignments.sum()
        assert moe.counts_E.sum() == moe.counters.assignments.sum()
        found = router_metrics(moe.counts_E, moe.entropy_sum, moe.num_tokens, moe.kept)
        assert 0.5 < float(found["score_mass_kept"]) < 1
        assert np.isfinite(after["loss"])


@pytest.mark.slow
def test_train_py(tmp_path):
    """The flags of train.py; what is written of each step and of evaluations."""
    text = write_text(tmp_path / "text")
    run_dir = tmp_path / "run"
    words = ["--model.moe.locality.device-penalty", "0.5", "--model.moe.locality.max-devices", "2"]
    words += ["--steps", "2", "--data", text, "--run", str(run_dir), "--eval-every", "1"]
    code, out, err = run(*TINY, *words)
    assert code == 0, err
    masses = [row["score_mass_kept"] for row in rows(run_dir)]
    evaluated = [json.loads(t) for t in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    masses += [row["score_mass_kept"] for row in evaluated]
    assert len(masses) >= 3 and all(0.3 < mass <= 1 for mass in masses), out


@pytest.mark.slow
@pytest.mark.parametrize("locality", [LocalityConfig(), LocalityConfig(max_devices=1)])
def test_evaluation_is_under_the_placement(rng, locality):
    """Where experts are matters to held-out text if routing looks at it, and else not."""
    config = make_config()
    moe = dataclasses.replace(config.model.moe, locality=locality)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    blueprint = blueprint_of(config, (1, 2, 1))
    state = init_state(blueprint, 0)
    tokens = batches(rng, 1)[0]
    windows = HeldOutWindows(tokens, np.ones_like(tokens[:, 1:], bool), tokens.size)
    evaluator = Evaluator(blueprint, windows, batch_size=len(tokens), loss_chunk=0)
    weights = evaluator.weights(state), state.biases
    layers = sum(layer.moe is not None for layer in config.model.layers())
    mixed_LP = np.stack([rng.permutation(10) for _ in range(layers)]).astype(np.int32)
    bits, masses = [], []
    for slots_LP in None, np.tile(slots_at_home(10, 2), (layers, 1)), mixed_LP:
        placement = None if slots_LP is None else stacked(slots_LP, 10, 1)
        bits.append(evaluator.bits_per_byte(*weights, placement=placement))
        masses.append(evaluator.score_mass_kept)
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)
    if locality.active:
        assert bits[2] != pytest.approx(bits[0], rel=1e-6)
        assert masses[0] == pytest.approx(masses[1], rel=1e-6)
        assert 0 < masses[2] < 1 and masses[2] != pytest.approx(masses[0], rel=1e-6)
    else:
        assert bits[2] == bits[0] and masses == [None] * 3  # it need not even be passed on
        args = *weights, tokens, windows.mask
        home, mixed = (float(evaluator._step(*args, where)) for where in (None, placement))
        assert mixed == pytest.approx(home, rel=1e-6)
