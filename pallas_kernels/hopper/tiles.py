"""What the Hopper kernels share: sizes, the tile → group map, the order of tiles, storing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = [
    "COMPUTE",
    "EIGHT",
    "FEW",
    "HALF",
    "ROWS",
    "STRIP",
    "TileMap",
    "enough_of",
    "kept_rows",
    "most_kept_rows",
    "out_scratch",
    "place_in_bands",
    "store_first_strips",
    "store_strips",
    "swizzled",
    "tile_map",
]

COMPUTE = 2  # warpgroups that multiply; one more loads
HALF = 64  # rows of a tile for each of them
ROWS = COMPUTE * HALF  # rows of a tile
EIGHT = 8  # rows of a tile of shared memory
STRIP = 64  # columns that are stored at a time
FEW = (16, 32, 64)  # rows of a tile that are moved where no more are wanted


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TileMap:
    """What the tiles of `ROWS` rows hold.

    group: int32 [tiles]; tiles past the last take the last group.
    rows: int32 [tiles], how many of a tile's rows are wanted, its first ones.
    count: int32 [1], the number of tiles.
    """

    group: jax.Array
    rows: jax.Array
    count: jax.Array


def tile_map(group_sizes_G: jax.Array, places: int, wanted_A: jax.Array | None = None) -> TileMap:
    """Makes the list of tiles.

    Args:
        group_sizes_G: int32, multiples of `ROWS`.
        places: A, a multiple of `ROWS`, at least the sum.
        wanted_A: bool, the first ones of each group; None: all.
    """
    tiles = places // ROWS
    ends_G = jnp.cumsum(group_sizes_G) // ROWS
    index = jnp.arange(tiles, dtype=jnp.int32)
    group = jnp.sum(index[:, None] >= ends_G[None, :], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, group_sizes_G.shape[0] - 1)
    rows = jnp.full((tiles,), ROWS, jnp.int32)
    if wanted_A is not None:
        rows = jnp.sum(wanted_A.reshape(tiles, ROWS), axis=1, dtype=jnp.int32)
    count = jnp.minimum(ends_G[-1:], tiles)  # whatever the sizes say, the lists end there
    return TileMap(group, rows, count.astype(jnp.int32))


def kept_rows(tiles: TileMap) -> jax.Array:
    """Where the wanted rows of each tile are kept, without the padding: int32 [tiles], in eights.

    Shared memory is tiled by 8 rows, so that copies begin and end at multiples of 8.
    """
    eights = -(-tiles.rows // EIGHT)
    return jnp.cumsum(eights, dtype=jnp.int32) - eights


def most_kept_rows(assignments: int, groups: int) -> int:
    """Room for all of them, those of each group padded to a multiple of 8."""
    padded = assignments + min(groups, assignments) * (EIGHT - 1)
    return -(-padded // EIGHT) * EIGHT


def place_in_bands(index: Any, rows: Any, columns: int, height: int) -> tuple[Any, Any]:
    """Row and column of the index-th tile: bands of `height` rows, in each the rows fastest.

    Blocks that run at the same time then share rows and columns, which stay in the L2 cache.
    """
    band = lax.div(index, height * columns)
    rest = index - band * (height * columns)
    tall = jnp.minimum(height, rows - band * height)
    column = lax.div(rest, tall)
    return band * height + rest - column * tall, column


def swizzled(dtype: Any) -> tuple[Any, ...]:
    """The layout of an operand in shared memory: tiles of 8 × 128 bytes, swizzled."""
    elements = 128 // jnp.dtype(dtype).itemsize
    return (plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(128))


def out_scratch(dtype: Any, slots: int = 2) -> Any:
    """Shared memory for `store_strips`."""
    return plgpu.SMEM((COMPUTE, slots, HALF, STRIP), dtype, transforms=swizzled(dtype))


def enough_of(wanted: Any, most: int, move: Callable[[int], None]) -> None:
    """Moves the smallest of the sizes `FEW` and `most` that holds what is wanted.

    Args:
        wanted: rows; more than `most` count as so many.
        most: rows.
        move: number of rows -> None.
    """
    sizes = [size for size in FEW if size < most]
    for fewer, size in zip([-1, *sizes], [*sizes, most], strict=True):
        enough = wanted > fewer if size == most else (wanted > fewer) & (wanted <= size)
        pl.when(enough)(partial(move, size))


def store_strips(
    values: Any, out: Any, out_smem: Any, warpgroup: Any, row: Any, column: Any, wanted: Any = None
) -> None:
    """Writes a warpgroup's [64, C] values to out[row:, column:] by TMA, a strip at a time.

    All calls of a kernel have the same C: the two buffers take turns across calls.

    Args:
        values: in registers, of out's dtype.
        out: [rows, columns] in global memory.
        out_smem: of `out_scratch` with two slots.
        warpgroup, row, column: whose, and where to.
        wanted: rows that must be written, the first ones, maybe none; others may be. None: all.
    """
    strips = values.shape[1] // STRIP
    for strip in range(strips):
        along = slice(strip * STRIP, (strip + 1) * STRIP)
        buffer = out_smem.at[warpgroup, strip % 2]
        # The store before this one may go on, unless it was from the same buffer (the last of an
        # odd number of strips, and then this call's first) or was left out, as with `wanted`.
        pending = 0 if strip == 0 and (strips % 2 or wanted is not None) else 1
        plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
        buffer[...] = values[:, along]
        plgpu.commit_smem()
        columns = pl.ds(column + strip * STRIP, STRIP)

        def store(count: int, buffer: Any = buffer, columns: Any = columns) -> None:
            target = out.at[pl.ds(row, count), columns]
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, count)], target)

        if wanted is None:
            store(HALF)
        else:
            pl.when(wanted > 0)(partial(enough_of, wanted, HALF, store))


def store_first_strips(
    values: Any, out: Any, out_smem: Any, warpgroup: Any, row: Any, column: Any, wanted: Any
) -> None:
    """As `store_strips`, and no other rows than those wanted, up to a multiple of 8.

    Args:
        values, out, out_smem, warpgroup, row, column: as there; `row` a multiple of 8.
        wanted: rows, the first ones; maybe none.
    """
    strips = values.shape[1] // STRIP
    eights = lax.div(jnp.clip(wanted, 0, HALF) + (EIGHT - 1), EIGHT)
    for strip in range(strips):
        along = slice(strip * STRIP, (strip + 1) * STRIP)
        buffer = out_smem.at[warpgroup, strip % 2]
        pending = 0 if strip == 0 and strips % 2 else 1  # as in `store_strips`
        plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
        buffer[...] = values[:, along]
        plgpu.commit_smem()
        columns = pl.ds(column + strip * STRIP, STRIP)

        def store(first: Any, count: int, buffer: Any = buffer, columns: Any = columns) -> None:
            source = buffer.at[pl.ds(first, count)]
            plgpu.copy_smem_to_gmem(source, out.at[pl.ds(row + first, count), columns])

        @pl.when(eights == HALF // EIGHT)
        def store_all(store: Any = store) -> None:
            store(0, HALF)

        @pl.when(eights < HALF // EIGHT)
        def store_some(store: Any = store) -> None:
            for size in (32, 16, 8):  # the bits of a number below 8
                bit = size // EIGHT
                first = lax.div(eights, 2 * bit) * (2 * bit) * EIGHT
                pl.when(lax.rem(lax.div(eights, bit), 2) == 1)(partial(store, first, size))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of how many, the next need not know
