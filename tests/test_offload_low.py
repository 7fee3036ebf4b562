"""Copies of 8 bits for what is missing: what they are, when they are used, what is refused."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from draws import draws
from jax import numpy as jnp
from offload_support import (
    KINDS,
    SOFTMAX,
    WORKS,
    Offloaded,
    Source,
    poor_of,
    random_choice,
)

from moejax.errors import UserError
from moejax.inference.expert_weights import quantized_blueprint, quantizing
from moejax.offload import host_limit
from moejax.offload.config import OffloadConfig
from moejax.offload.load import OffloadedModel
from moejax.offload.low import low_bytes, lowered, restored
from moejax.offload.parts import BankLayout
from moejax.offload.transfers import Transfers
from moejax.serving.flags import EngineFlags
from moejax.training.state import Blueprint
from sharding.mesh import MeshShape, make_mesh

E, LAYERS = 8, 3


def through_int8(w_KN):
    """An oracle: a matrix through int8 by blocks of 128 × 128, and where no rounding decides."""
    out, clear = np.zeros(w_KN.shape), np.zeros(w_KN.shape, bool)
    for k in range(0, w_KN.shape[0], 128):
        for n in range(0, w_KN.shape[1], 128):
            at = slice(k, k + 128), slice(n, n + 128)
            scale = np.abs(w_KN[at]).max() / 127
            steps = w_KN[at] / scale
            out[at] = np.rint(steps) * scale
            # Three float32 roundings of up to 127 steps; none where a step is a power of two, as
            # it is where the largest of numbers of 8 bits has the digits of 127.
            clear[at] = np.abs(steps % 1 - 0.5) > 127 * 2.0**-22
            clear[at] |= np.frexp(scale)[0] == 0.5
    return out, clear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy(rng, dtype):
    shapes = {"w_out": (300, 130), "b_in": (2, 300), "w_in": (130, 2, 300)}
    scale = 10.0 ** rng.uniform(-3, 3)
    arrays = [jnp.asarray(rng.normal(size=s) * scale, jnp.dtype(dtype)) for s in shapes.values()]
    likes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)
    bank = BankLayout(0, None, (), tuple(shapes), E, likes)
    low = tuple(map(lowered, shapes, arrays))
    blocks = {"w_out": 3 * 2, "w_in": 2 * 3 * 2}
    size = 300 * 130 * 3 + 4 * sum(blocks.values()) + arrays[1].nbytes
    assert low_bytes(bank) == size == sum(leaf.nbytes for leaf in jax.tree.leaves(low))
    assert low_bytes(bank) < 0.51 * bank.expert_bytes
    tolerance = 2.0**-21 + (2.0**-8 if dtype == "bfloat16" else 0.0)  # the last rounding
    for name, got, array in zip(shapes, restored(bank, low), arrays, strict=True):
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        got, array = (np.asarray(a, np.float64) for a in (got, array))
        if name == "b_in":
            np.testing.assert_array_equal(got, array)
            continue
        for n in range(2) if name == "w_in" else [slice(None)]:
            at = (slice(None), n) if name == "w_in" else slice(None)
            want, clear = through_int8(array[at])
            assert clear.mean() > 0.99
            np.testing.assert_allclose(got[at][clear], want[clear], rtol=tolerance)


@pytest.fixture(scope="module")
def small():
    return Offloaded(SOFTMAX, draws(__name__), miss_dtype="int8")


@pytest.mark.parametrize("alike", [False, True])
def test_what_is_used(small, rng, alike):
    """What is missing comes in fewer bits, what is guessed does not, whatever the slots hold; and
    a guess makes good what is there in fewer bits.
    """
    slots, wave = int(rng.integers(2, 7)), int(rng.integers(1, 4))
    experts = small.experts(slots, wave, guesses=3, miss_dtype="int8")
    exact = {(layer, e): small.store.expert(layer, e) for layer in range(LAYERS) for e in range(E)}
    poor = {key: poor_of(small.store, *key) for key in exact}
    in_slots = {(at, e): False for at in range(LAYERS) for e in range(slots)}  # whether poor
    low_uses = improved = asked = 0

    def check(at, weights, slot_E, poor_of):
        for expert, is_poor in poor_of.items():
            want = (poor if is_poor else exact)[at, expert]
            for bank, array in zip(weights, want, strict=True):
                np.testing.assert_array_equal(np.asarray(bank)[slot_E[expert]], array)

    for step in range(90):
        experts.begin(SimpleNamespace(shape=SimpleNamespace(tokens=step % 3), rows=[WORKS]))
        for at in range(LAYERS):
            experts_TK = random_choice(rng, 2 + 5 * (step % 3))
            wanted = {*experts_TK[experts_TK >= 0].tolist()}
            guessed = {e for e in wanted if experts.transfers.guessed(at, e)}
            held_before = {e: in_slots[at, e] for e in range(E) if (at, e) in in_slots}
            used = {e: e not in guessed and held_before.get(e, True) for e in wanted}
            low_uses += sum(used.values())
            asked += len(wanted - guessed - held_before.keys())
            improved += sum(held_before.get(e, False) for e in guessed)
            probe_E = rng.random(E) if at + 1 < LAYERS else None
            need = experts.arrive(at, experts_TK, probe_E)
            if need.fits and not alike:
                weights, table_E = experts.into_slots(need)
                experts.settle(need)
                check(at, weights, np.asarray(table_E), used)
            else:
                served = []
                for one in experts.waves(need, alike=alike):
                    slot_E = np.asarray(one.slot_E)
                    here = {e: used[e] for e in wanted if slot_E[e] >= 0}
                    weights = one.weights
                    if not one.stacked:
                        weights = [np.stack(arrays) for arrays in zip(*weights)]
                    check(at, weights, slot_E, here)
                    served += sorted(here)
                    one.done = jnp.zeros(())
                assert sorted(served) == sorted(wanted)
            slot_E = experts.slots_of(at)
            held = {e: used.get(e, held_before.get(e)) for e in np.flatnonzero(slot_E >= 0)}
            check(at, experts._slots[at].arrays, slot_E, held)
            for e in range(E):
                in_slots.pop((at, e), None)
            in_slots |= {(at, int(e)): is_poor for e, is_poor in held.items()}
    stats = experts.stats()
    assert stats.decode.low + stats.prefill.low == low_uses > 0
    bank = small.store.banks[0]
    assert stats.asked_bytes == asked * low_bytes(bank)
    assert stats.decode.missed + stats.prefill.missed == asked
    assert improved > 0
    assert "of all uses in 8 bits" in str(stats)


def test_nothing_is_missing(small, rng):
    """What the slots hold from the start is exact."""
    experts = small.experts(E, miss_dtype="int8")
    for at in range(LAYERS):
        experts.begin(SimpleNamespace(shape=SimpleNamespace(tokens=3), rows=[WORKS]))
        need = experts.arrive(at, random_choice(rng, 20), None)
        weights, _ = experts.into_slots(need)
        experts.settle(need)
        for expert in range(E):
            for bank, array in zip(weights, small.store.expert(at, expert), strict=True):
                np.testing.assert_array_equal(bank[expert], array)
    stats = experts.stats()
    assert stats.prefill.low == stats.asked_bytes == 0 and "8 bits" not in str(stats)


def test_biases_stay(rng):
    small = Offloaded(KINDS["gpt_oss"], rng, miss_dtype="int8")
    transfers = Transfers(small.store, small.model.parts.blueprint.mesh, 0, low=True)
    for layer, bank in small.store.banks.items():
        transfers.ask(layer, [3])
        got = transfers.take(layer, 3)
        for array, want in zip(got, poor_of(small.store, layer, 3), strict=True):
            np.testing.assert_array_equal(array, want)
        assert {"b_in", "b_out"} < {*bank.names}


def test_what_is_refused(small, monkeypatch):
    with pytest.raises(UserError, match="miss_dtype 'int4': must be one of none, int8"):
        OffloadConfig(miss_dtype="int4")
    with pytest.raises(UserError, match="miss_dtype 'int8' with store 'mapped'"):
        OffloadConfig(miss_dtype="int8", store="mapped")
    with pytest.raises(UserError, match="miss_dtype=int8 with deterministic settings"):
        small.engine(small.experts(2, miss_dtype="int8"), deterministic=True)
    for flags, told in (
        ({"deterministic": True}, "--offload-miss-dtype int8 with --deterministic"),
        ({"offload_store": "mapped"}, "--offload-miss-dtype int8 with --offload-store mapped"),
        ({"offload": False}, "--offload-miss-dtype int8: only with --offload"),
    ):
        with pytest.raises(UserError, match=told):
            EngineFlags(**{"offload": True, "offload_miss_dtype": "int8", **flags})
    flags = EngineFlags(offload=True, offload_miss_dtype="int8")
    config = flags.offload_config()
    assert config.low and config.miss_dtype == "int8"
    model = dataclasses.replace(SOFTMAX, scan_layers=False)
    blueprint = Blueprint(model, make_mesh(MeshShape()))
    bare = quantized_blueprint(blueprint, "int8")
    source = Source(model, small.flat)
    offloaded = OffloadedModel(source, blueprint, (bare, quantizing(bare, "int8")))
    with pytest.raises(UserError, match="--offload-miss-dtype int8 with --expert-weights"):
        offloaded.check(config)
    # The host needs room for both.
    bank = small.store.banks[0]
    exact, low = (LAYERS * E * size for size in (bank.expert_bytes, low_bytes(bank)))
    offloaded = OffloadedModel(source, blueprint)
    monkeypatch.setattr(host_limit, "meminfo", lambda name: exact + low - 1)
    offloaded.load(OffloadConfig())
    with pytest.raises(UserError, match="on a host with"):
        offloaded.load(config)
    monkeypatch.setattr(host_limit, "meminfo", lambda name: exact + low)
    offloaded.load(config)
