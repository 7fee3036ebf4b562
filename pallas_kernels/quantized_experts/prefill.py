"""Experts on e4m3 rows and weights, for many rows: the kernels and the layer's forward on Hopper.

Weights have a scale for each block of 128 × 128; rows, and the hidden activations, for each row and
128 columns (DeepSeek-V3, arXiv 2412.19437 §3.3). A token is quantized once, before its rows are
gathered; `up` quantizes the activation's result in its epilogue, so that nothing of the hidden
width is ever written wider than 8 bits.
"""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.hopper.compat import sm_count
from pallas_kernels.hopper.tiles import (
    COMPUTE,
    HALF,
    ROWS,
    out_scratch,
    store_strips,
    swizzled,
    tile_map,
)
from pallas_kernels.quantized_experts.format import BLOCK, QuantizedMatrices, quantize_rows
from pallas_kernels.quantized_experts.promoted import E4M3, PromotedConfig, promoted_kernel

__all__ = ["down", "fp8_experts", "rows_of_places", "up"]

LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = float(jnp.finfo(jnp.float32).tiny)  # its reciprocal is finite
STAGES = {1: 5, 2: 4}  # by column blocks of a tile, as shared memory allows
BAND = 16


def _config(blocks: int) -> PromotedConfig:
    return PromotedConfig(
        tile_n=blocks * BLOCK, sms=sm_count(), tile_k=BLOCK, stages=STAGES[blocks], band=BAND
    )


def _check(name: str, matrices: QuantizedMatrices) -> None:
    if matrices.values.dtype != E4M3:
        raise ValueError(f"{name} is {matrices.values.dtype}, not float8_e4m3fn")
    for size in matrices.values.shape[-2:]:
        if size % BLOCK:
            raise ValueError(f"{name} has a dimension of {size}, no multiple of {BLOCK}")


