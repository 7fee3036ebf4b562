"""Grouped matmul on Hopper: rows with their group's matrix, and the matrices' gradients."""

from __future__ import annotations

from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.grouped_matmul.spans import group_spans
from pallas_kernels.hopper.config import RowsConfig, choose_config
from pallas_kernels.hopper.ragged import padded_rows, ragged_tile_map, store_part_strips
from pallas_kernels.hopper.rows import Epilogue, rows_kernel
from pallas_kernels.hopper.tiles import ROWS, TileMap, out_scratch, store_strips, tile_map
from pallas_kernels.hopper.weights import largest_first, weights_kernel

__all__ = ["grouped_matmul", "weights_gradient"]


def grouped_matmul(
    lhs_MK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    transpose_rhs: bool = False,
    index_M: jax.Array | None = None,
    tiles: TileMap | None = None,
    few: bool = False,
    ragged: bool = False,
    group_offset: jax.Array | int | None = None,
    name: str = "grouped_matmul",
    assignments: int | None = None,
    reserve_sms: int = 0,
    config: RowsConfig | None = None,
) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m].

    Args:
        lhs_MK: bfloat16 rows sorted by group, or with `index_M` rows in any order.
        rhs_GKN: bfloat16, one matrix for each group; [G, N, K] with `transpose_rhs`.
        group_sizes_G: int32, multiples of 128; with `ragged` any numbers, and maybe of more groups.
        index_M: int32, for each row its row of lhs; out of range is a row of zeros.
        tiles: of the groups; None makes the list.
        few: most tiles hold few rows: only those that `tiles` wants need be written.
        ragged: groups of any size. A number of rows that is no multiple of 8 costs a copy.
        group_offset: with `ragged`, the group whose matrix is the first; None: 0.
        name: of the kernel, in profiles.
        assignments: rows that are expected to be wanted, which the sizes may depend on; None: all.
        reserve_sms: multiprocessors to leave free.
        config: sizes; None chooses.

    Returns:
        [M, N], accumulated in float32. Rows of no group that has a matrix are not written; with
        `ragged` they are zero.
    """
    total = lhs_MK.shape[0]
    lhs_MK = padded_rows(lhs_MK) if ragged else lhs_MK
    contraction = lhs_MK.shape[1]
    rows = lhs_MK.shape[0] if index_M is None else index_M.shape[0]
    columns = rhs_GKN.shape[1 if transpose_rhs else 2]
    config = config or choose_config(
        columns,
        tiles=rows // ROWS if few else 0,
        reserve_sms=reserve_sms,
        kernel=name,
        contraction=contraction,
        groups=rhs_GKN.shape[0],
        assignments=rows if assignments is None else assignments,
        flags={
            "few": few,
            "gather": index_M is not None,
            "ragged": ragged,
            "transposed": transpose_rhs,
        },
    )
    tile_n, tile_k = config.tile_n, config.tile_k

    def rhs_slice(ref, group, part, n, k):
        along_n, along_k = pl.ds(n * tile_n, tile_n), pl.ds(k * tile_k, tile_k)
        return ref.at[group, along_n, along_k] if transpose_rhs else ref.at[group, along_k, along_n]

    def finish(accumulators, warpgroup, row, wanted, n, refs, scratch):
        (out,) = refs
        values = accumulators[0].astype(out.dtype)
        smem, column = scratch["out_smem"], n * tile_n
        if ragged:
            store_part_strips(values, out, smem, warpgroup, row, column, *wanted)
        else:
            store_strips(values, out, smem, warpgroup, row, column, wanted)

    kernel = rows_kernel(
        Epilogue(finish, {"out_smem": out_scratch(lhs_MK.dtype)}),
        name=name,
        short=few,
        ragged=ragged,
        n_tiles=-(-columns // tile_n),
        k_steps=-(-contraction // tile_k),
        parts=1,
        rhs_slice=rhs_slice,
        transpose_rhs=transpose_rhs,
        gather=index_M is not None,
        config=config,
        out_type=jax.ShapeDtypeStruct((rows, columns), lhs_MK.dtype),
        dtype=lhs_MK.dtype,
    )
    if ragged:
        spans_2G = group_spans(group_sizes_G, rhs_GKN.shape[0], group_offset, total)
        return kernel(ragged_tile_map(spans_2G, rows), index_M, lhs_MK, rhs_GKN)[:total]
    return kernel(tiles or tile_map(group_sizes_G, rows), index_M, lhs_MK, rhs_GKN)


def weights_gradient(
    lhs_MK: jax.Array,
    ct_MN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    index_M: jax.Array | None = None,
    copies: int = 1,
    gather: str = "",
    ragged: bool = False,
    groups: int | None = None,
    group_offset: jax.Array | int | None = None,
    name: str = "weights_gradient",
    dtype: Any = None,
    assignments: int | None = None,
    reserve_sms: int = 0,
    config: RowsConfig | None = None,
) -> jax.Array:
    """lhs[rows of g]ᵀ @ ct[rows of g]; zero for empty groups.

    Args:
        lhs_MK, ct_MN: bfloat16 rows sorted by group; zero in a group's padding.
        group_sizes_G: int32, multiples of `tile_k`; with `ragged` any numbers.
        index_M: int32, for each row `copies` times that of the gathered operand, or less than that
            more; out of range is a row of zeros.
        copies: what the index counts for each row.
        gather: the operand whose rows `index_M` picks, "lhs" or "rhs" (the cotangents); or neither.
        ragged: groups of any size. A number of rows that is no multiple of 8 costs copies.
        groups, group_offset: with `ragged`, how many groups have a matrix, and the first of them;
            None: all.
        name: of the kernel, in profiles.
        dtype: of the result; None takes lhs's.
        assignments: rows without padding, which the sizes may depend on; None: all.
        reserve_sms: multiprocessors to leave free.
        config: sizes; None chooses.

    Returns:
        [G, K, N], accumulated in float32.
    """
    # What is gathered is the narrow side of a tile: TMA costs the loading threads nothing.
    tile_m = 2 * ROWS if gather == "rhs" else ROWS
    widest = 128 if gather == "rhs" else 256
    groups = group_sizes_G.shape[0] if groups is None else groups
    m, n = lhs_MK.shape[1], ct_MN.shape[1]
    places = max(lhs_MK.shape[0], ct_MN.shape[0])
    config = config or choose_config(
        n,
        widest=widest,
        rows=tile_m,
        band=32,
        reserve_sms=reserve_sms,
        kernel=name,
        contraction=m,
        groups=groups,
        assignments=places if assignments is None else assignments,
        flags={
            "gather_lhs": gather == "lhs",
            "gather_rhs": gather == "rhs",
            "ragged": ragged,
            "weights": True,
        },
    )
    kernel = weights_kernel(
        name=name,
        groups=groups,
        tile_m=tile_m,
        m_tiles=-(-m // tile_m),
        n_tiles=-(-n // config.tile_n),
        gather=gather,
        copies=copies,
        config=config,
        out_type=jax.ShapeDtypeStruct((groups, m, n), dtype or lhs_MK.dtype),
        dtype=lhs_MK.dtype,
        ragged=ragged,
    )
    if ragged:
        spans_2G = group_spans(group_sizes_G, groups, group_offset, lhs_MK.shape[0])
        order_G = largest_first(spans_2G[1] - spans_2G[0])
        return kernel(spans_2G, order_G, None, padded_rows(lhs_MK), padded_rows(ct_MN))
    rows = ct_MN.shape[0] if gather != "rhs" else lhs_MK.shape[0]
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G), rows).astype(jnp.int32)
    first_step = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends_G]) // config.tile_k
    order_G = largest_first(first_step[1:] - first_step[:-1])
    return kernel(first_step, order_G, index_M, lhs_MK, ct_MN)
