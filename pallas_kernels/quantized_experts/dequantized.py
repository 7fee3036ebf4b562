"""Many rows: the matrices as bfloat16 for the time of a layer, and the kernels for those.

The kernel that reads 8-bit weights converts a matrix again for every 64 rows. It and the
conversion bound it to about 330 TFLOP/s on an H100 (Mixtral shapes); the bfloat16 kernels reach 650
and more. One conversion of all matrices moves 5 bytes for each number.
"""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.fused_experts import api as fused
from pallas_kernels.quantized_experts.format import QuantizedMatrices, dequantize

__all__ = ["MANY_ROWS", "pays", "quantized_experts"]

MANY_ROWS = 768
"""Assignments of a slot, on average, from which on converting all matrices first is faster.

2·A / S FLOPs for each number of the matrices take A / S · 3 fs longer in the one way, 5 bytes
written and read 2 ps in the other.
"""


def pays(assignments: int, slots: int) -> bool:
    """Whether a layer of so many assignments is faster so."""
    return assignments >= MANY_ROWS * slots


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
    assignments: int,
) -> jax.Array:
    """As `pallas_kernels.quantized_experts.api.quantized_experts`, with the Hopper kernels.

    The matrices are rounded to bfloat16, and take that much memory for the time of the layer.
    """
    # Not before the rows are there: a program of many layers would hold all matrices at once.
    x_RD, w_in, w_out = lax.optimization_barrier((x_RD, w_in, w_out))
    return fused.fused_experts(
        x_RD,
        jnp.swapaxes(dequantize(w_in, x_RD.dtype), 1, 2),
        dequantize(w_out, x_RD.dtype),
        scores_RJ,
        place_RJ,
        copy_A,
        sizes_S,
        activation=activation,
        assignments=assignments,
        backend="mosaic_gpu",
    )
