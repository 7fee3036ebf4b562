"""Replicas: where second copies go, what they save, and that they even out loads."""

from functools import partial
from itertools import combinations, product

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.placement import replicas
from moejax.placement.choice_reference import at_random, reference, settle
from moejax.placement.evaluate import mean_of, measure
from moejax.placement.generator import generate, make_traffic
from moejax.placement.replicas import add_replicas
from moejax.placement.statistics import statistics_of
from moejax.placement.topology import Topology


def traffic(rng, experts=64, layers=1, share=0.8, tokens=8192):
    """A trace's statistics, further tokens of the same kind, and clusters one after the other."""
    seed = int(rng.integers(1 << 30))
    drawn = make_traffic(experts, layers, share=share, seed=seed)
    statistics = statistics_of(generate(drawn, tokens, seed=seed + 1))
    order = np.argsort(drawn.cluster_LE, axis=1, kind="stable").astype(np.int32)
    return statistics, generate(drawn, tokens, seed=seed + 2).experts_NLK, order


def checked(slots_LP, planned_LP, topology, most):
    """Base slots stay, no expert twice on a device, all room is used if copies are not limited."""
    devices, slots = topology.devices, topology.slots
    few = planned_LP.shape[1] // devices
    assert slots_LP.dtype == np.int32 and slots_LP.shape == (len(planned_LP), devices * slots)
    for slots_GS, planned_GS in zip(
        slots_LP.reshape(-1, devices, slots), planned_LP.reshape(-1, devices, few)
    ):
        kept = planned_GS >= 0
        assert np.array_equal(slots_GS[:, :few][kept], planned_GS[kept])
        held = [row[row >= 0] for row in slots_GS]
        assert all(len(set(row)) == len(row) <= room for row, room in zip(held, topology.room_G))
        counts = np.bincount(np.concatenate(held))
        assert counts.max() <= most and counts.min() >= 1
        if most >= devices:
            assert [len(row) for row in held] == topology.room_G.tolist()


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_fewer_sends_at_even_load(rng, share):
    """A quarter more slots: fewer sends, no batch above 1.07; random copies do far less."""
    statistics, experts_NLK, planned = traffic(rng, share=share)
    topology, source = Topology(8, 10), np.arange(4096) % 8
    slots_LP = add_replicas(planned, statistics, topology)
    checked(slots_LP, planned, topology, 4)

    def of(slots_P, topology, choose=None):
        batches = np.split(experts_NLK[:, 0], 2)
        return mean_of([measure(b, slots_P, topology, source, choose) for b in batches])

    alone = of(planned[0], Topology(8, 8))
    with_copies = of(slots_LP[0], topology, reference)
    assert with_copies.remote_sends < 0.93 * alone.remote_sends
    assert with_copies.load_max_mean <= 1.07
    assert with_copies.remote_sends < 0.9 * of(slots_LP[0], topology, at_random).remote_sends
    slots_GS = np.concatenate([planned.reshape(8, 8), np.full((8, 2), -1)], axis=1)
    for slots_S in slots_GS:
        slots_S[8:] = rng.choice(np.setdiff1d(np.arange(64), slots_S), 2, replace=False)
    anyhow = of(slots_GS.reshape(-1), topology, reference)
    assert with_copies.remote_sends < 0.97 * anyhow.remote_sends


def test_room_copies_and_layers(rng):
    """Room of each device, fewer copies than slots, empty base slots, several layers, the seed."""
    statistics, _, order = traffic(rng, experts=30, layers=3, tokens=2000)
    planned = np.full((3, 4, 9), -1, np.int32)
    for row, own in zip(planned, order):
        for device, part in enumerate(np.split(own, [9, 16, 23])):
            row[device, : len(part)] = part
    planned = planned.reshape(3, -1)
    for room, most in (((12, 9, 8, 12), 4), (None, 4), (None, 2), (None, 1)):
        topology = Topology(4, 12, room=room)
        slots_LP = add_replicas(planned, statistics, topology, max_replicas=most)
        checked(slots_LP, planned, topology, most)
        again = add_replicas(planned, statistics, topology, max_replicas=most)
        assert np.array_equal(slots_LP, again)
    one = add_replicas(planned[1:2], statistics.layer(1), Topology(4, 12))
    assert np.array_equal(one[0], add_replicas(planned, statistics, Topology(4, 12))[1])


