"""The parts of offloading: host store, slots, transfers, groups of experts, division of memory."""

import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from draws import draws
from fewer_experts_support import model_of
from offload_support import SOFTMAX, WORKS, Offloaded, random_choice, replaced

from moejax.errors import UserError
from moejax.offload.config import OffloadConfig
from moejax.offload.parts import dense_bytes
from moejax.offload.room import divide, pages_that_fit
from moejax.offload.sizes import parse_bytes
from moejax.offload.slots import DeviceSlots, insert
from moejax.offload.store import host_memory
from moejax.offload.transfers import Transfers
from moejax.shared_bank import expanded

E, LAYERS = 8, 3


@pytest.fixture(scope="module")
def small():
    return Offloaded(SOFTMAX, draws(__name__))


def test_experts_lie_on_the_host(small):
    kind = host_memory(jax.devices()[0])
    assert kind == "pinned_host" and set(small.store.banks) == set(range(LAYERS))
    for layer, bank in small.store.banks.items():
        for expert in range(E):
            arrays = small.store.expert(layer, expert)
            assert {array.sharding.memory_kind for array in arrays} == {kind}
            for name, array in zip(bank.names, arrays, strict=True):
                want = small.flat[f"params/layers.{layer}.moe.bank.{name}"][expert]
                np.testing.assert_array_equal(array, want)
            assert sum(array.nbytes for array in arrays) == bank.expert_bytes
    experts = sum(a.size for name, a in small.flat.items() if ".moe.bank." in name)
    others = sum(a.size for name, a in small.flat.items() if ".moe.bank." not in name)
    assert dense_bytes(small.model.parts) == 4 * others
    assert sum(E * bank.expert_bytes for bank in small.store.banks.values()) == 4 * experts


@pytest.mark.parametrize("kind", ["up", "basis"])
def test_experts_that_share_are_stored_whole(rng, kind):
    small = Offloaded(model_of(kind), rng)
    prefix = "params/layers.1.moe.bank."
    parts = {n.removeprefix(prefix): a for n, a in small.flat.items() if n.startswith(prefix)}
    own, common = small.model._shared()
    whole = expanded({n: parts[n] for n in own}, {n: parts[n] for n in common})
    for expert in rng.integers(0, 9, 3):
        named = dict(zip(small.store.banks[1].names, small.store.expert(1, int(expert))))
        np.testing.assert_allclose(named["w_in"], whole.w_in_SDNH[expert], atol=1e-6)
        np.testing.assert_allclose(named["w_out"], whole.w_out_SHD[expert], atol=1e-6)


def test_slots(small, rng):
    bank = small.store.banks[0]
    slots = DeviceSlots(bank, 3, small.model.parts.blueprint.mesh)
    transfers = Transfers(small.store, small.model.parts.blueprint.mesh, 0)
    compiled, held = None, {}
    for _ in range(10):
        slot, expert = int(rng.integers(3)), int(rng.integers(E))
        transfers.ask(0, [expert])
        slots.put(slot, expert, transfers.take(0, expert))
        held[slot] = expert
        compiled = compiled or insert._cache_size()
    assert insert._cache_size() == compiled
    for slot, expert in held.items():
        for got, want in zip(slots.get(slot), small.store.expert(0, expert), strict=True):
            np.testing.assert_array_equal(got, want)


