"""Grouped matmul in plain JAX: a loop over groups, exact, E times the work."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.grouped_matmul.spans import group_spans

__all__ = ["grouped_matmul", "weights_gradient"]


def _inside(rows: int, start: jax.Array, end: jax.Array) -> jax.Array:
    index_M = jnp.arange(rows, dtype=jnp.int32)
    return ((index_M >= start) & (index_M < end))[:, None]


def grouped_matmul(
    lhs_MK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    group_offset: jax.Array | int | None = None,
) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m]; rows of no group that has a matrix are zero.

    Args:
        lhs_MK: rows, sorted by group.
        rhs_GKN: one matrix for each group.
        group_sizes_G: int32, sum at most M; G of them, or more with `group_offset`.
        group_offset: the group whose matrix is the first; None: 0.

    Returns:
        [M, N] in lhs's dtype, accumulated in float32.
    """

    def step(out_MN, group):
        rhs_KN, start, end = group
        product = jnp.dot(lhs_MK, rhs_KN, precision="highest", preferred_element_type=jnp.float32)
        return jnp.where(_inside(lhs_MK.shape[0], start, end), product, out_MN), None

    out = jnp.zeros((lhs_MK.shape[0], rhs_GKN.shape[2]), jnp.float32)
    spans_2G = group_spans(group_sizes_G, rhs_GKN.shape[0], group_offset, lhs_MK.shape[0])
    return lax.scan(step, out, (rhs_GKN, *spans_2G))[0].astype(lhs_MK.dtype)


def weights_gradient(
    lhs_MK: jax.Array,
    ct_MN: jax.Array,
    group_sizes_G: jax.Array,
    dtype: Any,
    groups: int | None = None,
    group_offset: jax.Array | int | None = None,
) -> jax.Array:
    """Gradient of the matrices: lhs[group]ᵀ @ ct[group]; zero for empty groups.

    Args:
        lhs_MK, ct_MN: rows, sorted by group.
        group_sizes_G: int32.
        dtype: dtype of the result.
        groups, group_offset: G, how many groups have a matrix, and the first of them; None: all.

    Returns:
        [G, K, N], accumulated in float32.
    """

    def step(_, bounds):
        # Both are masked: a zero times what another group has of inf or nan is nan.
        inside_M1 = _inside(lhs_MK.shape[0], *bounds)
        masked_MK, masked_MN = (jnp.where(inside_M1, a, 0) for a in (lhs_MK, ct_MN))
        return None, jnp.dot(
            masked_MK.T, masked_MN, precision="highest", preferred_element_type=jnp.float32
        ).astype(dtype)

    groups = group_sizes_G.shape[0] if groups is None else groups
    spans_2G = group_spans(group_sizes_G, groups, group_offset, lhs_MK.shape[0])
    return lax.scan(step, None, tuple(spans_2G))[1]
