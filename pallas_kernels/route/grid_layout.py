"""The sorted layout of many assignments on Hopper: tiles of rows, counted by a grid of blocks.

A warpgroup keeps 64 rows in registers, in the layout of wgmma accumulators. There a quad of lanes
shares a row, so that a reduction along it takes two shuffles. Nothing is sorted: the layout needs
only how many assignments to the same group come before each one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.compat import COMPILER_PARAMS, load_rows, named_kernel
from pallas_kernels.hopper.tiles import swizzled

__all__ = ["refusal", "sorted_places"]

ROWS = 64  # of a warpgroup
LANE_COLUMNS = 8  # arrays in this layout have a multiple of as many columns
MAX_COPIES = 32
MAX_ROWS = 2**24
CHUNK = 128  # groups that are counted at a time
SPAN = 1024  # tiles that are summed up in one product

INT_MAX = 2**31 - 1


def refusal(rows: int, copies: int, groups: int) -> str | None:
    """Why the kernel cannot serve this, or None."""
    if rows * copies * groups == 0:
        return "no rows, no assignments or no groups"
    if rows >= MAX_ROWS:
        return f"{rows} rows; sums of counts are exact in float32 below {MAX_ROWS}"
    if copies > MAX_COPIES:
        return f"{copies} assignments a row; the kernel takes up to {MAX_COPIES}"
    return None


def _iota(shape: tuple[int, int], dimension: int) -> Any:
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, dimension), plgpu.Layout.WGMMA)


def _full(shape: tuple[int, ...], value: Any, dtype: Any) -> Any:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def _across(value: Any, columns: int) -> Any:
    """A value for each row [64] -> [64, columns]."""
    return lax.broadcast_in_dim(value, (ROWS, columns), (0,))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _kernel(
    body: Any, name: str, tiles: int, out_type: Any, scratch_types: Any, params: Any
) -> Any:
    return named_kernel(
        body,
        name,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(tiles,),
        grid_names=("tile",),
        compiler_params=params,
    )


def _ranks(ids_RJ: jax.Array, copies: int, groups: int) -> Any:
    """For each assignment, how many of its tile come before it in its group; counts of tiles.

    Args:
        ids_RJ: int32; R a multiple of 64, columns from `copies` on are padding to a multiple of 8.
        copies: J.
        groups: a multiple of 64.

    Returns:
        int32 like ids; float32 [tiles, groups], at most 64.
    """
    rows, width = ids_RJ.shape
    tiles = rows // ROWS
    chunk = CHUNK if groups % CHUNK == 0 else ROWS
    float32 = jnp.float32

    def body(ids, rank_out, counts_out, scratch):
        triangle, mask_smem = scratch["triangle"], scratch["mask"]
        tile = lax.axis_index("tile")
        at = (pl.ds(tile * ROWS, ROWS), slice(None))
        ids_block, place = load_rows(ids.at[at], plgpu.Layout.WGMMA), _iota((ROWS, width), 1)
        group = [
            jnp.sum(jnp.where(place == j, ids_block, 0), axis=1, dtype=jnp.int32)
            for j in range(copies)
        ]
        square = (ROWS, ROWS)
        before = jnp.where(
            _iota(square, 0) > _iota(square, 1),
            _full(square, 1, float32),
            _full(square, 0, float32),
        )
        triangle[...] = before.astype(jnp.bfloat16)
        ranks = [_full((ROWS,), 0, float32)] * copies
        none = _full((ROWS, chunk), 0, float32)
        for first in range(0, groups, chunk):
            column = _iota((ROWS, chunk), 1) + first
            mask = none
            for j in range(copies):
                mask = jnp.where(column == _across(group[j], chunk), 1.0, mask)
            mask_smem[...] = mask.astype(jnp.bfloat16)
            plgpu.commit_smem()

            def product(accumulator):
                plgpu.wgmma(accumulator, triangle, mask_smem)
                plgpu.wgmma_wait(0)
                return accumulator[...]

            earlier = pl.run_scoped(product, plgpu.ACC((ROWS, chunk), float32))
            # Comparing anew costs less than keeping the comparisons: the compiler must not share.
            again = [lax.optimization_barrier(ids_of_copy) for ids_of_copy in group]
            counts_out[tile, pl.ds(first, chunk)] = jnp.sum(mask, axis=0)
            for j in range(copies):
                own = jnp.where(column == _across(again[j], chunk), earlier, none)
                ranks[j] = ranks[j] + jnp.sum(own, axis=1)
        rank = _full((ROWS, width), 0, float32)
        for j in range(copies):
            rank = jnp.where(place == j, _across(ranks[j], width), rank)
        rank_out[at] = rank.astype(jnp.int32)

    scratch = {
        name: plgpu.SMEM((ROWS, columns), jnp.bfloat16, transforms=swizzled(jnp.bfloat16))
        for name, columns in (("triangle", ROWS), ("mask", chunk))
    }
    out_type = [
        jax.ShapeDtypeStruct((rows, width), jnp.int32),
        jax.ShapeDtypeStruct((tiles, groups), float32),
    ]
    params = replace(COMPILER_PARAMS, reduction_scratch_bytes=128 * chunk)  # one pass for counts
    return _kernel(body, "sorted_places", tiles, out_type, [scratch], params)(ids_RJ)


def _sums_before(counts_NG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of all earlier rows, float32 [N, G], and of all rows, float32 [G].

    As products with a triangle; a cumulative sum down the rows costs more. Exact below 2²⁴ at any
    precision, because factors up to 64 survive rounding to TF32 or bfloat16.
    """
    tiles, groups = counts_NG.shape
    span = min(tiles, SPAN)
    blocks = -(-tiles // span)
    counts_BNG = jnp.pad(counts_NG, ((0, blocks * span - tiles), (0, 0)))
    counts_BNG = counts_BNG.reshape(blocks, span, groups)
    shape = (_round_up(span + 1, LANE_COLUMNS), span)  # the row after the last sums all
    earlier = lax.broadcasted_iota(jnp.int32, shape, 0) > lax.broadcasted_iota(jnp.int32, shape, 1)
    sums_BNG = jnp.einsum("mn,bng->bmg", earlier.astype(jnp.float32), counts_BNG)
    totals_BG = sums_BNG[:, span]
    ends_BG = jnp.cumsum(totals_BG, axis=0) if blocks > 1 else totals_BG
    before_BNG = sums_BNG[:, :span] + (ends_BG - totals_BG)[:, None]
    return before_BNG.reshape(blocks * span, groups)[:tiles], ends_BG[-1]


def sorted_places(
    ids_RJ: jax.Array, *, groups: int, alignment: int, places: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Places for assignments, sorted by group, each group padded to the alignment; by counting.

    Args:
        ids_RJ: int32, the group of each assignment; `groups` or more for none. The groups of a row
            are distinct.
        groups: G.
        alignment: what each group's size is a multiple of.
        places: M, room for all groups.

    Returns:
        int32 [R, J], the place of each assignment, M for none; int32 [G], the groups' sizes with
        padding; int32 [M], the flat assignment r·J + j at each place, R·J for none.
    """
    rows, copies = ids_RJ.shape
    padding = ((0, -rows % ROWS), (0, -copies % LANE_COLUMNS))
    padded = jnp.pad(ids_RJ, padding, constant_values=INT_MAX)
    columns = _round_up(groups, ROWS)
    rank_RJ, counts_NG = _ranks(padded, copies, columns)
    before_NG, counts_G = _sums_before(counts_NG)
    counts_G = counts_G[:groups].astype(jnp.int32)
    sizes_G = -(-counts_G // alignment) * alignment
    index_G = jnp.arange(groups, dtype=jnp.int32)
    start_G = jnp.sum(jnp.where(index_G < index_G[:, None], sizes_G, 0), axis=1, dtype=jnp.int32)

    tile_R1 = jnp.arange(rows, dtype=jnp.int32)[:, None] // ROWS
    some_RJ = ids_RJ < groups
    id_RJ = jnp.clip(ids_RJ, 0, groups - 1)
    before_RJ = before_NG.reshape(-1).at[tile_R1 * columns + id_RJ].get(mode="promise_in_bounds")
    place_RJ = start_G.at[id_RJ].get(mode="promise_in_bounds") + before_RJ.astype(jnp.int32)
    place_RJ = jnp.where(some_RJ, place_RJ + rank_RJ[:rows, :copies], places)

    copy_RJ = lax.broadcasted_iota(jnp.int32, ids_RJ.shape, 0) * copies
    copy_RJ = copy_RJ + lax.broadcasted_iota(jnp.int32, ids_RJ.shape, 1)
    target_RJ = jnp.where(some_RJ, place_RJ, places + copy_RJ)  # unique: no order to keep
    copy_M = jnp.full((places,), rows * copies, jnp.int32)
    copy_M = copy_M.at[target_RJ].set(copy_RJ, mode="drop", unique_indices=True)
    return place_RJ, sizes_G, copy_M
