"""Which replica serves an assignment: the nearest, and none overloaded where that can be."""

from functools import partial
from itertools import chain, combinations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.placement import choice
from moejax.placement.arrays import from_slots
from moejax.placement.choice import place
from moejax.placement.choice_reference import at_random, part, reference
from moejax.placement.evaluate import measure
from moejax.placement.topology import Topology
from pallas_kernels.balance.reference import part_of
from sharding.mesh import DATA, EXPERT, MeshShape, make_mesh

G, S, E, K, R = 8, 5, 32, 4, 3
HOSTS = (0, 0, 0, 1, 1, 1, 2, 2)


def random_slots(rng, filled=G * S - 1):
    """Every expert once, then popular ones again, at most R times and on different devices."""
    device_E = rng.permutation(np.repeat(np.arange(G), E // G))
    held = [np.flatnonzero(device_E == g).tolist() for g in range(G)]
    popular = rng.permutation(E)[: E // 2]
    while sum(map(len, held)) < filled:
        g, e = rng.choice([g for g in range(G) if len(held[g]) < S]), rng.choice(popular)
        if e not in held[g] and sum(e in h for h in held) < R:
            held[g].append(e)
    return np.concatenate([rng.permutation(h + [-1] * (S - len(h))) for h in held])


def random_experts(rng, tokens, skew, none=0.1):
    """[G, T, K], distinct, some of them none; the last experts are the most popular."""
    race = -np.log(rng.random((G, tokens, E))) / np.exp(skew * np.arange(E) / E)
    experts = np.argsort(race, axis=-1)[..., :K].astype(np.int32)
    return np.where(rng.random(experts.shape) < none, -1, experts)


def place_all(experts_GTK, slots, hosts=None, jitted=None):
    placement = from_slots(slots, E, max_replicas=R)
    return np.asarray((jitted or program(hosts))(experts_GTK, placement))


def program(hosts=None, few=0):
    def run(experts_GTK, placement):
        one = partial(place, placement=placement, slots_per_device=S, hosts=hosts, few=few)
        return jax.vmap(one, axis_name=EXPERT)(experts_GTK)

    return jax.jit(run)


def twin(experts_GTK, slots, hosts=None, **options):
    tokens = experts_GTK.shape[1]
    rows = experts_GTK.reshape(-1, experts_GTK.shape[2])
    source = np.repeat(np.arange(len(experts_GTK)), tokens)
    chosen = reference(rows, slots, Topology(G, S, hosts), source, **options)
    return chosen.reshape(experts_GTK.shape)


def loads(slots_GTK):
    return np.bincount(slots_GTK[slots_GTK >= 0] // S, minlength=G)


def least_load(experts, slots):
    """The least possible load of the fullest device: the densest set of devices (duality)."""
    count_E = np.bincount(experts[experts >= 0], minlength=E)
    held = [set((np.flatnonzero(slots == e) // S).tolist()) for e in range(E)]
    sets = chain.from_iterable(combinations(range(G), n) for n in range(1, G + 1))
    return max(sum(c for c, h in zip(count_E, held) if h <= set(u)) / len(u) for u in sets)


@pytest.mark.parametrize("hosts", [None, HOSTS])
def test_equal_to_the_twin(rng, hosts):
    """To the last slot, whatever the skew and the placement, by one compiled function."""
    jitted = program(hosts)
    for skew in (0.0, 2.0, 5.0):
        slots = random_slots(rng, filled=rng.integers(E + 1, G * S + 1))
        experts = random_experts(rng, 96, skew, none=rng.choice([0.0, 0.3]))
        got = place_all(experts, slots, jitted=jitted)
        assert np.array_equal(got, twin(experts, slots, hosts))
        assert np.array_equal(got < 0, experts < 0)
        assert np.array_equal(slots[got[got >= 0]], experts[experts >= 0])
    nothing = np.full((G, 96, K), -1, np.int32)
    assert (place_all(nothing, slots, jitted=jitted) == -1).all()
    assert jitted._cache_size() == 1, "another placement must not recompile"


def test_limited_devices_equal_to_the_twin(rng):
    """Tokens that may use some devices only: none leaves these; loads even out as they allow."""

    def run(experts_GTK, placement, devices_GTG):
        def one(experts_TK, devices_TG):
            return place(experts_TK, placement, S, HOSTS, devices_TG, few=0)

        return jax.vmap(one, axis_name=EXPERT)(experts_GTK, devices_GTG)

    jitted, helped = jax.jit(run), 0
    for share in (0.0, 0.3, 0.8):
        slots = random_slots(rng)
        experts = random_experts(rng, 96, 3.0)
        open_GTG = np.zeros((G, 96, G), bool)
        for where in np.ndindex(G, 96):  # a copy of each expert, and some more devices
            for e in experts[where]:
                open_GTG[where][rng.choice(np.flatnonzero(slots == e)) // S if e >= 0 else 0] = True
            open_GTG[where] |= rng.random(G) < share
        got = np.asarray(jitted(experts, from_slots(slots, E, max_replicas=R), open_GTG))
        rows = open_GTG.reshape(-1, G)
        assert np.array_equal(got, twin(experts, slots, HOSTS, devices_NG=rows))
        assert np.array_equal(slots[got[got >= 0]], experts[experts >= 0])
        used = np.take_along_axis(open_GTG, np.maximum(got, 0) // S, axis=-1)
        assert used[got >= 0].all() and (got[experts < 0] == -1).all()
        before = twin(experts, slots, HOSTS, correct=False, devices_NG=rows)
        assert loads(got).max() <= loads(before).max()
        helped += loads(got).max() < loads(before).max()
        everywhere = jitted(experts, from_slots(slots, E, max_replicas=R), open_GTG | True)
        assert np.array_equal(everywhere, twin(experts, slots, HOSTS))
    assert helped, "no case had anything to correct"


def test_loads_are_evened_out_where_they_can_be(rng):
    jitted = program()
    cases = helped = 0
    while cases < 12 or not helped:  # one draw in five has something to correct
        cases += 1
        assert cases < 200, "no case had anything to correct"
        slots = random_slots(rng)
        experts = random_experts(rng, 512, rng.uniform(0, 2), none=0.0)
        got = loads(place_all(experts, slots, jitted=jitted))
        mean, least = experts.size / G, least_load(experts, slots)
        assert least <= got.max() <= max(1.05 * mean, least) * 1.02 + 4
        before = loads(twin(experts, slots, correct=False)).max()
        helped += before > 1.1 * mean and least < 1.05 * mean


def test_nearest_without_correction(rng, monkeypatch):
    """The own device, else one the token goes to anyway, else its own host; ties are dealt."""
    monkeypatch.setattr(choice, "ROUNDS", 0)
    slots = random_slots(rng)
    experts = random_experts(rng, 64, 1.0)
    got = place_all(experts, slots, HOSTS)
    held = [set((np.flatnonzero(slots == e) // S).tolist()) for e in range(E)]
    rows = 0
    for g, tokens in enumerate(experts):
        for row, chosen in zip(tokens, got[g] // S):
            used = [(held[e], d) for e, d in zip(row, chosen) if e >= 0]
            forced = {d for h, d in used if len(h) == 1} | {g}
            near = {HOSTS[d] for d in forced}
            for options, device in used:
                if g in options:
                    assert device == g
                elif options & forced:
                    assert device in {d for _, d in used} and device in options
                elif {HOSTS[d] for d in options} & near:
                    others = {d for h, d in used if h is not options} | {g}
                    assert device in others or HOSTS[device] in near | {HOSTS[d] for d in others}
            rows += len({d for _, d in used} - {g})
    source = np.repeat(np.arange(G), 64)
    topology = Topology(G, S, HOSTS)
    dealt = measure(experts.reshape(-1, K), slots, topology, source, at_random)
    assert rows / (G * 64) < 0.97 * dealt.remote_sends

    one = program()
    for e in range(E):  # all tokens ask for one expert: replicas elsewhere get equal shares
        alone = np.full((G, 64, K), -1, np.int32) + (e + 1) * (np.arange(K) == 0)
        asked = place_all(alone, slots, jitted=one)
        holders = np.flatnonzero(slots == e)
        for g in set(range(G)) - held[e]:
            shares = np.bincount(asked[g][:, 0], minlength=G * S)[holders]
            assert shares.max() - shares.min() <= 1


def test_cover_the_token_with_few_devices():
    """Open experts join each other where one device holds several."""
    slots = np.full((G, S), -1)
    for expert, devices in enumerate([(1, 2), (2, 3), (3, 4)]):
        slots[list(devices), expert] = expert
    slots[6, :] = np.arange(3, 8)
    rest = np.setdiff1d(np.arange(E), np.arange(8))
    slots[5], slots[7] = rest[:S], rest[S : 2 * S]
    slots = slots.reshape(-1)
    free = np.flatnonzero(slots < 0)
    slots[free[: len(rest) - 2 * S]] = rest[2 * S :]
    experts = np.full((G, 4, K), -1, np.int32)
    experts[0, :, :2] = [0, 1]  # both on device 2
    got = twin(experts, slots, correct=False)[0, :, :2] // S
    assert (got == 2).all()


def test_each_data_row_is_a_batch_of_its_own(rng):
    """In the shard_map: loads are those of the devices along `expert`, not along `data`."""
    mesh, devices, tokens = make_mesh(MeshShape(data=2, expert=4)), 4, 256
    slots = np.array([0, 1, 4, 2, 3, 5, 4, 5, 0, 1, 2, -1])
    experts = np.argsort(rng.random((2, devices, tokens, 6)), axis=-1)[..., :2].astype(np.int32)
    experts[0][experts[0] == 3] = -1
    experts[1][experts[1] == 0] = -1
    placement = from_slots(slots, 6)
    run = jax.shard_map(
        partial(place, slots_per_device=3, few=0),
        mesh=mesh,
        in_specs=(P((DATA, EXPERT)), P()),
        out_specs=P((DATA, EXPERT)),
        check_vma=False,
    )
    got = np.asarray(jax.jit(run)(experts.reshape(-1, 2), placement)).reshape(experts.shape)
    source = np.repeat(np.arange(devices), tokens)
    for row in range(2):
        want = reference(experts[row].reshape(-1, 2), slots, Topology(devices, 3), source)
        assert np.array_equal(got[row].reshape(-1, 2), want)


def test_one_replica_or_few_rows_cost_no_sums():
    def text(width, few=0):
        placement = from_slots(np.r_[np.arange(E), [-1] * (G * S - E)], E, max_replicas=width)
        one = partial(place, placement=placement, slots_per_device=S, few=few)
        return str(jax.make_jaxpr(jax.vmap(one, axis_name=EXPERT))(np.zeros((G, 4, K), np.int32)))

    sums = {"psum", "sort", "while", "scan"}
    assert not sums & set(text(1).replace("[", " ").split())
    assert sums & set(text(2).replace("[", " ").split())
    least = 4 * K / S  # assignments of a slot, of 4 tokens
    assert not sums & set(text(2, few=least + 1).replace("[", " ").split())
    assert sums & set(text(2, few=least).replace("[", " ").split())


def test_few_rows_stay_with_the_nearest(rng):
    """Where no slot has enough to do, loads are nobody's concern."""
    few = 4 * K / S + 1
    jitted, cases, helped = program(few=few), 0, False
    while cases < 4 or not helped:
        cases += 1
        assert cases < 100, "no case had anything to correct"
        slots, experts = random_slots(rng), random_experts(rng, 4, 5.0)
        got = place_all(experts, slots, jitted=jitted)
        assert np.array_equal(got, twin(experts, slots, correct=False))
        # The rule looks at this batch alone: the same tokens among others are corrected.
        many = np.tile(experts, (1, 32, 1))
        corrected = place_all(many, slots, jitted=jitted)
        assert np.array_equal(corrected, twin(many, slots))
        helped |= not np.array_equal(corrected, twin(many, slots, correct=False))


def test_parts_neither_overflow_nor_drift(rng):
    """⌊count · part / whole + up / of⌋ in int32, against Python's integers."""
    whole = np.exp(rng.uniform(0, np.log(2**30), 500)).astype(np.int32) + 1
    count, some = (rng.random((2, 500)) * (whole + 1)).astype(np.int32)
    up, of = rng.integers(0, 8, 500).astype(np.int32), 8
    got = np.asarray(part_of(count, some, whole, up, of))
    assert np.array_equal(got, part(*(a.astype(np.int64) for a in (count, some, whole, up)), of))
    exact = np.array([(int(c) * int(p) * of + int(u) * int(w)) // (int(w) * of)
                      for c, p, w, u in zip(count, some, whole, up)])  # fmt: skip
    assert (np.abs(got - exact) <= 1 + 2**-13 * count).all() and (got[whole < 2**15] ==
            exact[whole < 2**15]).all()  # fmt: skip
