"""Rows' weighted sums on their way home: combine's sum and its exchange as one kernel.

The sum of a row's places is written to the GPU whose token it is, and never here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.lines import LINE, emit_load, emit_store, line
from pallas_kernels.exchange.mosaic_gpu import WARPGROUPS, pushing_kernel
from pallas_kernels.exchange.pushing import Pusher, on_device
from pallas_kernels.hopper.compat import sm_count
from pallas_kernels.hopper.simt_emit import Compiled, Word

__all__ = ["push_sums"]

HELD = 16  # loads of a thread that are under way side by side
COLUMNS = 8  # of a load


def push_sums(
    rows_AD: jax.Array,
    weights_RJ: jax.Array | None,
    place_RJ: jax.Array,
    entries_M: jax.Array,
    axis: str,
    tokens: int,
    *,
    reserve_sms: int = 0,
) -> jax.Array:
    """Sends Σ_j weights[r, j] · rows[place[r, j]], summed in float32, home for each entry r.

    Args:
        rows_AD: bfloat16, D a multiple of 8.
        weights_RJ: float32, R = G·T; None: all 1.
        place_RJ: int32; outside of 0 … A − 1 for none.
        entries_M: int32, as in `push.push_rows`, of rows that were received.
        axis: mesh axis of size G.
        tokens: T.
        reserve_sms: multiprocessors to leave free.

    Returns:
        [G·T, D], as `push.push_rows`.
    """
    devices, (limit, width) = lax.axis_size(axis), rows_AD.shape
    copies = place_RJ.shape[1]
    blocks = max(1, sm_count() - reserve_sms)
    pusher = Pusher(axis, devices, tokens, 2 * width, blocks * WARPGROUPS)

    def work(refs: Any, received: Any, worker: Any) -> None:
        rows, place, entries, *weights = refs
        me, most = lax.axis_index(axis), devices * tokens
        count = entries.shape[0]
        types = (plgpu.RefType(),) * (3 + len(weights)) + (plgpu.Layout.WG_SPLAT,) * 2

        @plgpu.inline_mgpu(arg_types=types)
        def total(_: Any, rows: Any, place: Any, target: Any, *rest: Any) -> None:
            *weights, entry, row = rest
            entry, row = (Word(n.registers.item()) for n in (entry, row))
            _emit_sum(rows, place, weights, target, entry, row, copies, limit, width)

        def fetch(i: Any) -> Any:
            at = worker + i * pusher.workers
            return jnp.where(at < count, entries[jnp.minimum(at, count - 1)], most)

        def step(i: Any, entry: Any) -> Any:
            following = fetch(i + 1)

            @pl.when((entry >= 0) & (entry < most))
            def send() -> None:
                target = on_device(received, axis, lax.div(entry, tokens))
                row = me * tokens + lax.rem(entry, tokens)
                total(rows, place, target, *weights, entry, row)

            return following

        mine = lax.div(count - worker + (pusher.workers - 1), pusher.workers)
        lax.fori_loop(0, mine, step, fetch(jnp.int32(0)))

    kernel = pushing_kernel(work, "push_sums", pusher, rows_AD.dtype)
    weights = [] if weights_RJ is None else [weights_RJ]
    return kernel(rows_AD, place_RJ, entries_M, *weights)


def _emit_sum(
    rows: Any,
    place: Any,
    weights: Sequence[Any],
    target: Any,
    entry: Word,
    row: Word,
    copies: int,
    limit: int,
    width: int,
) -> None:
    """A warpgroup's threads sum the places of one row and store the sum in a row of the target."""
    m = Compiled()
    spots = [m.load(place, entry * copies + j) for j in range(copies)]
    factors = [m.load(ref, entry * copies + j) for ref in weights for j in range(copies)]
    there = [m.select((spot >= 0) & (spot < limit), 1, 0) for spot in spots]
    size = 2 * width
    steps = list(range(0, size, LINE))
    side_by_side = max(1, HELD // copies)
    for begin in range(0, len(steps), side_by_side):
        some = steps[begin : begin + side_by_side]
        taken = [
            [
                emit_load(line(rows, spot.value, size, further), go.value, further, size)
                for spot, go in zip(spots, there, strict=True)
            ]
            for further in some
        ]
        for further, each in zip(some, taken, strict=True):
            totals = [m.thread * 0] * COLUMNS  # 0.0
            for j, words in enumerate(each):
                values = [value for word in _words(words) for value in m.unpack(word)]
                if factors:
                    values = [m.float_mul(value, factors[j]) for value in values]
                totals = [m.float_add(a, b) for a, b in zip(totals, values, strict=True)]
            packed = [m.pack(*totals[2 * i : 2 * i + 2]).value for i in range(4)]
            emit_store(line(target, row.value, size, further), packed, further, size)


def _words(loaded: Any) -> list[Word]:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    i32 = ir.IntegerType.get_signless(32)
    return [Word(llvm.extractvalue(i32, loaded, [part])) for part in range(4)]
