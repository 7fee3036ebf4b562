"""Placement arrays: where experts live changes nothing but what travels."""

from functools import partial

import jax
import numpy as np
import pytest
from moe_harness import check_report, errors, random_weights, run_oracle, sharded_layer

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig
from moejax.errors import UserError
from moejax.placement.arrays import contiguous, from_slots, home_slots, num_slots
from moejax.placement.choice import place
from sharding.mesh import EXPERT

# ---- the arrays -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts,devices", [(8, 8), (10, 8), (64, 3), (264, 8), (5, 1)])
def test_home_slots(num_experts, devices):
    """In order, each slot once, loads differing by at most one."""
    slots = num_slots(num_experts, devices)
    home = home_slots(num_experts, devices)
    assert slots == -(-num_experts // devices)
    assert home.dtype == np.int32 and (np.diff(home) > 0).all() and home[-1] < devices * slots
    load = np.bincount(home // slots, minlength=devices)
    assert load.sum() == num_experts and load.max() - load.min() <= 1
    if num_experts % devices == 0:
        assert np.array_equal(home, np.arange(num_experts))

    placement = contiguous(num_experts, devices)
    assert placement.slot_expert_P.shape == (devices * slots,)
    assert np.array_equal(np.flatnonzero(placement.slot_expert_P >= 0), home)
    assert np.array_equal(placement.replica_slots_ER[:, 0], home)
    assert (np.asarray(placement.replica_count_E) == 1).all()


def test_from_slots(rng):
    content = rng.permutation(np.r_[np.arange(5), [0, 3, 3], [-1, -1]])
    placement = from_slots(content, 5, max_replicas=4)
    assert placement.replica_slots_ER.shape == (5, 4)
    for e in range(5):
        count = int(placement.replica_count_E[e])
        row = np.asarray(placement.replica_slots_ER[e])
        assert np.array_equal(row[:count], np.flatnonzero(content == e))
        assert (row[count:] == row[0]).all()
    assert from_slots(content, 5).replica_slots_ER.shape == (5, 3)


def test_bad_placements_are_refused():
    with pytest.raises(UserError, match=r"expert 1 has no slot; give each at least one"):
        from_slots(np.array([0, 2, 2, -1]), 3)
    for slots in ([0, 1, 3], [0, 1, 2, -2]):
        with pytest.raises(
            UserError, match=rf"holds expert {slots[-1]}: must .* 0 and 2, or be -1"
        ):
            from_slots(np.array(slots), 3)
    with pytest.raises(UserError, match=r"expert 2 has 3 replicas, more than the 2 .* raise"):
        from_slots(np.array([0, 1, 2, 2, 2]), 3, max_replicas=2)
    with pytest.raises(UserError, match=r"num_experts=3 on expert=4 devices.*shrink the mesh"):
        contiguous(3, 4)


# ---- in the layer -----------------------------------------------------------------------------

G, S, E, K, TOKENS, D, R = 4, 3, 6, 3, 8, 16, 3


def random_placement(rng, replicas):
    """Each expert 1 … `replicas` times on different devices where they can be; some slots empty."""
    counts = np.ones(E, int)
    while replicas > 1 and counts.sum() < G * S - 1:
        e = rng.integers(E)
        counts[e] += counts[e] < replicas
        if (counts == replicas).all():
            break
    content = np.full(G * S, -1)
    content[: counts.sum()] = np.repeat(np.arange(E), counts)
    return from_slots(rng.permutation(content), E, max_replicas=R)


def moe(mode):
    return MoEConfig(
        RouterConfig(num_experts=E, top_k=K, z_loss_coef=0.1),
        ExpertsConfig(hidden=8, bias=True),
        ExchangeConfig(mode, bucket_rows=5),
    )


def check_placements(rng, shape, mode):
    """Equal to the oracle, with the counters of what travels, under one compiled function."""
    config = moe(mode)
    sharded = sharded_layer(shape, config, D, TOKENS)
    devices = shape[1]
    home = np.full((devices, G * S // devices), -1)
    for device, part in enumerate(np.array_split(np.arange(E), devices)):
        home[device, : len(part)] = part
    placements = {
        "home": from_slots(home.ravel(), E, max_replicas=R),
        "permuted": random_placement(rng, 1),
        "two replicas": random_placement(rng, 2),
        "three replicas": random_placement(rng, 3),
    }
    if devices == 2:
        placements["everywhere"] = from_slots(np.tile(np.arange(E), 2), E, max_replicas=R)
    while True:
        weights = random_weights(rng, config, D)
        x, ct = rng.normal(size=(2, sharded.num_tokens, D)).astype(np.float32)
        want = run_oracle(config, weights, x, ct)
        if want.gap > 1e-4:
            break
    compiled = set()
    for name, placement in placements.items():
        run = sharded(weights, x, ct, placement=placement)
        for what, error in errors(run, want).items():
            assert error < 1.2e-6, f"{name}: {what} is off by {error:.1e} of its norm"
        experts = want.experts.reshape(shape[0], devices, TOKENS, K).astype(np.int32)
        one = partial(place, placement=placement, slots_per_device=G * S // devices)
        slots = np.stack([jax.vmap(one, axis_name=EXPERT)(e) for e in experts])
        check_report(run, want, sharded, slots=slots, placement=placement)
        if name == "everywhere":
            assert int(run[2].counters.rows_host) == 0, "every expert is at hand"
        compiled.add(sharded.jitted._cache_size())
    assert len(compiled) == 1, "another placement must not recompile"


def test_placements_in_the_layer(rng):
    check_placements(rng, (1, 4, 1), "all_to_all")


@pytest.mark.slow
@pytest.mark.parametrize("shape,mode", [((1, 4, 1), "ring"), ((2, 2, 2), "all_to_all")])
def test_placements_in_other_modes(rng, shape, mode):
    check_placements(rng, shape, mode)


@pytest.mark.slow
def test_no_placement_is_the_home_placement(rng):
    """Without a placement the layer computes the same bits as with the contiguous one."""
    sharded = sharded_layer((1, 4, 1), moe("all_to_all"), D, TOKENS)
    weights = random_weights(rng, sharded.config, D)
    x, ct = rng.normal(size=(2, sharded.num_tokens, D)).astype(np.float32)
    plain = sharded(weights, x, ct)
    placed = sharded(weights, x, ct, placement=contiguous(E, 4))
    assert np.array_equal(plain[0], placed[0])
    for name, grad in plain[3].items():
        assert np.array_equal(grad, placed[3][name]), name
