"""Grouped matmul on TPUs: rows with their group's matrix, and the matrices' gradients."""

from __future__ import annotations

from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.grouped_matmul.spans import group_spans
from pallas_kernels.tpu.rows import plain_product
from pallas_kernels.tpu.weights import weights_product

__all__ = ["grouped_matmul", "weights_gradient"]


def grouped_matmul(
    lhs_MK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    transpose_rhs: bool = False,
    group_offset: jax.Array | int | None = None,
) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m].

    Args:
        lhs_MK: bfloat16 or float32 rows sorted by group.
        rhs_GKN: one matrix for each group, same dtype; [G, N, K] with `transpose_rhs`. K and N are
            multiples of 128.
        group_sizes_G: int32, any sizes, maybe of more groups; fastest where multiples of the tiles'
            rows.
        transpose_rhs: see `rhs_GKN`.
        group_offset: the group whose matrix is the first; None: 0.

    Returns:
        [M, N], accumulated in float32; zero in rows of no group that has a matrix.
    """
    rows = lhs_MK.shape[0]
    spans_2G = group_spans(group_sizes_G, rhs_GKN.shape[0], group_offset, rows)
    out_MN = plain_product(
        lhs_MK[None],
        rhs_GKN[:, None],
        spans_2G,
        name="grouped_matmul",
        transpose_rhs=transpose_rhs,
    )
    index_M = jnp.arange(rows, dtype=jnp.int32)
    inside_M = (spans_2G[0, 0] <= index_M) & (index_M < spans_2G[1, -1])
    return jnp.where(inside_M[:, None], out_MN, jnp.zeros((), out_MN.dtype))


def weights_gradient(
    lhs_MK: jax.Array,
    ct_MN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    groups: int | None = None,
    group_offset: jax.Array | int | None = None,
    dtype: Any,
) -> jax.Array:
    """lhs[rows of g]ᵀ @ ct[rows of g]; zero for empty groups.

    Args:
        lhs_MK: bfloat16 or float32 rows sorted by group; what lies past the last one is not used.
        ct_MN: cotangents, same dtype. K and N are multiples of 128.
        group_sizes_G: int32, any sizes.
        groups, group_offset: how many groups have a matrix, and the first of them; None: all.
        dtype: of the result.

    Returns:
        [G, K, N], accumulated in float32.
    """
    groups = group_sizes_G.shape[0] if groups is None else groups
    spans_2G = group_spans(group_sizes_G, groups, group_offset, lhs_MK.shape[0])
    out = weights_product(lhs_MK, ct_MN[None], spans_2G, name="weights_gradient", dtype=dtype)
    return out[:, 0]