def rows_of_places(x_RD: jax.Array, source_A: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes each row once and gathers it to its places.

    Args:
        x_RD: rows, floats; D a multiple of 128.
        source_A: int32, the row of each place; out of range in padding, which becomes zero.

    Returns:
        e4m3 values [A, D], float32 scales [D/128, A].
    """
    rows, width = x_RD.shape
    values, scales = quantize_rows(x_RD)
    # Four values at a time: XLA moves single bytes one by one.
    words = lax.bitcast_convert_type(values.reshape(rows, width // 4, 4), jnp.uint32)
    words = words.at[source_A].get(mode="fill", fill_value=0)
    values = lax.bitcast_convert_type(words, E4M3).reshape(source_A.shape[0], width)
    return values, scales.T.at[:, source_A].get(mode="fill", fill_value=0)


def up(
    x_AD: jax.Array,
    scales_KA: jax.Array,
    w_in: QuantizedMatrices,
    sizes_S: jax.Array,
    *,
    activation: str,
    config: PromotedConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """act(x @ w_in of the group), quantized.

    Args:
        x_AD: e4m3 rows, one for each place.
        scales_KA: float32 [D/128, A].
        w_in: e4m3 [S, N, H, D]; N is 2 for gated activations.
        sizes_S: int32, multiples of 128.
        activation: name.
        config: sizes; None chooses.

    Returns:
        e4m3 [A, H], float32 scales [H/128, A]. Rows past the last group are not written.
    """
    _check("w_in", w_in)
    act = ACTIVATIONS[activation]
    slots, parts, hidden, d_model = w_in.values.shape
    hidden_blocks, places = hidden // BLOCK, x_AD.shape[0]
    gated = parts == 2
    config = config or _config(2 if gated or hidden_blocks % 2 == 0 else 1)
    if gated and config.blocks != 2:
        raise ValueError(f"tile_n={config.tile_n}: a gated tile has 128 columns of each projection")
    results = config.blocks // parts  # hidden blocks of a tile
    if hidden_blocks % results:
        raise ValueError(f"tiles of {results * BLOCK} columns do not divide hidden={hidden}")

    def column_block(n, block):
        """Projections lie one after the other; a gated tile takes the same block of both."""
        return block * hidden_blocks + n if gated else n * results + block

    def finish(totals, warpgroup, row, n, refs, scratch):
        out, out_scales = refs
        for result in range(results):
            value = act.value(totals if gated else (totals[result],))
            block = n * results + result
            scale = jnp.maximum(jnp.max(jnp.abs(value), axis=1) * (1 / LARGEST), SMALLEST_SCALE)
            out_scales[block, pl.ds(row, HALF)] = scale
            inverse = lax.broadcast_in_dim(1.0 / scale, value.shape, [0])
            buffer = scratch["out_smem"].at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            buffer[...] = (value * inverse).astype(E4M3)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, out.at[pl.ds(row, HALF), pl.ds(block * BLOCK, BLOCK)])

    kernel = promoted_kernel(
        name="fp8_experts_up",
        finish=finish,
        scratch={"out_smem": plgpu.SMEM((COMPUTE, HALF, BLOCK), E4M3, transforms=swizzled(E4M3))},
        n_tiles=hidden_blocks // results,
        k_steps=d_model // BLOCK,
        column_block=column_block,
        config=config,
        out_type=[
            jax.ShapeDtypeStruct((places, hidden), E4M3),
            jax.ShapeDtypeStruct((hidden_blocks, places), jnp.float32),
        ],
    )
    out = kernel(
        tile_map(sizes_S, places),
        x_AD,
        scales_KA,
        w_in.values.reshape(slots, parts * hidden, d_model),
        w_in.scales.reshape(slots, parts * hidden_blocks, d_model // BLOCK),
    )
    return out[0], out[1]


def down(
    a_AH: jax.Array,
    scales_KA: jax.Array,
    w_out: QuantizedMatrices,
    sizes_S: jax.Array,
    *,
    config: PromotedConfig | None = None,
) -> jax.Array:
    """Hidden activations @ w_out of the group.

    Args:
        a_AH: e4m3 hidden activations.
        scales_KA: float32 [H/128, A].
        w_out: e4m3 [S, D, H].
        sizes_S: int32, multiples of 128.
        config: sizes; None chooses.

    Returns:
        bfloat16 [A, D]. Rows past the last group are not written.
    """
    _check("w_out", w_out)
    _, d_model, hidden = w_out.values.shape
    places = a_AH.shape[0]
    config = config or _config(2 - d_model // BLOCK % 2)
    blocks = config.blocks
    if d_model % config.tile_n:
        raise ValueError(f"tiles of {config.tile_n} columns do not divide d_model={d_model}")

    def finish(totals, warpgroup, row, n, refs, scratch):
        for block, total in enumerate(totals):
            column = (n * blocks + block) * BLOCK
            values = total.astype(jnp.bfloat16)
            store_strips(values, refs[0], scratch["out_smem"], warpgroup, row, column)

    kernel = promoted_kernel(
        name="fp8_experts_down",
        finish=finish,
        scratch={"out_smem": out_scratch(jnp.bfloat16)},
        n_tiles=d_model // config.tile_n,
        k_steps=hidden // BLOCK,
        column_block=lambda n, block: n * blocks + block,
        config=config,
        out_type=[jax.ShapeDtypeStruct((places, d_model), jnp.bfloat16)],
    )
    tiles = tile_map(sizes_S, places)
    return kernel(tiles, a_AH, scales_KA, w_out.values, w_out.scales)[0]


def _weighted_sum(y_AD: jax.Array, scores_RJ: jax.Array, place_RJ: jax.Array) -> jax.Array:
    """Each row's places, weighted and summed in float32; a place that is none adds nothing."""
    total = jnp.zeros((place_RJ.shape[0], y_AD.shape[1]), jnp.float32)
    for j in range(place_RJ.shape[1]):
        taken = y_AD.at[place_RJ[:, j]].get(mode="fill", fill_value=0).astype(jnp.float32)
        total = total + taken * scores_RJ[:, j : j + 1]
    return total


def fp8_experts(
    x_RD: jax.Array,
    w_in: QuantizedMatrices,
    w_out: QuantizedMatrices,
    scores_RJ: jax.Array,
    place_RJ: jax.Array,
    copy_A: jax.Array,
    sizes_S: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """Σ_j scores[r, j] · act(x[r] @ w_in[slot]) @ w_out[slot], products of e4m3 by e4m3.

    D and H are multiples of 128. No gradients.

    Args:
        x_RD: bfloat16 rows.
        w_in: e4m3 [S, N, H, D], N = 2 for gated activations, the gate first.
        w_out: e4m3 [S, D', H]; outputs may have another width than rows.
        scores_RJ: float32 weights of the assignments.
        place_RJ: int32, the place of each assignment; A for none.
        copy_A: int32, the flat assignment r·J + j of each place; R·J for none.
        sizes_S: int32, places of each slot, multiples of `ROWS` (128).
        activation: `swiglu`, `geglu`, `swiglu_oai`, `gelu` or `relu2`.

    Returns:
        [R, D'] in x's dtype, summed in float32 and rounded once.

    Raises:
        ValueError: weights that are not e4m3, or widths that are no multiples of 128.
    """
    _check("w_in", w_in)
    _check("w_out", w_out)
    if place_RJ.size == 0 or copy_A.size == 0:
        return jnp.zeros((x_RD.shape[0], w_out.values.shape[1]), x_RD.dtype)
    if copy_A.size % ROWS:
        raise ValueError(f"{copy_A.size} places are no multiple of {ROWS}")
    x_AD, scales = rows_of_places(x_RD, copy_A // place_RJ.shape[1])
    a_AH, a_scales = up(x_AD, scales, w_in, sizes_S, activation=activation)
    y_AD = down(a_AH, a_scales, w_out, sizes_S)
    return _weighted_sum(y_AD, scores_RJ, place_RJ).astype(x_RD.dtype)