def test_near_the_best_by_its_own_measure(rng):
    """Among all ways to fill three extra slots, by the model: good always, near the best mostly."""
    ratios = []
    for _ in range(7):
        statistics, _, planned = traffic(rng, experts=12, tokens=4000)
        topology = Topology(3, 5)
        base = np.full((3, 5), -1, np.int32)
        base[:, :4] = planned.reshape(3, 4)
        costs = {}
        for new in product(*(np.setdiff1d(np.arange(12), row).tolist() for row in base)):
            filling = replicas._Filling(base, statistics, topology, 1.05, 1.0)
            filling.has_EG[list(new), [0, 1, 2]] = True
            filling.refresh()
            costs[new] = filling.cost
        got = add_replicas(planned, statistics, topology)[0].reshape(3, 5)[:, 4]
        cost, all_costs = costs[tuple(got.tolist())], np.array(list(costs.values()))
        assert cost < np.median(all_costs)
        ratios.append(cost / all_costs.min())
    assert np.median(ratios) < 1.1


def test_hosts_count(rng):
    """Rows between hosts become fewer when they weigh more."""
    statistics, experts_NLK, planned = traffic(rng, share=0.5)
    topology = Topology(8, 10, hosts=(0, 0, 0, 0, 1, 1, 1, 1))
    choose = partial(reference, correct=False)
    away = {
        weight: measure(
            experts_NLK[:, 0],
            add_replicas(planned, statistics, topology, host_weight=weight)[0],
            topology,
            np.arange(len(experts_NLK)) % 8,
            choose,
        ).remote_hosts
        for weight in (0.0, 20.0)
    }
    assert away[20.0] < away[0.0] + 0.01


def test_the_model(rng):
    """Shares sum to 1; a lone copy pays E[1 / (1 + n)] of a row, n ~ Poisson(m)."""
    has = rng.random((50, 6)) < 0.4
    has[np.arange(50), rng.integers(6, size=50)] = True
    x = replicas._shares(has, rng.exponential(size=has.shape))
    assert np.allclose(x.sum(1), 1) and (x[~has] == 0).all()
    m = rng.exponential(size=(1, 6))
    lone = np.arange(6)[None] == 2
    mean = np.mean(1 / (1 + rng.poisson(m[0, 2], 400_000)))
    assert np.isclose(replicas._rows(lone, m, np.ones(1)), 5 / 6 * mean, rtol=0.01)
    for g, h in combinations(range(6), 2):  # neither the own device nor one that is gone to
        both = np.isin(np.arange(6), (g, h))[None]
        own = rng.integers(6, size=400_000)
        met = rng.poisson(m[0, g], own.size) + rng.poisson(m[0, h], own.size)
        want = np.mean((own != g) & (own != h) & (met == 0))
        assert np.isclose(replicas._rows(both, m, np.ones(1)), want, rtol=0.05, atol=2e-3)


def test_loads_even_out_as_in_the_choice(rng):
    """The planner's rounds, in shares and several at once, end where the choice's do."""
    shape = experts, most = 64, 3
    device_ER = np.argsort(rng.random((experts, 8)), axis=1)[:, :most]
    real_ER = np.arange(most) < rng.choice([1, 1, 1, 2, 3], size=(experts, 1))
    load_NER = np.exp(0.7 * rng.normal(size=(20, experts, 1))) * rng.random((20, *shape)) * real_ER
    got_N = replicas._evened(load_NER, device_ER, real_ER)
    off = []
    for load_ER, got in zip(load_NER, got_N):
        count_ER = settle(np.round(load_ER * 1e5).astype(np.int64), device_ER, real_ER, 8)
        load_G = np.bincount(device_ER.reshape(-1), count_ER.reshape(-1), minlength=8)
        off.append(abs(got - load_G.max() / load_G.mean()))
    assert np.median(off) < 1e-3 and max(off) < 0.03  # whole numbers may tie, and part ways


def test_refused(rng):
    statistics, _, planned = traffic(rng, experts=8, tokens=200)
    topology = Topology(4, 3)
    for wrong in (planned[:, :-1], planned[0], np.concatenate([planned, planned])):
        with pytest.raises(UserError, match=r"slots of shape .* they are \[1, 4 · S\], S at most"):
            add_replicas(wrong, statistics, topology)
    with pytest.raises(UserError, match="must hold each of the 8 experts once; plan without"):
        add_replicas(np.zeros_like(planned), statistics, topology)
    with pytest.raises(UserError, match="device 1 holds more than its room of 1; plan for this"):
        add_replicas(planned, statistics, Topology(4, 3, room=(3, 1, 3, 3)))
    with pytest.raises(UserError, match=r"max_replicas=0, load_cap=1.05: both must be at least 1"):
        add_replicas(planned, statistics, topology, max_replicas=0)
