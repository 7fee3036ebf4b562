"""Fused experts on Hopper: the kernels of the forward and of the backward.

Forward: `up` gathers token rows, multiplies with the input projections and applies the activation;
`down` multiplies with the output projection. Backward: `down_backward`, which has a module of its
own, and the gradients of the rows and of both projections.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.exchange.arrivals import Arriving
from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.fused_experts.down_backward import down_backward
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.hopper.config import RowsConfig, choose_config
from pallas_kernels.hopper.rows import Epilogue, rows_kernel
from pallas_kernels.hopper.tiles import (
    EIGHT,
    HALF,
    ROWS,
    TileMap,
    kept_rows,
    most_kept_rows,
    out_scratch,
    store_first_strips,
    store_strips,
    tile_map,
)

__all__ = ["down", "down_backward", "rows_gradient", "up", "w_in_gradient", "w_out_gradient"]


def _check_width(hidden: int, width: int) -> None:
    """Projections lie side by side: a tile beyond the end of one would be in the next."""
    if hidden % width:
        raise ValueError(f"tiles of {width} columns do not divide the hidden width {hidden}")


def up(
    x_RD: jax.Array,
    w_in_SDNH: jax.Array,
    sizes_S: jax.Array,
    *,
    activation: str,
    keep: bool,
    copy_A: jax.Array | None = None,
    copies: int = 1,
    tiles: TileMap | None = None,
    few: bool = False,
    assignments: int | None = None,
    reserve_sms: int = 0,
    config: RowsConfig | None = None,
    arriving: Arriving | None = None,
) -> tuple[jax.Array, ...]:
    """act(x[copy // copies] @ w_in of the group).

    Args:
        x_RD: bfloat16 token rows; with no `copy_A` [A, D], a row for each place.
        w_in_SDNH: bfloat16 input projections; N is 2 for gated activations.
        sizes_S: int32, multiples of 128.
        activation: name.
        keep: whether the projections are written too, for the backward; with `tiles` that say
            which rows are wanted, without the padding.
        copy_A: int32, the copy of a token row at each place; out of range in padding.
        copies: of a token row.
        tiles: of the slots; None makes the list.
        few: most tiles hold few rows: only those that `tiles` wants need be written.
        assignments: the most places that hold a row, for which `keep` leaves room; None: all.
        reserve_sms: multiprocessors to leave free.
        config: sizes; None chooses.
        arriving: the rows are tokens of this device, [T, D]; those multiplied come from all
            devices, and `copy_A` counts copies of them.

    Returns:
        [A, H], and the projections or None: [B, N·H], those of the wanted rows alone, as
        `kept_rows` places them. Rows past the last group are not written. With `arriving` also
        the rows that arrived, [G·T, D].
    """
    act = ACTIVATIONS[activation]
    slots, d_model, parts, hidden = w_in_SDNH.shape
    places = x_RD.shape[0] if copy_A is None else copy_A.shape[0]
    config = config or choose_config(
        hidden,
        tiles=places // ROWS if few else 0,
        parts=parts,
        reserve_sms=reserve_sms,
        kernel="experts_up",
        contraction=d_model,
        groups=slots,
        assignments=places if assignments is None else assignments,
        flags={
            "few": few,
            "gather": copy_A is not None,
            "keep": keep,
        },
    )
    if arriving is not None:  # each block waits for itself
        config = replace(config, cluster=1)
    tile_k = config.tile_k
    part_n = config.tile_n // parts
    _check_width(hidden, part_n)

    def rhs_slice(ref, group, part, n, k):
        return ref.at[group, pl.ds(k * tile_k, tile_k), part, pl.ds(n * part_n, part_n)]

    def finish(accumulators, warpgroup, row, wanted, n, refs, scratch):
        column, smem = n * part_n, scratch["out_smem"]
        *kept, out = refs
        if keep:
            tile_rows, first_rows, h = kept
            m = lax.div(row, ROWS)
            mine = tile_rows[m] - warpgroup * HALF
            first = first_rows[m] * EIGHT + warpgroup * HALF
            for part, values in enumerate(accumulators):
                columns, values = part * hidden + column, values.astype(h.dtype)
                store_first_strips(values, h, smem, warpgroup, first, columns, mine)
        values = act.value(accumulators).astype(out.dtype)
        store_strips(values, out, smem, warpgroup, row, column, wanted)

    told, tiles = tiles is not None, tiles or tile_map(sizes_S, places)
    out_type = [jax.ShapeDtypeStruct((places, hidden), x_RD.dtype)]
    kept = []
    if keep:
        most = most_kept_rows(assignments, slots) if told and assignments else places
        out_type.insert(0, jax.ShapeDtypeStruct((min(places, most), parts * hidden), x_RD.dtype))
        kept = [tiles.rows, kept_rows(tiles)]
    extra = []
    if arriving is not None:
        extra = [arriving.entries_M, arriving.firsts_Q]
        out_type.insert(0, jax.ShapeDtypeStruct((arriving.how.rows, d_model), x_RD.dtype))
    kernel = rows_kernel(
        Epilogue(finish, {"out_smem": out_scratch(x_RD.dtype)}),
        name="experts_up",
        short=few,
        n_tiles=hidden // part_n,
        k_steps=-(-d_model // tile_k),
        parts=parts,
        rhs_slice=rhs_slice,
        transpose_rhs=False,
        gather=copy_A is not None,
        copies=copies,
        config=config,
        out_type=out_type,
        dtype=x_RD.dtype,
        arrivals=None if arriving is None else arriving.how,
    )
    *others, a_AH = kernel(tiles, copy_A, x_RD, w_in_SDNH, *extra, *kept)
    arrived = () if arriving is None else (others.pop(0),)
    return a_AH, others[0] if keep else None, *arrived


def down(
    a_AH: jax.Array,
    w_out_SHD: jax.Array,
    sizes_S: jax.Array,
    **options: Any,
) -> jax.Array:
    """Products [A, D] with the output projections; `options` as for `up`."""
    return products.grouped_matmul(a_AH, w_out_SHD, sizes_S, name="experts_down", **options)


def rows_gradient(
    h_ct_AM: jax.Array, w_in_SDNH: jax.Array, sizes_S: jax.Array, **sizing: Any
) -> jax.Array:
    """Cotangents [A, D] of the rows, from those of the projections; `sizing` as for `up`."""
    w_in_SDM = w_in_SDNH.reshape(*w_in_SDNH.shape[:2], -1)
    return products.grouped_matmul(
        h_ct_AM, w_in_SDM, sizes_S, transpose_rhs=True, name="rows_gradient", **sizing
    )


def w_in_gradient(
    x_RD: jax.Array,
    h_ct_AM: jax.Array,
    sizes_S: jax.Array,
    copy_A: jax.Array | None = None,
    **sizing: Any,
) -> jax.Array:
    """Gradients [S, D, N·H] of the input projections' matrices; arguments as for `up`."""
    gather = "" if copy_A is None else "lhs"
    return products.weights_gradient(
        x_RD, h_ct_AM, sizes_S, index_M=copy_A, gather=gather, name="w_in_gradient", **sizing
    )


def w_out_gradient(
    weighted_AH: jax.Array,
    ct_RD: jax.Array,
    sizes_S: jax.Array,
    copy_A: jax.Array | None = None,
    **sizing: Any,
) -> jax.Array:
    """Gradients [S, H, D] of the output projections; `ct_RD` as for `down_backward`."""
    gather = "" if copy_A is None else "rhs"
    return products.weights_gradient(
        weighted_AH,
        ct_RD,
        sizes_S,
        index_M=copy_A,
        gather=gather,
        name="w_out_gradient",
        **sizing,
    )
