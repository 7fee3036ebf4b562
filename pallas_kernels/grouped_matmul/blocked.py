"""Grouped matmul as one batched product over blocks of rows, each block in one group.

Plain XLA, any platform. It does the groups' own work plus the padding of each group to a whole
number of blocks, and copies one matrix per block, for some blocks at a time where all would take
too much memory. Where groups are not padded already, it pads them by a gather, and takes the rows
from the blocks by another. `lax.ragged_dot` does G times the work on CPU and on CUDA.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.grouped_matmul.blocks import (
    block_size,
    cut_into_blocks,
    in_batches,
    last_before,
)
from pallas_kernels.grouped_matmul.spans import group_spans
from pallas_kernels.precision import precision_of

__all__ = ["block_products", "grouped_matmul", "weights_gradient"]


def block_products(lhs_BMK: jax.Array, rhs_BKN: jax.Array) -> jax.Array:
    """Each block's product, float32."""
    return jnp.einsum(
        "bmk,bkn->bmn",
        lhs_BMK,
        rhs_BKN,
        precision=precision_of(lhs_BMK.dtype),
        preferred_element_type=jnp.float32,
    )


def _products(lhs_BMK: jax.Array, rhs_GKN: jax.Array, group_B: jax.Array) -> jax.Array:
    """Each block times its group's matrix, in the blocks' dtype."""

    def some(lhs_BMK: jax.Array, group_B: jax.Array) -> jax.Array:
        return block_products(lhs_BMK, rhs_GKN[group_B]).astype(lhs_BMK.dtype)

    return in_batches(some, lhs_BMK, group_B, rhs_GKN.nbytes // rhs_GKN.shape[0])


def _in_place(lhs_MK: jax.Array, rhs_GKN: jax.Array, spans_2G: jax.Array, block: int) -> jax.Array:
    """The product where the groups are whole blocks."""
    rows = lhs_MK.shape[0]
    first_B = jnp.arange(0, rows, block, dtype=jnp.int32)
    group_B = last_before(first_B, spans_2G[1])
    out_BMN = _products(lhs_MK.reshape(rows // block, block, -1), rhs_GKN, group_B)
    inside_B = (first_B >= spans_2G[0, 0]) & (first_B < spans_2G[1, -1])
    out_BMN = jnp.where(inside_B[:, None, None], out_BMN, 0)
    return out_BMN.reshape(rows, -1)


def _gathered(lhs_MK: jax.Array, rhs_GKN: jax.Array, spans_2G: jax.Array, block: int) -> jax.Array:
    """The product where the groups have any size."""
    rows = lhs_MK.shape[0]
    blocks = cut_into_blocks(spans_2G, rows=rows, block=block)
    lhs_BMK = lhs_MK.at[blocks.row_BM].get(mode="fill", fill_value=0)
    out_PN = _products(lhs_BMK, rhs_GKN, blocks.group_B).reshape(blocks.row_BM.size, -1)
    place_M = blocks.place_of(jnp.arange(rows, dtype=jnp.int32))
    return out_PN.at[place_M].get(mode="fill", fill_value=0)


def grouped_matmul(
    lhs_MK: jax.Array,
    rhs_GKN: jax.Array,
    group_sizes_G: jax.Array,
    alignment: int,
    group_offset: jax.Array | int | None = None,
) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m]; rows of no group that has a matrix are zero.

    Args:
        lhs_MK: rows sorted by group.
        rhs_GKN: one matrix for each group.
        group_sizes_G: int32, multiples of `alignment`; G of them, or more with `group_offset`.
        alignment: where it divides M and is at least half of `block_size`, blocks lie in place.
            Half, because M may count the padding up to it.
        group_offset: the group whose matrix is the first; None: 0.

    Returns:
        [M, N] in lhs's dtype, accumulated in float32.
    """
    rows = lhs_MK.shape[0]
    spans_2G = group_spans(group_sizes_G, rhs_GKN.shape[0], group_offset, rows)
    block = block_size(rows, group_sizes_G.shape[0])
    if rows % alignment == 0 and 2 * alignment >= block:
        return _in_place(lhs_MK, rhs_GKN, spans_2G, alignment)
    return _gathered(lhs_MK, rhs_GKN, spans_2G, block)


def weights_gradient(
    lhs_MK: jax.Array,
    ct_MN: jax.Array,
    group_sizes_G: jax.Array,
    block: int,
    dtype: Any,
    groups: int | None = None,
    group_offset: jax.Array | int | None = None,
) -> jax.Array:
    """Gradient of the matrices: lhs[group]ᵀ @ ct[group]; zero for empty groups.

    Takes some rows of every group at a time, as one batched product, until the largest group is
    through. There is no scatter: on a GPU one with large slices is either not deterministic or,
    with sorted indices, needs more registers than there are.

    Args:
        lhs_MK, ct_MN: rows sorted by group.
        group_sizes_G: int32.
        block: least number of rows of a group that are taken at a time.
        dtype: dtype of the result.
        groups, group_offset: G, how many groups have a matrix, and the first of them; None: all.

    Returns:
        [G, K, N], accumulated in float32.
    """
    rows = lhs_MK.shape[0]
    while 16 * block * group_sizes_G.shape[0] <= rows:  # an eighth of a mean group: little waste
        block *= 2
    groups = group_sizes_G.shape[0] if groups is None else groups
    starts_G, ends_G = group_spans(group_sizes_G, groups, group_offset, rows)
    offset_B = jnp.arange(block, dtype=starts_G.dtype)

    def step(i: jax.Array, sum_GKN: jax.Array) -> jax.Array:
        index_GB = starts_G[:, None] + (i * block).astype(starts_G.dtype) + offset_B
        index_GB = jnp.where(index_GB < ends_G[:, None], index_GB, rows)
        lhs = lhs_MK.at[index_GB].get(mode="fill", fill_value=0)
        ct = ct_MN.at[index_GB].get(mode="fill", fill_value=0)
        product = jnp.einsum(
            "gmk,gmn->gkn",
            lhs,
            ct,
            precision=precision_of(lhs.dtype),
            preferred_element_type=jnp.float32,
        )
        return sum_GKN + product

    zeros = jnp.zeros((groups, lhs_MK.shape[1], ct_MN.shape[1]), jnp.float32)
    steps = jnp.max(-(-(ends_G - starts_G) // block), initial=0)
    return lax.fori_loop(0, steps, step, zeros).astype(dtype)