def test_transfers(small):
    mesh, size = small.model.parts.blueprint.mesh, small.store.banks[0].expert_bytes
    transfers = Transfers(small.store, mesh, 2 * size)
    assert transfers.guess(1, [5, 3, 4]) == 2  # as its bytes allow, the best first
    assert transfers.guess(1, [6]) == 0  # one group a layer
    assert transfers.guessed(1, 5) and not transfers.guessed(1, 4)
    assert transfers.guess(2, [7]) == 1
    assert transfers.guess(0, [1]) == 0  # two buffers in turn
    transfers.ask(1, [3, 6])
    assert transfers.moved.asked_bytes == size and transfers.moved.guessed_bytes == 3 * size
    for expert in 3, 6:
        for got, want in zip(transfers.take(1, expert), small.store.expert(1, expert)):
            assert got.sharding.memory_kind == jax.devices()[0].default_memory().kind
            np.testing.assert_array_equal(got, want)
    with pytest.raises(KeyError):
        transfers.take(1, 6)
    transfers.give_up(1)
    assert transfers.moved.vain_bytes == size and not transfers.guessed(1, 5)
    transfers.give_up(1)
    assert transfers.moved.vain_bytes == size
    # Wrong ones that are still on their way count against the room.
    late = SimpleNamespace(is_there=lambda: False)
    transfers._vain = [(size, late)] * 3
    assert transfers.guess(0, [1, 2]) == 0
    transfers._vain = []
    assert transfers.guess(0, [1, 2]) == 2
    transfers.forget()
    assert not transfers._groups and not transfers._asked


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("policy", ["lru", "lfu", "predicted"])
def test_all_that_is_needed_comes_once(small, rng, policy, alike):
    """Waves have each expert that is needed once, with its own weights, whatever was guessed; and
    what the books say is in the slots.
    """
    slots, wave = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    experts = small.experts(slots, wave, guesses=2, policy=policy)
    uses = 0
    for step in range(40):
        plan = SimpleNamespace(shape=SimpleNamespace(tokens=step % 3), rows=[WORKS])
        experts.begin(plan)
        for at in range(LAYERS):
            experts_TK = random_choice(rng, 2 + 5 * (step % 3))
            probe_E = rng.random(E) if at + 1 < LAYERS else None
            before_E = experts.slots_of(at)
            need = experts.arrive(at, experts_TK, probe_E)
            wanted = {*experts_TK[experts_TK >= 0].tolist()}
            assert {*need.held, *need.missing} == wanted
            assert {*need.held} == {e for e in wanted if before_E[e] >= 0}
            uses += len(wanted)
            if need.fits and not alike:
                weights, table_E = experts.into_slots(need)
                experts.settle(need)
                slot_E = np.asarray(table_E)
                assert all(slot_E[e] >= 0 for e in wanted)
                check_weights(small, at, weights, slot_E, wanted)
            else:
                served = []
                for one in experts.waves(need, alike=alike):
                    slot_E = np.asarray(one.slot_E)
                    here = {e for e in wanted if slot_E[e] >= 0}
                    weights = one.weights
                    if not one.stacked:
                        assert len(weights) == wave
                        weights = [np.stack(arrays) for arrays in zip(*weights)]
                    check_weights(small, at, weights, slot_E, here)
                    served += sorted(here)
                    one.done = jax.numpy.zeros(())
                assert sorted(served) == sorted(wanted)
            slot_E = experts.slots_of(at)
            held = np.flatnonzero(slot_E >= 0)
            assert sorted(slot_E[held]) == list(range(slots))
            check_weights(small, at, experts._slots[at].arrays, slot_E, held)
            if need.fits:
                assert all(slot_E[e] >= 0 for e in wanted)
            assert not experts.transfers._asked and len(experts.transfers._groups) <= 1
    stats = experts.stats()
    assert stats.decode.total + stats.prefill.total == uses
    assert stats.decode.early + stats.prefill.early > 0 and stats.vain_bytes > 0


def check_weights(small, layer, weights, slot_E, experts):
    arrays = [np.asarray(array) for array in weights]
    for expert in experts:
        for bank, want in zip(arrays, small.store.expert(layer, int(expert)), strict=True):
            np.testing.assert_array_equal(bank[slot_E[expert]], want)


def test_what_is_missing_goes_before_what_is_guessed(small, rng, monkeypatch):
    experts, order = small.experts(2, 2, guesses=2), []
    start = experts.transfers._start
    monkeypatch.setattr(
        experts.transfers,
        "_start",
        lambda *key, **how: order.append(key) or start(*key, **how),
    )
    experts.begin(SimpleNamespace(shape=SimpleNamespace(tokens=4), rows=[[None]]))
    need = experts.arrive(0, np.arange(E, dtype=np.int32)[:, None], rng.random(E))
    for one in experts.waves(need):
        one.done = jax.numpy.zeros(())
    assert [layer for layer, _ in order] == [0] * 6 + [1] * 2
    assert len({*order}) == 8


@pytest.mark.parametrize("alike", [False, True])
def test_a_group_is_let_go_before_the_next_but_one(small, alike):
    """More would not be counted in the division of memory."""
    experts = small.experts(4, 2, predictor="none")
    experts.begin(SimpleNamespace(shape=SimpleNamespace(tokens=4), rows=[[None]]))
    need = experts.arrive(0, np.arange(E, dtype=np.int32)[:, None], None)
    waves, older = experts.waves(need, alike=alike), []
    for one in waves:
        if not one.stacked:
            assert all(ref() is None for refs in older[:-1] for ref in refs)
            older.append([weakref.ref(array) for expert in one.weights for array in expert])
        one.done = jax.numpy.zeros(())
    assert len(older) == (4 if alike else 2)
    del one
    assert all(ref() is None for refs in older[:-1] for ref in refs)


