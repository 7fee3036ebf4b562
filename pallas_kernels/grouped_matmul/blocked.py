"""Grouped matmul as one batched product over blocks of rows, each block in one group.

Plain XLA, any platform. It does the groups' own work plus the padding of each group to a whole
number of blocks, and copies one matrix per block. Where groups are not padded already, it pads them
by a gather, and takes the rows from the blocks by another. `lax.ragged_dot` does G times the work
on CPU and on CUDA.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.grouped_matmul.spans import group_spans
from pallas_kernels.precision import precision_of

__all__ = ["block_size", "grouped_matmul", "weights_gradient"]


def block_size(rows: int, groups: int) -> int:
    """A power of two of at most 128 near half the mean group, so that padding stays moderate."""
    block = 1
    while block < 128 and block * 2 * groups <= rows:
        block *= 2
    return block


def _product(lhs_BMK: jax.Array, rhs_BKN: jax.Array) -> jax.Array:
    return jnp.einsum(
        "bmk,bkn->bmn",
        lhs_BMK,
        rhs_BKN,
        precision=precision_of(lhs_BMK.dtype),
        preferred_element_type=jnp.float32,
    )


def _last_before(index: jax.Array, ends_G: jax.Array) -> jax.Array:
    """The first group that ends after each index, which is the last one where none does."""
    group = jnp.searchsorted(ends_G, index, side="right", method="compare_all")
    return jnp.minimum(group, ends_G.shape[0] - 1)


def _in_place(lhs_MK: jax.Array, rhs_GKN: jax.Array, spans_2G: jax.Array, block: int) -> jax.Array:
    """The product where the groups are whole blocks."""
    rows = lhs_MK.shape[0]
    first_B = jnp.arange(0, rows, block, dtype=jnp.int32)
    group_B = _last_before(first_B, spans_2G[1])
    out_BMN = _product(lhs_MK.reshape(rows // block, block, -1), rhs_GKN[group_B])
    inside_B = (first_B >= spans_2G[0, 0]) & (first_B < spans_2G[1, -1])
    out_BMN = jnp.where(inside_B[:, None, None], out_BMN, 0)
    return out_BMN.reshape(rows, -1).astype(lhs_MK.dtype)


def _gathered(lhs_MK: jax.Array, rhs_GKN: jax.Array, spans_2G: jax.Array, block: int) -> jax.Array:
    """The product where the groups have any size."""
    rows, (begin_G, end_G) = lhs_MK.shape[0], spans_2G
    blocks_G = -(-(end_G - begin_G) // block)
    after_G = jnp.cumsum(blocks_G, dtype=jnp.int32)
    before_G = after_G - blocks_G

    index_B = jnp.arange(rows // block + min(rows, begin_G.shape[0]), dtype=jnp.int32)
    group_B = _last_before(index_B, after_G)
    first_B = begin_G[group_B] + (index_B - before_G[group_B]) * block
    row_BM = first_B[:, None] + jnp.arange(block, dtype=jnp.int32)
    row_BM = jnp.where(row_BM < end_G[group_B][:, None], row_BM, rows)
    out_BMN = _product(lhs_MK.at[row_BM].get(mode="fill", fill_value=0), rhs_GKN[group_B])

    row_M = jnp.arange(rows, dtype=jnp.int32)
    group_M = _last_before(row_M, end_G)
    place_M = before_G[group_M] * block + row_M - begin_G[group_M]
    inside_M = (row_M >= begin_G[0]) & (row_M < end_G[-1])
    out_PN = out_BMN.astype(lhs_MK.dtype).reshape(index_B.shape[0] * block, -1)
    place_M = jnp.where(inside_M, place_M, out_PN.shape[0])
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
        alignment: where it divides M and is at least `block_size`, blocks lie in place.
        group_offset: the group whose matrix is the first; None: 0.

    Returns:
        [M, N] in lhs's dtype, accumulated in float32.
    """
    rows = lhs_MK.shape[0]
    spans_2G = group_spans(group_sizes_G, rhs_GKN.shape[0], group_offset, rows)
    block = block_size(rows, group_sizes_G.shape[0])
    if rows % alignment == 0 and alignment >= block:
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
