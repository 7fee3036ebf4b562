"""Quantized experts in plain JAX: dequantized matrices, grouped products, gathers."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.grouped_matmul import reference
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
    source_A: jax.Array,
    sizes_S: jax.Array,
    *,
    activation: str,
    rows: str,
) -> jax.Array:
    """As `pallas_kernels.quantized_experts.api.quantized_experts`, with the row of each place.

    The matrices are dequantized to x's dtype, or to float32 where rows are float8: they take that
    much memory for the time of the layer.
    """
    slots, parts, hidden, d_model = w_in.values.shape
    act = ACTIVATIONS[activation]
    dtype = jnp.float32 if rows == "float8" else x_RD.dtype

    def rounded(values: jax.Array) -> jax.Array:
        return (rows_through_float8(values) if rows == "float8" else values).astype(dtype)

    x_AD = rounded(x_RD).at[source_A].get(mode="fill", fill_value=0)
    w_in_SDM = jnp.swapaxes(dequantize(w_in, dtype), 1, 2).reshape(slots, d_model, parts * hidden)
    h_AM = reference.grouped_matmul(x_AD, w_in_SDM, sizes_S).astype(jnp.float32)
    a_AH = rounded(act.value(tuple(jnp.split(h_AM, parts, axis=1))))
    y_AD = reference.grouped_matmul(a_AH, dequantize(w_out, dtype), sizes_S)
    taken_RJD = y_AD.at[place_RJ].get(mode="fill", fill_value=0).astype(jnp.float32)
    return jnp.sum(taken_RJD * scores_RJ[..., None], axis=1).astype(x_RD.dtype)
