"""The list of chunks: a few places of one slot that share a tile's columns."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.tiles import ROWS

__all__ = ["Chunks", "list_chunks"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunks:
    """Only slots with a wanted place have chunks.

    slot: int32 [chunks].
    first: int32 [chunks], the first place over the columns of a chunk.
    wanted: int32 [chunks], places from there on that are wanted.
    count: int32 [1], how many of these are chunks.
    """

    slot: jax.Array
    first: jax.Array
    wanted: jax.Array
    count: jax.Array


def list_chunks(
    wanted_A: jax.Array, sizes_S: jax.Array, *, assignments: int, columns: int
) -> Chunks:
    """Cuts each slot's wanted places into chunks.

    Args:
        wanted_A: bool, the first ones of each slot.
        sizes_S: int32, places of each slot, multiples of 128; A is one, too.
        assignments: no more places are wanted.
        columns: places of a chunk, a divisor of 128.
    """
    slots, tiles = sizes_S.shape[0], wanted_A.shape[0] // ROWS
    ends_S = jnp.cumsum(sizes_S)
    starts_S = ends_S - sizes_S
    # By tiles of 128 places: a running sum over all places would take longer than a product.
    wanted_T = jnp.sum(wanted_A.reshape(tiles, ROWS), axis=1, dtype=jnp.int32)
    at_T = jnp.arange(tiles, dtype=jnp.int32) * ROWS
    inside = (at_T[:, None] >= starts_S) & (at_T[:, None] < ends_S)
    wanted_S = jnp.sum(jnp.where(inside, wanted_T[:, None], 0), axis=0, dtype=jnp.int32)
    chunks_S = (wanted_S + (columns - 1)) // columns
    last_S = jnp.cumsum(chunks_S)

    most = assignments // columns + min(slots, assignments)
    index = jnp.arange(most, dtype=jnp.int32)
    slot = jnp.sum(index[:, None] >= last_S, axis=1, dtype=jnp.int32)
    slot = jnp.minimum(slot, slots - 1)
    done = (index - (last_S - chunks_S)[slot]) * columns
    first = jnp.clip((starts_S[slot] + done) // columns, 0, wanted_A.shape[0] // columns - 1)
    wanted = jnp.clip(wanted_S[slot] - done, 0, columns)
    count = jnp.minimum(last_S[-1:], most)
    as_int = [a.astype(jnp.int32) for a in (slot, first, wanted, count)]
    return Chunks(*as_int)
