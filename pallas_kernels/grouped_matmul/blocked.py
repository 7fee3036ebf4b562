"""Grouped matmul as one batched product over blocks of rows, each block in one group.

Plain XLA, any platform. It does the groups' own work plus the padding of each group to a whole
number of blocks, and copies one matrix per block. `lax.ragged_dot` does G times the work on CPU
and on CUDA.
"""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.precision import precision_of

__all__ = ["block_size", "grouped_matmul", "weights_gradient"]


def block_size(rows: int, groups: int) -> int:
    """A power of two of at most 128 near half the mean group, so that padding stays moderate."""
    block = 1
    while block < 128 and block * 2 * groups <= rows:
        block *= 2
    return block


def _block_group(group_sizes_G: jax.Array, blocks: int, block: int) -> jax.Array:
    """The group of each block; blocks past the last group take the last one (their rows are 0)."""
    ends_G = jnp.cumsum(group_sizes_G) // block
    index = jnp.arange(blocks, dtype=ends_G.dtype)
    group = jnp.searchsorted(ends_G, index, side="right", method="compare_all")
    return jnp.minimum(group, group_sizes_G.shape[0] - 1)


def grouped_matmul(
    lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array, block: int
) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m].

    Args:
        lhs_MK: rows sorted by group; rows past the last group must be zero.
        rhs_GKN: one matrix for each group.
        group_sizes_G: int32, multiples of `block`.
        block: rows of a block; divides M.

    Returns:
        [M, N] in lhs's dtype, accumulated in float32.
    """
    blocks = lhs_MK.shape[0] // block
    lhs = lhs_MK.reshape(blocks, block, lhs_MK.shape[1])
    rhs = rhs_GKN[_block_group(group_sizes_G, blocks, block)]
    out = jnp.einsum(
        "bmk,bkn->bmn",
        lhs,
        rhs,
        precision=precision_of(lhs.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(lhs_MK.shape[0], -1).astype(lhs_MK.dtype)


def weights_gradient(
    lhs_MK: jax.Array, ct_MN: jax.Array, group_sizes_G: jax.Array, block: int, dtype
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

    Returns:
        [G, K, N], accumulated in float32.
    """
    rows, groups = lhs_MK.shape[0], group_sizes_G.shape[0]
    while 16 * block * groups <= rows:  # an eighth of a mean group: few steps, little waste
        block *= 2
    ends_G = jnp.cumsum(group_sizes_G)
    starts_G = ends_G - group_sizes_G
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
    steps = jnp.max(-(-group_sizes_G // block), initial=0)
    return lax.fori_loop(0, steps, step, zeros).astype(dtype)
