"""From the cotangent of the experts' outputs to those of their input projections, on Hopper.

The product with the output projection transposed. Its epilogue recomputes the activation from the
kept projections, so that only those are kept (as SonicMoE does, arXiv 2512.14080).
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.hopper.compat import load_rows
from pallas_kernels.hopper.config import RING, RowsConfig, choose_config
from pallas_kernels.hopper.ragged import zero_outside
from pallas_kernels.hopper.rows import Epilogue, rows_kernel
from pallas_kernels.hopper.tiles import (
    COMPUTE,
    EIGHT,
    HALF,
    ROWS,
    STRIP,
    TileMap,
    kept_rows,
    out_scratch,
    swizzled,
    tile_map,
)

__all__ = ["down_backward"]


def down_backward(
    ct_RD: jax.Array,
    w_out_SHD: jax.Array,
    h_BM: jax.Array,
    scores_A: jax.Array,
    sizes_S: jax.Array,
    *,
    activation: str,
    copy_A: jax.Array | None = None,
    copies: int = 1,
    tiles: TileMap | None = None,
    assignments: int | None = None,
    reserve_sms: int = 0,
    config: RowsConfig | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the cotangent of the layer's output to those of the input projections.

    Args:
        ct_RD: bfloat16 cotangents of the token rows' sums; with no `copy_A` [A, D].
        w_out_SHD: bfloat16 output projections.
        h_BM: bfloat16 input projections [B, N·H] kept by `up`.
        scores_A: float32, the weight of each place; 0 in padding.
        sizes_S: int32, multiples of 128.
        activation: name.
        copy_A: int32, the copy of a token row at each place; out of range in padding.
        copies: of a token row.
        tiles: as for `up`.
        assignments: the most places that hold a row, which sizes may depend on; None: all.
        reserve_sms: multiprocessors to leave free.
        config: sizes; None chooses.

    Returns:
        cotangent of h [A, N·H]; act(h) times the score [A, H]; float32 [tiles, A], partial sums of
        the scores' cotangents.
    """
    act = ACTIVATIONS[activation]
    slots, hidden, d_model = w_out_SHD.shape
    config = config or choose_config(
        hidden,
        ring=RING * 3 // 4,
        reserve_sms=reserve_sms,
        kernel="experts_down_backward",
        contraction=d_model,
        groups=slots,
        assignments=scores_A.shape[0] if assignments is None else assignments,
        flags={"gather": copy_A is not None},
    )
    places, tile_n, tile_k = scores_A.shape[0], config.tile_n, config.tile_k
    if hidden % tile_n:
        raise ValueError(f"tiles of {tile_n} columns do not divide the hidden width {hidden}")
    strips, n_tiles = tile_n // STRIP, hidden // tile_n
    dtype = ct_RD.dtype

    def rhs_slice(ref, group, part, n, k):
        return ref.at[group, pl.ds(n * tile_n, tile_n), pl.ds(k * tile_k, tile_k)]

    def fetch(strip, warpgroup, row, n, refs, scratch):
        """Starts loading a strip of the kept projections; behind those wanted are others'."""
        slot = strip % 2
        first = refs[3][lax.div(row, ROWS)] * EIGHT + warpgroup * HALF
        for part in range(act.parts):
            column = part * hidden + n * tile_n + strip * STRIP
            plgpu.copy_gmem_to_smem(
                refs[0].at[pl.ds(first, HALF), pl.ds(column, STRIP)],
                scratch["h_smem"].at[warpgroup, slot, part],
                scratch["h_full"].at[warpgroup * 2 + slot],
            )

    def begin(warpgroup, row, n, refs, scratch):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for strip in range(min(2, strips)):
            fetch(strip, warpgroup, row, n, refs, scratch)

    def finish(accumulators, warpgroup, row, _wanted, n, refs, scratch):
        _, scores, tile_rows, _, h_ct, weighted, score_ct = refs
        mine = tile_rows[lax.div(row, ROWS)] - warpgroup * HALF
        h_smem, out_smem = scratch["h_smem"], scratch["out_smem"]
        reduced = plgpu.Layout.WGMMA.reduce(1)
        score = load_rows(scores.at[pl.ds(row, HALF)], reduced)
        score = lax.broadcast_in_dim(score, (HALF, STRIP), [0])
        total = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), reduced)
        for strip in range(strips):
            slot, column = strip % 2, n * tile_n + strip * STRIP
            ct = accumulators[0][:, strip * STRIP : (strip + 1) * STRIP]
            plgpu.barrier_wait(scratch["h_full"].at[warpgroup * 2 + slot])
            buffers = [h_smem.at[warpgroup, slot, part] for part in range(act.parts)]

            @pl.when(mine < HALF)
            def leave_out_the_next(buffers: list[Any] = buffers) -> None:
                for buffer in buffers:
                    zero_outside(buffer, 0, mine)
                plgpu.commit_smem()

            kept = tuple(buffer[...].astype(jnp.float32) for buffer in buffers)
            value, gradients = act.gradients(kept, ct * score)
            total = total + jnp.sum(ct * value, axis=1)
            if strip:  # the strip before has left the one buffer of the weighted values
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for buffer, gradient in zip(buffers, gradients, strict=True):
                buffer[...] = gradient.astype(dtype)
            out_smem[warpgroup, 0] = (value * score).astype(dtype)
            plgpu.commit_smem()
            rows = pl.ds(row, HALF)
            for part, buffer in enumerate(buffers):
                along = pl.ds(part * hidden + column, STRIP)
                plgpu.copy_smem_to_gmem(buffer, h_ct.at[rows, along])
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup, 0], weighted.at[rows, pl.ds(column, STRIP)]
            )
            if strip + 2 < strips:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                fetch(strip + 2, warpgroup, row, n, refs, scratch)
        score_ct[n, pl.ds(row, HALF)] = total

    scratch = {
        "h_smem": plgpu.SMEM(
            (COMPUTE, 2, act.parts, HALF, STRIP), dtype, transforms=swizzled(dtype)
        ),
        "h_full": plgpu.Barrier(num_arrivals=act.parts, num_barriers=2 * COMPUTE),
        "out_smem": out_scratch(dtype, slots=1),
    }
    kernel = rows_kernel(
        Epilogue(finish, scratch, begin),
        name="experts_down_backward",
        n_tiles=n_tiles,
        k_steps=-(-d_model // tile_k),
        parts=1,
        rhs_slice=rhs_slice,
        transpose_rhs=True,
        gather=copy_A is not None,
        copies=copies,
        config=config,
        out_type=[
            jax.ShapeDtypeStruct((places, act.parts * hidden), dtype),
            jax.ShapeDtypeStruct((places, hidden), dtype),
            jax.ShapeDtypeStruct((n_tiles, places), jnp.float32),
        ],
        dtype=dtype,
    )
    tiles = tiles or tile_map(sizes_S, places)
    extra = (h_BM, scores_A, tiles.rows, kept_rows(tiles))
    return tuple(kernel(tiles, copy_A, ct_RD, w_out_SHD, *extra))
