"""Settling loads on Hopper: one block, a thread for each expert, sums by warps.

In plain JAX each round is a dozen kernels of hardly any work, a hundred in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import add
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.simt import LANES, launch

__all__ = ["refusal", "settle"]

MOST_THREADS = 512
MOST_TERMS = 128  # that a lane adds up in a sum
BITS = 15  # of a ratio
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class _Sizes:
    """Of a program."""

    experts: int
    replicas: int
    devices: int

    @property
    def threads(self) -> int:
        return -(-self.experts // 128) * 128

    @property
    def of_a_warp(self) -> int:
        """Devices whose sums a warp makes."""
        return -(-self.devices // (self.threads // LANES))

    @property
    def terms(self) -> int:
        """Of one device, that a lane adds up."""
        return -(-self.experts * self.replicas // LANES)


def refusal(experts: int, replicas: int, devices: int) -> str | None:
    """Why the kernel cannot serve this, or None."""
    sizes = _Sizes(experts, replicas, devices)
    if sizes.threads > MOST_THREADS:
        return f"{experts} experts; the kernel takes up to {MOST_THREADS}"
    if sizes.terms * sizes.of_a_warp > MOST_TERMS:
        return (
            f"{experts} experts with {replicas} replicas on {devices} devices: a lane would add up "
            f"{sizes.terms * sizes.of_a_warp} numbers, the kernel takes up to {MOST_TERMS}"
        )
    return None


def settle(
    count_ER: jax.Array,
    device_ER: jax.Array,
    real_ER: jax.Array,
    devices: int,
    fixed_G: jax.Array,
    *,
    percent: int,
    rounds: int,
) -> jax.Array:
    """See `api.settle`."""
    experts, replicas = count_ER.shape
    sizes = _Sizes(experts, replicas, devices)
    # One word says where a replica is and whether there is one.
    where_ER = jnp.where(real_ER, device_ER, device_ER - devices)
    program = partial(_program, sizes=sizes, percent=percent, rounds=rounds)
    words = experts * replicas
    (settled,) = launch(
        program,
        "settle",
        blocks=1,
        threads=sizes.threads,
        inputs=[count_ER.reshape(-1), where_ER.reshape(-1), fixed_G],
        out_type=[jax.ShapeDtypeStruct((words,), jnp.int32)],
        scratch=[words, experts, experts, experts, devices, devices, devices],
    )
    return settled.reshape(experts, replicas)


def _program(
    m: Any,
    count: Any,
    where: Any,
    fixed: Any,
    out: Any,
    values: Any,
    push: Any,
    top: Any,
    goal: Any,
    load: Any,
    sums: Any,
    tops: Any,
    _: Any,
    *,
    sizes: _Sizes,
    percent: int,
    rounds: int,
) -> None:
    """A thread's part: one expert, as `reference.settle` has it."""
    replicas, words = range(sizes.replicas), sizes.experts * sizes.replicas
    mine, first = m.thread < sizes.experts, m.thread * sizes.replicas

    count_R = [m.load(count, first + r, mine) for r in replicas]
    home_R, real_R = [], []
    for r in replicas:
        home, real = _home(m, m.load(where, first + r, mine), sizes.devices)
        home_R.append(home)
        real_R.append(real)
    replica_homes = []
    for index in _lanes(m, sizes.terms):
        word = m.load(where, index, index < words)
        replica_homes.append(_home(m, word, sizes.devices)[0])
    limit = None
    for _ in range(rounds):
        _put(m, values, first, count_R, mine)
        _by_device(m, sizes, values, words, replica_homes, load, add)
        others = m.load(fixed, m.thread, m.thread < sizes.devices)
        here = m.load(load, m.thread, m.thread < sizes.devices)
        m.store(load, m.thread, here + others, m.thread < sizes.devices)
        m.wait_for_block()
        if limit is None:
            limit = _limit(m, load, sizes.devices, percent)
        load_R = [m.load(load, home) for home in home_R]
        over_R = [_larger(m, load_r - limit, 0) for load_r in load_R]
        least, best, to = m.select(real_R[0], load_R[0], INT_MAX), m.select(mine, 0, 0), home_R[0]
        for r in replicas[1:]:
            better = m.select(real_R[r], load_R[r], INT_MAX) < least
            least = m.select(better, load_R[r], least)
            best, to = m.select(better, r, best), m.select(better, home_R[r], to)
        gap_R = [m.select(real_R[r], load_R[r] - least, 0) for r in replicas]
        any_R = [m.select((gap_R[r] >= 2) & (over_R[r] >= 1), count_R[r], 0) for r in replicas]
        good_R = [m.select(least < limit, any_r, 0) for any_r in any_R]
        _put(m, values, first, good_R, mine)
        _by_device(m, sizes, values, words, replica_homes, sums, add)
        from_R = [
            m.select(m.load(sums, home_R[r]) >= over_R[r], good_R[r], any_R[r]) for r in replicas
        ]
        _put(m, values, first, from_R, mine)
        _by_device(m, sizes, values, words, replica_homes, sums, add)
        push_R = []
        for r in replicas:
            whole = m.load(sums, home_R[r])
            part = _part(m, from_R[r], _smaller(m, over_R[r], whole), whole)
            push_R.append(_smaller(m, part, gap_R[r] // 2))

        pushed, highest = push_R[0], m.select(push_R[0] >= 1, load_R[0], 0)
        for r in replicas[1:]:
            pushed = pushed + push_R[r]
            highest = _larger(m, highest, m.select(push_R[r] >= 1, load_R[r], 0))
        for ref, word in (push, pushed), (top, highest), (goal, to):
            m.store(ref, m.thread, word, mine)
        m.wait_for_block()
        experts = _lanes(m, -(-sizes.experts // LANES))
        goals = [m.load(goal, index, index < sizes.experts) for index in experts]
        _by_device(m, sizes, push, sizes.experts, goals, sums, add)
        _by_device(m, sizes, top, sizes.experts, goals, tops, partial(_larger, m))
        whole, below = m.load(sums, to), m.load(load, to)
        room = _larger(m, m.load(tops, to) - below, 0) // 2
        room = _smaller(m, _larger(m, _larger(m, limit - below, room), 0), whole)
        push_R = [_part(m, push_r, room, whole) for push_r in push_R]
        pushed = push_R[0]
        for push_r in push_R[1:]:
            pushed = pushed + push_r
        count_R = [count_R[r] - push_R[r] + m.select(best == r, pushed, 0) for r in replicas]
    _put(m, out, first, count_R, mine)


def _lanes(m: Any, terms: int) -> list[Any]:
    """The values that a lane reads."""
    return [m.lane + term * LANES for term in range(terms)]


def _put(m: Any, ref: Any, first: Any, words: Sequence[Any], where: Any) -> None:
    for i, word in enumerate(words):
        m.store(ref, first + i, word, where)


def _by_device(
    m: Any,
    sizes: _Sizes,
    values: Any,
    count: int,
    homes: Sequence[Any],
    out: Any,
    joined: Callable[[Any, Any], Any],
) -> None:
    """out[g] = the values at home on device g, joined; by the whole block.

    A lane's i-th value is that at lane + 32 · i; what is past the end counts 0.
    """
    m.wait_for_block()
    words = [m.load(values, index, index < count) for index in _lanes(m, len(homes))]
    for turn in range(sizes.of_a_warp):
        device = m.warp * sizes.of_a_warp + turn
        total = None
        for word, home in zip(words, homes, strict=True):
            own = m.select(home == device, word, 0)
            total = own if total is None else joined(total, own)
        for distance in (16, 8, 4, 2, 1):
            total = joined(total, m.exchange(total, distance))
        m.store(out, device, total, (m.lane < 1) & (device < sizes.devices))
    m.wait_for_block()


def _home(m: Any, word: Any, devices: int) -> tuple[Any, Any]:
    """The device of a replica, and whether there is one."""
    real = word >= 0
    return m.select(real, word, word + devices), real


def _limit(m: Any, load: Any, devices: int, percent: int) -> Any:
    total = m.load(load, m.select(m.lane < 0, 1, 0))
    for device in range(1, devices):
        total = total + m.load(load, m.select(m.lane < 0, 1, device))
    mean = (total + (devices - 1)) // devices
    return mean + mean * (percent - 100) // 100


def _larger(m: Any, a: Any, b: Any) -> Any:
    return m.select(a >= b, a, b)


def _smaller(m: Any, a: Any, b: Any) -> Any:
    return m.select(a >= b, b, a)


def _part(m: Any, count: Any, part: Any, whole: Any) -> Any:
    """As `reference.part_of`."""
    whole = _larger(m, whole, 1)
    shift = m.select(whole >= 2**BITS, 1, 0)
    for bits in range(BITS + 1, 31):
        shift = shift + m.select(whole >= 2**bits, 1, 0)
    whole = whole >> shift
    part = _smaller(m, part >> shift, whole)
    return count // whole * part + count % whole * part // whole
