"""Names of alike devices: as many experts as possible stay where they are."""

import itertools

import numpy as np
import pytest
from test_placement_plan import all_placements

from moejax.placement.evaluate import devices_of
from moejax.placement.generator import generate, make_traffic
from moejax.placement.planner import plan
from moejax.placement.relabel import arrange, assign, relabel
from moejax.placement.statistics import statistics_of
from moejax.placement.topology import Topology


def test_assign_by_brute_force(rng):
    for size in (1, 2, 3, 5, 6):
        for value in (rng.normal(size=(size, size)), rng.integers(0, 4, (size, size)) * 1.0):
            column = assign(value)
            best = max(
                sum(value[i, j] for i, j in enumerate(p))
                for p in itertools.permutations(range(size))
            )
            assert sorted(column.tolist()) == list(range(size))
            assert value[np.arange(size), column].sum() == pytest.approx(best)


@pytest.mark.parametrize(
    "topology",
    [
        Topology(4, 3),
        Topology(4, 3, hosts=(0, 1, 1, 0)),
        Topology(4, 3, hosts=(0, 0, 0, 1), speeds=(1, 1, 2, 1)),
        Topology(4, 3, speeds=(1, 2, 1, 2), room=(3, 3, 3, 2)),
    ],
    ids=str,
)
def test_relabel_by_brute_force(rng, topology):
    """The most experts stay, of all exchanges of alike devices, of hosts among themselves."""
    placements = all_placements(8, topology)
    plan_E, present_E = placements[rng.integers(len(placements), size=2)]
    kind = list(zip(topology.speed_G, topology.room_G))
    host = topology.host_G
    best = 0
    for p in itertools.permutations(range(4)):
        alike = all(kind[g] == kind[p[g]] for g in range(4))
        together = all(
            (host[a] == host[b]) == (host[p[a]] == host[p[b]])
            for a, b in itertools.combinations(range(4), 2)
        )
        if alike and together:
            best = max(best, int((np.array(p)[plan_E] == present_E).sum()))
    found = relabel(plan_E, present_E, topology)
    assert (found == present_E).sum() == best
    assert len(set(zip(plan_E.tolist(), found.tolist()))) == len(set(plan_E.tolist()))


def test_arrange_keeps_slots(rng):
    topology = Topology(3, 4)
    present = rng.permutation(np.r_[np.arange(10), [-1, -1]]).astype(np.int32)
    device = devices_of(present[None], topology, 10)[0]
    assert np.array_equal(arrange(device, topology, present), present)
    a, b = (int(np.flatnonzero(device == g)[0]) for g in (0, 2))
    device[[a, b]] = device[[b, a]]
    changed = arrange(device, topology, present)
    # The two that moved are elsewhere, perhaps where nobody was; all others keep their slots.
    stay = ~np.isin(present, [a, b, -1])
    assert np.array_equal(changed[stay], present[stay])
    assert np.array_equal(devices_of(changed[None], topology, 10)[0], device)


def test_replanning_keeps_labels(rng):
    """The plan of the same traffic moves nothing, however the devices are called."""
    statistics = statistics_of(generate(make_traffic(16, 2, seed=int(rng.integers(99))), 3000))
    topology = Topology.even(16, 4)
    first = plan(statistics, topology, load_cap=1.5)
    renamed = first.slots_LP.reshape(2, 4, 4)[:, rng.permutation(4)].reshape(2, 16)
    again = plan(statistics, topology, load_cap=1.5, present_LP=renamed)
    same = again.cut_L >= first.cut_L - 1e-6
    assert (again.moved_L[same] == 0).all() and (again.cut_L <= first.cut_L + 1e-6).all()
