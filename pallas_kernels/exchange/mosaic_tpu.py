"""The exchange as a TPU kernel: rows are written straight into the peers' buffers by remote DMA.

A device pushes; nobody reads from a peer. Only filled rows travel, in pieces whose sizes are
static: of `PIECE_ROWS` rows while they last, then of a tile's rows, so that of a bucket at most a
tile's rows less one travel unfilled. In order:

1. the own bucket is copied, locally;
2. a barrier among the devices of the axis: until a device is here, its buffers may be in use by
   what it ran before, so nobody writes to it;
3. to each peer, nearest first in the order of the axis, so that no two devices begin with the same
   one: the counts, then the pieces;
4. when all counts have come, as many pieces of each source are awaited as its count says, and at
   last the own sends.

Semaphores: one for each source's rows and one for each destination's, which count bytes; they are
scratch of the call. Only the barrier's outlives a call. No device can be a call ahead of another's
barrier, because it needs that one's counts to leave a call; so calls follow each other, in
forward and backward, without anything between. What XLA must keep, and does since all devices run
one program, is the order of the calls; a call under a condition needs one that all devices of the
axis agree on.

The kernel does not look at values; a dtype only says how rows are packed into tiles.

A TPU's core waits in this kernel while rows travel: XLA computes nothing beside it, so chunks of
tokens do not hide it. What would is a kernel that multiplies what has come. It is laid like this
one up to step 3; then, for the own bucket and after it each source's in the order above, it awaits
that source's pieces and runs the visits (pairs of an expert and a tile of rows, as in
`tpu.rows`) of its assignments while later sources' rows travel. The sources sort the assignments
of a bucket by expert, since each knows its own, and send the sorted places and the experts' sizes
beside the counts. Its price is that a device reads an expert's matrix once for each source instead
of once, which is hidden where a source sends an expert about as many rows as the machine does
operations for each byte it reads: 240 on a v5e.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.compat import interpret_mode
from pallas_kernels.tpu.tiles import LANES

__all__ = ["dtype_refusal", "exchange_buckets"]

_DTYPES = ("uint8", "int8", "bfloat16", "float32", "int32")  # others can be viewed as these

PIECE_ROWS = 128
"""A multiple of every tile's rows; rows of 4 KiB make pieces of half a MiB."""


def dtype_refusal(dtype: Any) -> str | None:
    """Why rows of this dtype cannot travel; None if they can."""
    name = jnp.dtype(dtype).name
    return None if name in _DTYPES else f"rows are {name}, not one of {', '.join(_DTYPES)}"


def tile_rows(dtype: Any) -> int:
    """Rows of a tile, 32 bytes of every column; a piece holds whole tiles.

    Smaller numbers lie packed along the rows, see
    https://docs.jax.dev/en/latest/pallas/tpu/details.html.
    """
    return 32 // jnp.dtype(dtype).itemsize


def _loop(start: int | jax.Array, stop: int | jax.Array, body: Callable[[jax.Array], Any]) -> None:
    lax.fori_loop(start, stop, lambda i, _: (body(i), None)[1], None)


def _for_pieces(
    count: jax.Array, capacity: int, tile: int, act: Callable[[jax.Array, int], Any]
) -> None:
    """`act(first row, rows)` for the pieces of the first `count` rows of a bucket."""
    piece = min(PIECE_ROWS, capacity)
    whole = lax.div(count, jnp.int32(piece))
    first = whole * piece
    rest = lax.div(count - first + (tile - 1), jnp.int32(tile))
    _loop(0, whole, lambda i: act(pl.multiple_of(i * piece, tile), piece))
    _loop(0, rest, lambda i: act(pl.multiple_of(first + i * tile, tile), tile))