def test_the_only_layer_is_not_guessed(rng):
    """What is guessed for the layer at hand would come after what it needs."""
    one = Offloaded(replaced(SOFTMAX, num_layers=1), rng)
    experts = one.experts(3, 2, predictor="previous")
    for step in range(20):
        tokens = 3 * (step % 2)
        experts.begin(SimpleNamespace(shape=SimpleNamespace(tokens=tokens), rows=[WORKS]))
        need = experts.arrive(0, random_choice(rng, 4), None)
        if need.fits:
            experts.into_slots(need)
            experts.settle(need)
        else:
            for wave in experts.waves(need):
                wave.done = jax.numpy.zeros(())
        assert not experts.transfers._asked and not experts.transfers._groups
    assert experts.stats().guessed_bytes == 0


def banks_of(*experts, size=100):
    return [SimpleNamespace(experts=n, expert_bytes=size) for n in experts]


@pytest.mark.parametrize("predictor", ["none", "routers"])
def test_memory_is_divided(rng, predictor):
    """As many slots as fit, and no more; by brute force."""
    for _ in range(50):
        banks = banks_of(*rng.integers(1, 20, rng.integers(1, 5)))
        memory, taken = int(rng.integers(5_000, 50_000)), int(rng.integers(0, 2_000))
        config = OffloadConfig(predictor=predictor)
        room = divide(banks, config, memory=memory, taken=taken, top_k=2)
        moving = 3 * room.wave * 100 + 2 * room.guess_bytes
        assert room.guess_bytes == (0 if predictor == "none" else 200)

        def used(slots, banks=banks):
            return sum(min(slots, bank.experts) for bank in banks) * 100

        assert room.slots_L == tuple(min(max(room.slots_L), bank.experts) for bank in banks)
        free = memory * 15 // 16 - taken - moving
        assert used(max(room.slots_L)) <= free
        most = max(bank.experts for bank in banks)
        assert max(room.slots_L) == most or used(max(room.slots_L) + 1) > free
    with pytest.raises(UserError, match=r"--prefetch-bytes of 99 bytes: an expert has 100"):
        divide(banks, OffloadConfig(prefetch_bytes=99), memory=50_000, taken=0, top_k=2)
    # As much as it says suffices, and a little less does not.
    banks, rest = banks_of(8, 8), {"taken": 50, "top_k": 2}
    with pytest.raises(UserError, match=r"--device-memory of 900 bytes") as refused:
        divide(banks, OffloadConfig(), memory=900, **rest)
    least = int(str(refused.value).split("need ")[1].split()[0])
    assert divide(banks, OffloadConfig(), memory=least, **rest).slots_L == (1, 1)
    with pytest.raises(UserError):
        divide(banks, OffloadConfig(), memory=least - 2, **rest)


def test_pages_take_a_part():
    assert pages_that_fit(16_000, 3_000, 100, 5) == 5
    assert pages_that_fit(16_000, 3_000, 100, 1000) == 30
    with pytest.raises(UserError, match=r"need 3627 bytes"):
        pages_that_fit(3_000, 3_000, 100, 5)
    assert pages_that_fit(3_627, 3_000, 100, 5) == 1


def test_sizes():
    assert parse_bytes("20GiB", "--x") == 20 * 2**30 and parse_bytes("1.5 mb", "--x") == 1_500_000
    assert parse_bytes("1234", "--x") == 1234
    for text in "", "x", "-3", "5 GiBs", "1e9":
        with pytest.raises(UserError, match=r"--x .*: is no size"):
            parse_bytes(text, "--x")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"policy": "fifo"}, "policy 'fifo'"),
        ({"guesses": "good"}, "guesses 'good'"),
        ({"predictor": "oracle"}, "predictor 'oracle'"),
        ({"predictor": "history"}, "needs what python -m moejax.offload"),
        ({"prefetch_bytes": -1}, "prefetch_bytes=-1"),
        ({"wave": 0}, "wave=0"),
        ({"bonus": float("nan")}, "bonus=nan"),
    ],
)
def test_what_is_refused(fields, told):
    with pytest.raises(UserError, match=told):
        OffloadConfig(**fields)
