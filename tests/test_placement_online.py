"""Rebalancing under drift: few moves, only when they pay, and nearly as good as a new plan."""

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.placement.evaluate import devices_of, mean_of, measure_trace
from moejax.placement.generator import drift, generate, make_traffic
from moejax.placement.online import rebalance
from moejax.placement.planner import plan
from moejax.placement.statistics import Statistics, statistics_of
from moejax.placement.topology import Topology


def test_follows_drift():
    """At most 4 of 64 experts move each time; fan-out stays within 1.5 % of planning anew."""
    topology = Topology.even(64, 8)
    traffic = make_traffic(64, 3, share=0.8, seed=3)
    statistics = statistics_of(generate(traffic, 8000, seed=100))
    slots_LP = frozen_LP = plan(statistics, topology).slots_LP
    ratios, moved = [], 0
    for period in range(6):
        traffic = drift(traffic, 0.02, seed=period)
        window = statistics_of(generate(traffic, 8000, seed=200 + period))
        statistics = statistics.decay(0.5).plus(window)
        found = rebalance(slots_LP, statistics, topology)
        assert (found.moved_L <= 4).all()
        changed = devices_of(slots_LP, topology, 64) != devices_of(found.slots_LP, topology, 64)
        assert np.array_equal(changed.sum(1), found.moved_L)
        slots_LP, moved = found.slots_LP, moved + found.moved_L.sum()
        unseen = generate(traffic, 4000, seed=300 + period)
        anew_LP = plan(statistics, topology).slots_LP
        online, anew, frozen = (
            mean_of(measure_trace(unseen, s, topology)) for s in (slots_LP, anew_LP, frozen_LP)
        )
        ratios.append(online.fanout / anew.fanout)
    assert np.mean(ratios) < 1.01 and max(ratios) < 1.015
    assert online.fanout < frozen.fanout and moved > 0


def pairs_of_four(loads) -> tuple[Statistics, np.ndarray, Topology]:
    """Experts 0 1 | 2 3 | 4 5 | 6 7, each with its neighbour; placed so."""
    pairs = np.zeros((1, 8, 8), np.float32)
    for e in range(0, 8, 2):
        pairs[0, e, e + 1] = pairs[0, e + 1, e] = 10
    load = np.array([loads], np.float32)
    present = np.arange(8, dtype=np.int32)[None]
    return Statistics(pairs, load, np.ones(1, np.float32)), present, Topology(4, 2)


def test_leaves_what_is_well():
    statistics, present, topology = pairs_of_four([5, 5, 5, 5, 5, 5, 5.5, 5.4])
    found = rebalance(present, statistics, topology, load_trigger=1.1)
    assert np.array_equal(found.slots_LP, present) and found.moved_L[0] == 0
    assert found.cut_L[0] == 0


def test_load_triggers():
    """Apart from the trigger, nothing would part the pairs."""
    statistics, present, topology = pairs_of_four([9, 9, 1, 1, 5, 5, 5, 5])
    found = rebalance(present, statistics, topology, swaps=1, load_trigger=1.1)
    assert found.moved_L[0] == 2 and found.load_L[0] == pytest.approx(1)
    assert found.slots_LP[0, 4:].tolist() == [4, 5, 6, 7]
    calm = rebalance(present, statistics, topology, swaps=1, load_trigger=2.0)
    assert np.array_equal(calm.slots_LP, present)


def test_pairs_trigger():
    statistics, _, topology = pairs_of_four([5] * 8)
    apart = np.array([[0, 2, 1, 3, 4, 5, 6, 7]], np.int32)
    found = rebalance(apart, statistics, topology, swaps=1)
    assert found.cut_L[0] == 0 and found.moved_L[0] == 2
    stays = rebalance(apart, statistics, topology, swaps=1, cut_trigger=1.0)
    assert np.array_equal(stays.slots_LP, apart)
    none = rebalance(apart, statistics, topology, swaps=0)
    assert np.array_equal(none.slots_LP, apart)


def test_circle_of_three():
    """Three experts go round where two swaps of four would be needed."""
    pairs = np.zeros((1, 6, 6), np.float32)
    for e, f in ((0, 3), (1, 4), (2, 5)):
        pairs[0, e, f] = pairs[0, f, e] = 10
    statistics = Statistics(pairs, np.ones((1, 6), np.float32), np.ones(1, np.float32))
    present = np.array([[0, 5, 1, 3, 2, 4]], np.int32)
    found = rebalance(present, statistics, Topology(3, 2), swaps=2)
    assert found.cut_L[0] == 0 and found.moved_L[0] == 3


def test_unattainable_load(rng):
    """One expert with most of the load triggers nothing: no move would help."""
    statistics, present, topology = pairs_of_four([90, 1, 2, 2, 2, 2, 2, 2])
    found = rebalance(present, statistics, topology)
    assert np.array_equal(found.slots_LP, present) and not found.load_kept_L[0]


@pytest.mark.parametrize(
    "change,told",
    [
        ({"load_trigger": 1.01}, "load_trigger"),
        ({"load_cap": 0.5}, "load_cap"),
        ({"swaps": -1}, "swaps"),
        ({"cut_trigger": -1.0}, "cut_trigger"),
        ({"host_weight": float("inf")}, "host_weight"),
    ],
)
def test_refuses(change, told):
    statistics, present, topology = pairs_of_four([5] * 8)
    with pytest.raises(UserError, match=told):
        rebalance(present, statistics, topology, **change)
    with pytest.raises(UserError, match="once"):
        rebalance(present * 0, statistics, topology)
