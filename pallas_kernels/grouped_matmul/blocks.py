"""Rows sorted by group, cut into blocks of rows that are all of one group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import lax
from jax import numpy as jnp

__all__ = ["Blocks", "block_size", "cut_into_blocks", "in_batches", "last_before"]

MOST_COPIED = 2**30
"""Bytes of matrices that blocks may have copies of at once."""

_NOWHERE = jnp.iinfo(jnp.int32).max


def block_size(rows: int, groups: int) -> int:
    """A power of two of at most 128 near half the mean group, so that padding stays moderate."""
    block = 1
    while block < 128 and block * 2 * groups <= rows:
        block *= 2
    return block


def last_before(index: jax.Array, ends_G: jax.Array) -> jax.Array:
    """The first group that ends after each index, which is the last one where none does."""
    group = jnp.searchsorted(ends_G, index, side="right", method="compare_all")
    return jnp.minimum(group, ends_G.shape[0] - 1)


@dataclass(frozen=True)
class Blocks:
    """B blocks of M rows; those of a group follow each other.

    group_B: int32, whose rows a block has; any group for a block of none.
    row_BM: int32, the rows; out of range where there is none.
    spans_2G: int32, first row and the row after the last of each group.
    count_G: int32, blocks of each group.
    """

    group_B: jax.Array
    row_BM: jax.Array
    spans_2G: jax.Array
    count_G: jax.Array

    def place_of(self, row: jax.Array) -> jax.Array:
        """Where rows lie among the B·M; B·M for those of no group. int32, of any shape."""
        (begin_G, end_G), block = self.spans_2G, self.row_BM.shape[1]
        first_G = (jnp.cumsum(self.count_G, dtype=jnp.int32) - self.count_G) * block
        group = last_before(row, end_G)
        inside = (row >= begin_G[group]) & (row < end_G[group])
        return jnp.where(inside, first_G[group] + row - begin_G[group], self.row_BM.size)


def cut_into_blocks(spans_2G: jax.Array, *, rows: int, block: int) -> Blocks:
    """Cuts each group into blocks, the last of which may be filled in part.

    Args:
        spans_2G: int32, first row and the row after the last of each group, ascending; rows between
            two groups belong to none.
        rows: all groups have no more than these together.
        block: M.
    """
    begin_G, end_G = spans_2G
    count_G = -(-(end_G - begin_G) // block)
    after_G = jnp.cumsum(count_G, dtype=jnp.int32)
    most = (rows + min(rows, begin_G.shape[0]) * (block - 1)) // block
    index_B = jnp.arange(most, dtype=jnp.int32)
    group_B = last_before(index_B, after_G)
    first_B = begin_G[group_B] + (index_B - (after_G - count_G)[group_B]) * block
    row_BM = first_B[:, None] + jnp.arange(block, dtype=jnp.int32)
    row_BM = jnp.where(row_BM < end_G[group_B][:, None], row_BM, _NOWHERE)
    return Blocks(group_B, row_BM, spans_2G, count_G)


def in_batches(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    rows_BMK: jax.Array,
    group_B: jax.Array,
    copied: int,
) -> jax.Array:
    """A function of blocks, on as many at a time as `MOST_COPIED` allows.

    Args:
        function: (rows [b, M, K], groups int32 [b]) → [b, …], each block by itself.
        rows_BMK: rows of the blocks.
        group_B: int32, whose they are.
        copied: bytes of the matrices that it copies for each block.

    Returns:
        [B, …].
    """
    batch = max(1, MOST_COPIED // copied)
    if batch >= group_B.shape[0]:
        return function(rows_BMK, group_B)

    def one(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        return function(block[0][None], block[1][None])[0]

    return lax.map(one, (rows_BMK, group_B), batch_size=batch)
