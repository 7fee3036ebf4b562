"""Fused experts in plain JAX: the same sums as the kernels, by gathers and grouped products."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from pallas_kernels.fused_experts.activations import activate
from pallas_kernels.grouped_matmul import reference

__all__ = ["fused_experts"]


def fused_experts(
    x_RD: jax.Array,
    w_in_SDNH: jax.Array,
    w_out_SHD: jax.Array,
    scores_RJ: jax.Array,
    place_RJ: jax.Array,
    source_A: jax.Array,
    sizes_S: jax.Array,
    *,
    activation: str,
    b_in_SNH: jax.Array | None = None,
    b_out_SD: jax.Array | None = None,
) -> jax.Array:
    """As `pallas_kernels.fused_experts.api.fused_experts`; differentiable by JAX itself."""
    slots, d_model, parts, hidden = w_in_SDNH.shape
    x_AD = x_RD.at[source_A].get(mode="fill", fill_value=0)
    ones_A1 = jnp.ones_like(x_AD[:, :1])
    w_in = w_in_SDNH.reshape(slots, d_model, parts * hidden)
    h_AM = reference.grouped_matmul(x_AD, w_in, sizes_S)
    if b_in_SNH is not None:
        h_AM = h_AM + reference.grouped_matmul(ones_A1, b_in_SNH.reshape(slots, 1, -1), sizes_S)
    y_AD = reference.grouped_matmul(activate(h_AM, activation), w_out_SHD, sizes_S)
    if b_out_SD is not None:
        y_AD = y_AD + reference.grouped_matmul(ones_A1, b_out_SD[:, None], sizes_S)
    taken_RJD = y_AD.at[place_RJ].get(mode="fill", fill_value=0).astype(jnp.float32)
    return jnp.sum(taken_RJD * scores_RJ[..., None], axis=1).astype(x_RD.dtype)
