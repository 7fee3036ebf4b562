"""Rows that the experts' kernels send themselves: which ones, in which order, and when at all."""

from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from wire_support import run_sharded

from moejax.config import ExchangeConfig, ExpertsConfig, WireConfig
from moejax.exchange import choose
from moejax.exchange.remote import make_pushed_rows
from moejax.experts import ExpertWeights, with_kernels
from pallas_kernels import backends
from pallas_kernels.exchange import push
from pallas_kernels.fused_experts import api, remote
from pallas_kernels.hopper.compat import hopper_refusal
from sharding.mesh import EXPERT

T, K = 7, 3


def budget_of(devices, slots, mode="remote", wire=None):
    config = ExchangeConfig(mode, wire=wire or WireConfig())
    sizes = {"tokens": T, "top_k": K, "num_experts": devices * slots}
    return choose(config, **sizes, slots=slots, devices=devices)


# ---- which rows, and in which order -----------------------------------------------------------


def draw_targets(rng, devices, slots, routing):
    """Distinct physical slots of every device's tokens, [G, T, K]; −1 for none."""
    count = devices * slots
    target = rng.permuted(np.tile(np.arange(count), (devices, T, 1)), axis=2)[..., :K]
    target = target.astype(np.int32)
    if routing == "some":
        target[rng.random(target.shape) < 0.4] = -1
        target[rng.random((devices, T)) < 0.2] = -1  # whole tokens
    elif routing == "devices without":
        target[1] = -1  # sends nothing
        target[target // slots == 2] = -1  # receives nothing
    elif routing == "one device":
        target = np.where(target // slots == 3, target, -1)
    elif routing == "none":
        target[:] = -1
    return target


ROUTINGS = ("all", "some", "devices without", "one device", "none")


@pytest.mark.parametrize("devices,slots", [(4, 1), (4, 2), (8, 16), (4, 17), (4, 50)])
def test_pushed_rows(rng, devices, slots):
    """By walking the assignments of every device, for several routings."""
    budget, rows = budget_of(devices, slots), devices * T
    each = remote.group_slots(slots)
    groups = -(-slots // each)
    assert groups <= remote.GROUPS

    def body(target_TK):
        target_RK = jax.lax.all_gather(target_TK, EXPERT, tiled=True)
        me = jax.lax.axis_index(EXPERT)
        here = (target_RK >= 0) & (target_RK // slots == me)
        pushed = make_pushed_rows(target_TK, jnp.where(here, target_RK % slots, slots), budget)
        assert (pushed.axis, pushed.expected) == (EXPERT, budget.moved_rows)
        return pushed.out_M, pushed.firsts_Q, pushed.back_M, pushed.goes_GT

    for routing in ROUTINGS:
        target = draw_targets(rng, devices, slots, routing)
        results = run_sharded(body, target.reshape(-1, K), devices=devices)
        assert [a.dtype for a in results] == [np.int32] * 3 + [bool]
        out, firsts, back = (a.reshape(devices, -1) for a in results[:3])
        goes = results[3].reshape(devices, devices, T)
        came = [[] for _ in range(devices)]
        for me in range(devices):
            first_slot = {}  # of each row that this device sends
            for t, k in np.argwhere(target[me] >= 0):
                g, slot = divmod(int(target[me, t, k]), slots)
                entry = g * T + int(t)
                first_slot[entry] = min(slot, first_slot.get(entry, slot))
            assert set(np.flatnonzero(goes[me])) == set(first_slot)
            for entry in first_slot:
                came[entry // T].append(me * T + entry % T)

            # Each once; those to others in the group of their first slot.
            assert sorted(out[me][out[me] != rows]) == sorted(first_slot)
            assert firsts[me, 0] == 0
            found = [out[me, a:z].tolist() for a, z in pairwise(firsts[me, : groups + 1])]
            wanted = [[] for _ in range(groups)]
            for entry, slot in first_slot.items():
                if entry // T != me:
                    wanted[slot // each].append(entry)
            others = [sorted(e for e in group if e // T != me) for group in found]
            assert others == [sorted(group) for group in wanted]
        for me in range(devices):
            assert sorted(back[me][back[me] != rows]) == sorted(came[me])


# ---- what the kernels refuse ------------------------------------------------------------------


def as_on_hopper(monkeypatch):
    """The device is not looked at, and JAX is new enough."""
    for module in (push, backends):
        monkeypatch.setattr(
            module, "hopper_refusal", lambda dtype, *, forced: hopper_refusal(dtype, forced=True)
        )
    monkeypatch.setattr(jax, "__version_info__", max(jax.__version_info__, push.FIRST_JAX))


@pytest.fixture
def hopper(monkeypatch):
    as_on_hopper(monkeypatch)


@pytest.mark.usefixtures("hopper")
def test_refusals(monkeypatch):
    assert push.refusal("mosaic_gpu") is None
    assert push.explain() == "push_rows: mosaic_gpu"
    with monkeypatch.context() as patch:
        patch.setattr(jax, "__version_info__", push.FIRST_JAX)
        assert push.refusal("mosaic_gpu") is None
    for name, value, why in (
        ("process_count", lambda: 2, "2 processes: GPUs write to each other in one"),
        ("__version_info__", (0, 11, 0), f"jax {jax.__version__} is older than 0.11.1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(jax, name, value)
            for forced in (True, False):
                assert push.refusal("mosaic_gpu", forced) == why
            assert push.explain() == f"push_rows: reference; not mosaic_gpu: {why}"
            assert push.refusal("reference") is None


def test_refused_by_name(monkeypatch):
    """The message has the reason, and where none is left to try nothing runs."""
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))

    def body(x_TW):
        entries_M = jnp.zeros((4 * T,), jnp.int32)
        return (push.push_rows(x_TW, entries_M, EXPERT, T, backend="mosaic_gpu"),)

    with pytest.raises(NotImplementedError, match=r"push_rows: mosaic_gpu: jax .* is older"):
        run_sharded(body, np.zeros((4 * T, 3), np.float32))


def case(**changes):
    settings = {"d_model": 256, "hidden": 128, "activation": "swiglu", "dtype": jnp.bfloat16}
    return api.Case(**(settings | changes))


@pytest.mark.usefixtures("hopper")
def test_layers_that_the_kernels_refuse(monkeypatch):
    assert remote.refusal(case()) is None
    assert remote.refusal(case(d_out=512)) is None
    for changes, why in (
        ({"d_out": 4}, "d_out=4 is no multiple of 64"),
        ({"d_model": 160}, "d_model=160 is no multiple of 64"),
        ({"hidden": 100}, "hidden=100 is no multiple of 64"),
        ({"bias": True}, "the experts have biases"),
        ({"dtype": jnp.float32}, "operands are float32, not bfloat16"),
    ):
        assert remote.refusal(case(**changes)) == why
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert remote.refusal(case()) == "2 processes: GPUs write to each other in one"


def kernels_send(mode="remote", *, dtype=jnp.bfloat16, hidden=128, bias=False, wire=None):
    """Whether a layer's experts send its rows; everything else in its budget stays."""
    shape = jax.ShapeDtypeStruct
    weights = ExpertWeights(
        shape((2, 256, 2, hidden), dtype), shape((2, hidden, 256), dtype), None, None
    )
    budget = budget_of(1 if mode == "local" else 4, 2, mode, wire)
    config = ExpertsConfig(hidden=hidden, bias=bias)
    changed = with_kernels(budget, weights, config, dtype)
    assert (budget.mode, budget.fused) == (mode, False)
    assert changed == replace(budget, fused=changed.fused)
    return changed.fused


@pytest.mark.parametrize("mode", ["local", "all_to_all", "ring"])
@pytest.mark.usefixtures("hopper")
def test_other_modes_have_no_such_kernels(mode):
    assert not kernels_send(mode)


def test_when_the_kernels_send_rows(monkeypatch):
    if jax.default_backend() == "cpu":
        assert not kernels_send()
    as_on_hopper(monkeypatch)
    assert kernels_send()
    assert not kernels_send(bias=True)
    assert not kernels_send(dtype=jnp.float32)
    assert not kernels_send(hidden=96)
    for way in ("dispatch", "dispatch_grad", "combine", "combine_grad"):
        assert not kernels_send(wire=WireConfig(**{way: "int8"})), way
    assert kernels_send(wire=WireConfig(dispatch_dim=128, combine_dim=64))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not kernels_send()
