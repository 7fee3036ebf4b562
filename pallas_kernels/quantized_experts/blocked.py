"""Quantized experts by blocks of rows, each with its slot's matrices, dequantized for the block.

Plain XLA, any platform and shape. Work is the assignments' own, and the padding of each slot to
whole blocks; a slot that nobody wants is not read. Each block has its slot's matrices for itself,
of some blocks at a time where that were too much memory.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp

from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.fused_experts.api import sum_places
from pallas_kernels.fused_experts.grouped import blocks_of_places
from pallas_kernels.grouped_matmul.blocked import block_products
from pallas_kernels.grouped_matmul.blocks import block_size, in_batches
from pallas_kernels.quantized_experts.format import (
    QuantizedMatrices,
    dequantize,
    rows_through_float8,
)

__all__ = ["quantized_experts"]


def quantized_experts(
    x_RD: jax.Array,
    w_in: QuantizedMatrices,
    w_out: QuantizedMatrices,
    scores_RJ: jax.Array,
    place_RJ: jax.Array,
    copy_A: jax.Array,
    sizes_S: jax.Array,
    *,
    activation: str,
    rows: str,
    assignments: int,
) -> jax.Array:
    """As `pallas_kernels.quantized_experts.api.quantized_experts`."""
    slots, parts, _, d_model = w_in.values.shape
    block = block_size(assignments, slots)
    blocks, layout = blocks_of_places(
        place_RJ, copy_A, sizes_S, assignments=assignments, block=block
    )
    float8, out_dtype = rows == "float8", x_RD.dtype
    dtype = jnp.float32 if float8 else out_dtype

    def some(x_BMD: jax.Array, group_B: jax.Array) -> jax.Array:
        def of_blocks(matrices: QuantizedMatrices) -> jax.Array:
            return dequantize(jax.tree.map(lambda array: array[group_B], matrices), dtype)

        w_BNDH = of_blocks(w_in)
        h = tuple(block_products(x_BMD, w_BNDH[:, part]) for part in range(parts))
        a_BMH = ACTIVATIONS[activation].value(h)
        if float8:
            a_BMH = rows_through_float8(a_BMH.reshape(-1, a_BMH.shape[-1])).reshape(a_BMH.shape)
        return block_products(a_BMH.astype(dtype), of_blocks(w_out)).astype(out_dtype)

    x_RD = rows_through_float8(x_RD) if float8 else x_RD
    x_PD = x_RD.at[layout.source_M].get(mode="fill", fill_value=0)
    matrices = (w_in.values.size + w_out.values.size) // slots
    copied = matrices * jnp.dtype(dtype).itemsize
    y_BMD = in_batches(some, x_PD.reshape(-1, block, d_model), blocks.group_B, copied)
    return sum_places(
        y_BMD.reshape(-1, y_BMD.shape[-1]), scores_RJ, layout.row_NJ, out_dtype, "blocked"
    )
