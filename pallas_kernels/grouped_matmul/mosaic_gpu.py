"""Grouped matmul on Hopper: rows with their group's matrix, and the matrices' gradients."""

from __future__ import annotations

from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.hopper.config import RowsConfig, choose_config
from pallas_kernels.hopper.rows import Epilogue, rows_kernel
from pallas_kernels.hopper.tiles import ROWS, out_scratch, store_strips, tile_map
from pallas_kernels.hopper.weights import weights_kernel

__all__ = ["grouped_matmul", "weights_gradient"]


def grouped_matmul(
    lhs_MK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    transpose_rhs: bool = False,
    index_M: jax.Array | None = None,
    wanted_M: jax.Array | None = None,
    name: str = "grouped_matmul",
    config: RowsConfig | None = None,
) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m].

    Args:
        lhs_MK: bfloat16 rows sorted by group, or with `index_M` rows in any order.
        rhs_GKN: bfloat16, one matrix for each group; [G, N, K] with `transpose_rhs`.
        group_sizes_G: int32, multiples of 128.
        index_M: int32, the row of lhs of each row; out of range is a row of zeros.
        wanted_M: bool, the rows that are wanted, the first ones of each group, where they are few;
            others may be left unwritten. None: all.
        name: of the kernel, in profiles.
        config: sizes; None chooses.

    Returns:
        [M, N], accumulated in float32. Rows past the last group are not written.
    """
    contraction = lhs_MK.shape[1]
    rows = lhs_MK.shape[0] if index_M is None else index_M.shape[0]
    columns = rhs_GKN.shape[1 if transpose_rhs else 2]
    tiles = 0 if wanted_M is None else rows // ROWS
    config = config or choose_config(columns, tiles=tiles)
    tile_n, tile_k = config.tile_n, config.tile_k

    def rhs_slice(ref, group, part, n, k):
        along_n, along_k = pl.ds(n * tile_n, tile_n), pl.ds(k * tile_k, tile_k)
        return ref.at[group, along_n, along_k] if transpose_rhs else ref.at[group, along_k, along_n]

    def finish(accumulators, warpgroup, row, wanted, n, refs, scratch):
        (out,) = refs
        values = accumulators[0].astype(out.dtype)
        store_strips(values, out, scratch["out_smem"], warpgroup, row, n * tile_n, wanted)

    kernel = rows_kernel(
        Epilogue(finish, {"out_smem": out_scratch(lhs_MK.dtype)}),
        name=name,
        short=wanted_M is not None,
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
    return kernel(tile_map(group_sizes_G, rows, wanted_M), index_M, lhs_MK, rhs_GKN)


def weights_gradient(
    lhs_MK: jax.Array,
    ct_MN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    index_M: jax.Array | None = None,
    gather: str = "",
    name: str = "weights_gradient",
    dtype: Any = None,
    config: RowsConfig | None = None,
) -> jax.Array:
    """lhs[rows of g]ᵀ @ ct[rows of g]; zero for empty groups.

    Args:
        lhs_MK, ct_MN: bfloat16 rows sorted by group; zero in a group's padding.
        group_sizes_G: int32, multiples of `tile_k`.
        index_M: int32, the row of the gathered operand of each row; out of range is zeros.
        gather: the operand whose rows `index_M` picks, "lhs" or "rhs" (the cotangents); or neither.
        name: of the kernel, in profiles.
        dtype: of the result; None takes lhs's.
        config: sizes; None chooses.

    Returns:
        [G, K, N], accumulated in float32.
    """
    # What is gathered is the narrow side of a tile: TMA costs the loading threads nothing.
    tile_m = 2 * ROWS if gather == "rhs" else ROWS
    widest = 128 if gather == "rhs" else 256
    config = config or choose_config(ct_MN.shape[1], widest=widest, rows=tile_m, band=32)
    groups, (m, n) = group_sizes_G.shape[0], (lhs_MK.shape[1], ct_MN.shape[1])
    kernel = weights_kernel(
        name=name,
        groups=groups,
        tile_m=tile_m,
        m_tiles=-(-m // tile_m),
        n_tiles=-(-n // config.tile_n),
        gather=gather,
        config=config,
        out_type=jax.ShapeDtypeStruct((groups, m, n), dtype or lhs_MK.dtype),
        dtype=lhs_MK.dtype,
    )
    rows = ct_MN.shape[0] if gather != "rhs" else lhs_MK.shape[0]
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G), rows).astype(jnp.int32)
    first_step = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends_G]) // config.tile_k
    return kernel(first_step, index_M, lhs_MK, ct_MN)
