"""The controller: what it answers to traffic, and what never changes."""

from __future__ import annotations

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.placement.arrays import home_slots
from moejax.placement.controller import LEAST_TOKENS, Controller, stacked
from moejax.placement.evaluate import mean_of, measure_trace
from moejax.placement.generator import drift, generate, make_traffic
from moejax.placement.statistics import Statistics, statistics_of

E, L, G = 16, 2, 4


def traffic(seed=0):
    return make_traffic(E, L, choices=4, share=0.8, cluster_size=4, seed=seed)


def counted(traffic, tokens=4000, seed=0):
    return statistics_of(generate(traffic, tokens, seed=seed))


def test_few_tokens_change_nothing():
    controller = Controller(E, L, G, replicas=1)
    few = counted(traffic(), tokens=int(LEAST_TOKENS) - 1)
    told = controller.look(few)
    assert (told.kind, told.moved, told.replicas) == ("waits", 0, 0)
    slots = controller.slots_LP.reshape(L, G, -1)
    assert (slots[:, :, -1] == -1).all()  # an empty slot a device
    home = home_slots(E, G)
    assert np.array_equal(slots[:, :, :-1].reshape(L, -1)[:, home], np.tile(np.arange(E), (L, 1)))


@pytest.mark.parametrize("extra", [0, 1])
def test_a_plan_first_then_few_moves(extra):
    now = traffic()
    controller = Controller(E, L, G, replicas=extra)
    before, unseen = controller.slots_LP, generate(now, 4000, seed=7)
    first = controller.look(counted(now))
    assert first.kind == "plan" and first.cut[1] < first.cut[0] and first.load[1] <= 1.05 + 1e-3
    assert first.replicas == extra * G * L
    topology = controller.topology
    if extra == 0:
        old, new = (
            mean_of(measure_trace(unseen, slots, topology))
            for slots in (before, controller.slots_LP)
        )
        assert new.remote_sends < 0.9 * old.remote_sends

    again = controller.look(counted(now))
    assert (again.kind, again.moved) == ("none", 0)

    for step in range(3):
        slots = controller.slots_LP
        told = controller.look(counted(drift(now, 0.4, seed=step), seed=step))
        assert told.kind in ("moves", "none") and told.moved <= L * 4
        if told.kind == "none":
            assert np.array_equal(slots, controller.slots_LP)
        for slots_P in controller.slots_LP:
            assert set(slots_P[slots_P >= 0]) == set(range(E))
            for slots_S in slots_P.reshape(G, -1):
                held = slots_S[slots_S >= 0]
                assert len(set(held)) == len(held)


def test_arrays_keep_their_shapes():
    controller = Controller(E, L, G, replicas=2, max_replicas=3)
    shapes = []
    for statistics in (None, counted(traffic())):
        if statistics is not None:
            assert controller.look(statistics).kind == "plan"
        placement = stacked(controller.slots_LP, E, controller.max_replicas)
        shapes.append([array.shape for array in vars(placement).values()])
    assert shapes[0] == shapes[1] == [(L, G * (E // G + 2)), (L, E, 3), (L, E)]
    assert Controller(E, L, G).max_replicas == 1


def test_experts_nobody_chose():
    """All of a layer's load on few experts: no division by nothing, and still a placement."""
    load = np.zeros((L, E), np.float32)
    load[:, :2] = 5000
    pairs = np.zeros((L, E, E), np.float32)
    pairs[:, 0, 1] = pairs[:, 1, 0] = 5000
    controller = Controller(E, L, G, replicas=1)
    controller.look(Statistics(pairs, load, np.full(L, 5000, np.float32)))
    assert all(set(s[s >= 0]) == set(range(E)) for s in controller.slots_LP)


def test_refusals():
    for extra, most in (-1, 12), (13, 12):
        with pytest.raises(UserError, match=f"replicas={extra}: must lie between 0 and {most}"):
            Controller(E, L, G, replicas=extra)
    with pytest.raises(UserError, match="num_experts=4 on expert=8 devices"):
        Controller(4, L, 8)