def _body(
    counts,
    rows,
    counts_row,
    received,
    received_counts,
    arrived_VMEM,
    arrived_SMEM,
    sent,
    arrived,
    counts_sent,
    counts_arrived,
    copied,
    *,
    axis: str,
):
    """The kernel.

    Refs:
        counts: int32 [G] in SMEM. rows: [G, C, W]. counts_row: int32 [1, L] in VMEM, the counts.
        received: [G, C, W]. received_counts: int32 [G] in SMEM.
        arrived_VMEM, arrived_SMEM: int32 [G, 1, L], each source's counts.
        sent, arrived: semaphores [G], of the rows for a destination and of those from a source.
        counts_sent, counts_arrived, copied: semaphores.
    """
    devices, capacity, _ = rows.shape
    tile = tile_rows(rows.dtype)
    me = lax.axis_index(axis)

    def at(ref, bucket, first, size):
        return ref.at[bucket, pl.ds(first, size)]

    def own(first, size):
        return pltpu.make_async_copy(
            at(rows, me, first, size), at(received, me, first, size), copied
        )

    def push(peer, first, size):
        return pltpu.make_async_remote_copy(
            at(rows, peer, first, size),
            at(received, me, first, size),
            sent.at[peer],
            arrived.at[me],
            device_id={axis: peer},
        )

    def push_counts(peer):
        return pltpu.make_async_remote_copy(
            counts_row, arrived_VMEM.at[me], counts_sent, counts_arrived, device_id={axis: peer}
        )

    def await_piece(source, first, size):
        here = at(received, source, first, size)
        pltpu.make_async_copy(here, here, arrived.at[source]).wait()

    def each_peer(act):
        _loop(1, devices, lambda step: act(lax.rem(me + step, devices)))

    def pieces(count, act):
        _for_pieces(count, capacity, tile, act)

    pieces(counts[me], lambda *piece: own(*piece).start())
    received_counts[me] = counts[me]

    barrier = pltpu.get_barrier_semaphore()
    each_peer(lambda peer: pl.semaphore_signal(barrier, 1, device_id={axis: peer}))
    pl.semaphore_wait(barrier, devices - 1)

    each_peer(lambda peer: push_counts(peer).start())
    each_peer(lambda peer: pieces(counts[peer], lambda *piece: push(peer, *piece).start()))

    each_peer(lambda peer: push_counts(peer).wait())  # one sent and one arrived
    to_scalars = pltpu.make_async_copy(arrived_VMEM, arrived_SMEM, counts_sent)
    to_scalars.start()
    to_scalars.wait()

    def await_source(source):
        count = arrived_SMEM[source, 0, me]
        received_counts[source] = count
        pieces(count, partial(await_piece, source))

    each_peer(await_source)
    each_peer(lambda peer: pieces(counts[peer], lambda *piece: push(peer, *piece).wait_send()))
    pieces(counts[me], lambda *piece: own(*piece).wait())


def _collective_id(axis: str) -> int:
    """Names the barrier. One an axis: a peer along another axis must not be counted here."""
    return jax.sharding.get_abstract_mesh().axis_names.index(axis)


def exchange_buckets(
    rows_GCW: jax.Array, counts_G: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    """As `api.exchange_buckets`, but received rows from the count on are not written.

    A bucket's rows that share a tile with its last one hold what the source had there; those after
    them hold what was in memory.

    Args:
        rows_GCW: of 1, 2 or 4 bytes a number. Where C is no multiple of a tile's rows, 32 bytes
            deep, buckets are padded, which costs a copy of them before and after.
        counts_G: int32, from 0 to C.
        axis: mesh axis of size G.
    """
    devices, capacity, _ = rows_GCW.shape
    if more := -capacity % tile_rows(rows_GCW.dtype):
        padded = jnp.pad(rows_GCW, ((0, 0), (0, more), (0, 0)))
        received, received_counts_G = exchange_buckets(padded, counts_G, axis)
        return received[:, :capacity], received_counts_G
    lanes = -(-devices // LANES) * LANES
    counts_row = jnp.pad(counts_G, (0, lanes - devices)).reshape(1, lanes)
    smem, anywhere = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    received, received_counts_G = pl.pallas_call(
        partial(_body, axis=axis),
        out_shape=[
            jax.ShapeDtypeStruct(rows_GCW.shape, rows_GCW.dtype),
            jax.ShapeDtypeStruct((devices,), jnp.int32),
        ],
        in_specs=[smem, anywhere, pl.BlockSpec(memory_space=pltpu.VMEM)],
        out_specs=[anywhere, smem],
        scratch_shapes=[
            pltpu.VMEM((devices, 1, lanes), jnp.int32),
            pltpu.SMEM((devices, 1, lanes), jnp.int32),
            pltpu.SemaphoreType.DMA((devices,)),
            pltpu.SemaphoreType.DMA((devices,)),
            *[pltpu.SemaphoreType.DMA] * 3,
        ],
        compiler_params=pltpu.CompilerParams(collective_id=_collective_id(axis)),
        interpret=interpret_mode(),
        name="exchange_buckets",
    )(counts_G, rows_GCW, counts_row)
    return received, received_counts_G
