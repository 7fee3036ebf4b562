"""Gradients summed over ranks as bfloat16, int8 or int4: rounded once on each of two ways.

Every rank cuts its gradient into one chunk for each rank, rounds them and sends them by one
all-to-all; it sums what it gets in float32, beside its own chunk, which it never rounds. What is
needed beyond the rank is rounded again and all-gathered (as in ZeRO++, arXiv 2306.10209 §3.3).

A dense weight stored in pieces over D data ranks is summed over D × E ranks. Over both axes at once
a rank sends (1 − 1/(DE)) + (E − 1)/(DE) = 1 + 1/D − 2/(DE) of its gradient. Over `data` first and
then over `expert` on the piece, by all-to-all and all-gather, it sends (1 − 1/D) + 2(E − 1)/(DE),
the same, and as many of them to other data ranks. But that rounds three times instead of twice, so
it is done over both at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax import lax
from jax import numpy as jnp

from sharding.collectives import AxisGroups, axis_arguments, axis_size
from sharding.compression.blocks import (
    Blocks,
    add_up,
    add_up_and_encode,
    decode,
    encode,
    rotate,
)
from sharding.compression.chunks import Chunks
from sharding.mesh import DATA
from sharding.traffic import Kind

__all__ = [
    "Ranks",
    "crossings",
    "gather_piece",
    "gathered_bytes",
    "init",
    "reduce",
    "sum_rows",
]


Ranks = tuple[str, ...] | AxisGroups


def init(shape: tuple[int, ...]) -> jax.Array:
    """The residual of error feedback, zero: float32, like the local gradient."""
    return jnp.zeros(shape, jnp.float32)


def reduce(
    grad: jax.Array,
    state: jax.Array | None,
    axes: tuple[str, ...],
    dim: int | None,
    *,
    key: jax.Array | None,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array | None]:
    """Sums one parameter's gradient over ranks, inside the shard_map.

    With error feedback (arXiv 1901.09847) a rank adds what it did not send before, and keeps what
    it does not send now. What is lost in the second rounding is added to the residual of the rank
    that sums the chunk, in the place of its own chunk. So the sum of all that was applied and of
    all residuals is the sum of all gradients.

    Args:
        grad: this rank's; bfloat16 is read as it is, anything else as float32.
        state: the residual, float32 like `grad`; None without error feedback.
        axes: mesh axes to sum over, `data` first.
        dim: the dimension that storage splits over `data`; None: all ranks get the whole sum.
        key: typed PRNG key of step, parameter and rank, for stochastic rounding; None rounds to
            the nearest.
        blocks: how numbers travel.

    Returns:
        The sum, or the piece of it that is stored here, float32 and equal in every bit on the
        ranks that hold it; and the new residual.
    """
    chunks = Chunks(grad.shape, {a: axis_size(a) for a in axes}, dim, blocks.block)
    if grad.dtype != jnp.bfloat16 or state is not None:
        grad = grad.astype(jnp.float32)
    if chunks.ranks == 1:
        return grad.astype(jnp.float32), state
    rows_NC = chunks.cut(grad if state is None else grad + state)
    gather = chunks.sharers if axis_size(chunks.sharers) > 1 else None
    total, left_NC = sum_rows(
        *(rows_NC, axes, lax.axis_index(axes), key, blocks), gather=gather, keep=state is not None
    )
    return chunks.join_piece(total), None if left_NC is None else chunks.join(left_NC)


def sum_rows(
    rows_NC: jax.Array,
    over: Ranks,
    me: jax.Array,
    key: jax.Array | None,
    blocks: Blocks,
    *,
    gather: Ranks | None,
    keep: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Both ways: row n of every rank goes to rank n, which sums them, and the sums to all.

    Rotated blocks stay so until all is summed.

    Args:
        rows_NC: float32 or bfloat16, a row for each rank.
        over: the ranks.
        me: this rank's place among them, int32 [].
        key, blocks: as for `reduce`.
        gather: the ranks that get this one's sum; None where it stays here.
        keep: whether to return what was lost.

    Returns:
        The sums, float32: of the ranks in `gather` [G, C], or this one's [1, C]. And what rounding
        lost of each row, float32 [N, C], of this rank's own what the second way lost of the sum.
    """
    width = rows_NC.shape[1]
    if blocks.rotate:
        total, left_NC = sum_rows(
            *(rotate(rows_NC.astype(jnp.float32)), over, me, key, blocks.unrotated),
            gather=gather,
            keep=keep,
        )
        return rotate(total), None if left_NC is None else rotate(left_NC)
    sent, left_NC = encode(rows_NC, blocks, _words(key, 0), residual=keep)
    received = lax.all_to_all(sent, split_axis=0, concat_axis=0, **axis_arguments(over))
    kept_1C = None
    if gather is None:
        total = add_up(received, rows_NC, me, blocks)[None]
    else:
        sent, kept_1C = add_up_and_encode(
            received, rows_NC, me, blocks, _words(key, 1), residual=keep
        )
        total = decode(lax.all_gather(sent[0], **axis_arguments(gather)), blocks, width)
    if left_NC is not None:
        mine_N1 = (jnp.arange(len(rows_NC), dtype=jnp.int32) == me)[:, None]
        left_NC = jnp.where(mine_N1, 0.0 if kept_1C is None else kept_1C, left_NC)
    return total, left_NC


def _words(key: jax.Array | None, way: int) -> jax.Array | None:
    if key is None:
        return None
    return jax.random.key_data(jax.random.fold_in(key, way)).ravel()[:2]


def crossings(
    shape: tuple[int, ...], sizes: Mapping[str, int], dim: int | None, blocks: Blocks
) -> list[tuple[Kind, tuple[str, ...], int]]:
    """The collectives of `reduce`: kind, axes, and bytes of what a rank puts in.

    Args:
        shape: of the local gradient.
        sizes: devices along each axis that is summed over, `data` first.
        dim: as for `reduce`.
        blocks: how numbers travel.
    """
    chunks = Chunks(shape, sizes, dim, blocks.block)
    row = blocks.row_bytes(chunks.width)
    return [
        ("all-to-all", tuple(sizes), chunks.ranks * row),
        ("all-gather", chunks.sharers, row),
    ]


def gather_piece(piece: jax.Array, dim: int, blocks: Blocks) -> jax.Array:
    """All-gathers a stored piece over `data` in few bytes; float32, equal on all ranks.

    Args:
        piece: float32, this rank's.
        dim: the dimension that storage splits.
        blocks: how numbers travel; rounded to the nearest.
    """
    width = blocks.padded(piece.size)
    row_1C = jnp.pad(piece.reshape(1, -1), ((0, 0), (0, width - piece.size)))
    rows_DC = decode(lax.all_gather(encode(row_1C, blocks)[0][0], DATA), blocks, width)
    pieces = rows_DC[:, : piece.size].reshape(-1, *piece.shape)
    joined = jnp.moveaxis(pieces, 0, dim)
    return joined.reshape(*piece.shape[:dim], -1, *piece.shape[dim + 1 :])


def gathered_bytes(piece: int, blocks: Blocks) -> int:
    """Bytes that a rank puts into `gather_piece` of a piece of so many numbers."""
    return blocks.row_bytes(blocks.padded(piece))
