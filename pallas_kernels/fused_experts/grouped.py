"""Fused experts as grouped products and gathers, each product by the backend that serves it.

For any platform and shape, and for experts with biases. Work is the assignments' own, and the
padding of each slot to whole blocks. Nothing scatters activations, forward or backward.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import numpy as jnp

from pallas_kernels.fused_experts.activations import activate
from pallas_kernels.grouped_matmul.api import grouped_matmul, row_alignment
from pallas_kernels.grouped_matmul.blocks import Blocks, cut_into_blocks
from pallas_kernels.grouped_matmul.spans import group_spans
from pallas_kernels.row_map import RowMap, gather_rows, sum_rows

__all__ = ["blocks_of_places", "fused_experts"]


def blocks_of_places(
    place_RJ: jax.Array, copy_A: jax.Array, sizes_S: jax.Array, *, assignments: int, block: int
) -> tuple[Blocks, RowMap]:
    """Cuts each slot's assignments into blocks, whatever it is padded to.

    Args:
        place_RJ, copy_A, sizes_S: as for `pallas_kernels.fused_experts.api.fused_experts`.
        assignments: the most there can be.
        block: places of a block.

    Returns:
        the blocks, and the map between assignments and the places of the blocks.
    """
    copy_A = jnp.asarray(copy_A)  # numpy's have no `at`
    wanted_A = jnp.cumsum(copy_A < place_RJ.size, dtype=jnp.int32)
    before_A = jnp.concatenate([jnp.zeros((1,), jnp.int32), wanted_A])
    begin_S, end_S = group_spans(sizes_S, sizes_S.shape[0], None, copy_A.size)
    spans_2S = jnp.stack([begin_S, begin_S + before_A[end_S] - before_A[begin_S]])
    blocks = cut_into_blocks(spans_2S, rows=assignments, block=block)
    copy_BM = copy_A.at[blocks.row_BM].get(mode="fill", fill_value=place_RJ.size)
    return blocks, RowMap(blocks.place_of(place_RJ), copy_BM.reshape(-1))


def fused_experts(
    x_RD: jax.Array,
    w_in_SDNH: jax.Array,
    w_out_SHD: jax.Array,
    scores_RJ: jax.Array,
    place_RJ: jax.Array,
    copy_A: jax.Array,
    sizes_S: jax.Array,
    *,
    activation: str,
    b_in_SNH: jax.Array | None,
    b_out_SD: jax.Array | None,
    assignments: int,
    reserve_sms: int,
) -> jax.Array:
    """As `pallas_kernels.fused_experts.api.fused_experts`; differentiable by JAX itself."""
    slots, d_model, parts, hidden = w_in_SDNH.shape
    block = row_alignment(assignments, slots, d_model, hidden, x_RD.dtype)
    blocks, layout = blocks_of_places(
        place_RJ, copy_A, sizes_S, assignments=assignments, block=block
    )
    sizes_S = blocks.count_G * block
    product = partial(
        grouped_matmul, group_sizes_G=sizes_S, alignment=block, reserve_sms=reserve_sms
    )
    x_AD = gather_rows(x_RD, layout)
    h_AM = product(x_AD, w_in_SDNH.reshape(slots, d_model, parts * hidden))
    if b_in_SNH is not None:
        h_AM = h_AM + _bias_of_places(b_in_SNH.reshape(slots, -1), sizes_S, block, h_AM.shape[0])
    y_AD = product(activate(h_AM, activation), w_out_SHD)
    if b_out_SD is not None:
        y_AD = y_AD + _bias_of_places(b_out_SD, sizes_S, block, y_AD.shape[0])
    return sum_rows(y_AD, scores_RJ, layout).astype(x_RD.dtype)


def _bias_of_places(bias_SM: jax.Array, sizes_S: jax.Array, block: int, places: int) -> jax.Array:
    """Each place's bias [A, M]; its gradient sums the places of a slot.

    A product with a column of ones: exact, and its backward sums in float32 and in a fixed order,
    as for any weight. Indexing would scatter-add in the bias's dtype, which in bfloat16 stops
    growing after a few hundred rows.
    """
    inside_A = jnp.arange(places, dtype=jnp.int32) < jnp.sum(sizes_S)
    column_A1 = inside_A[:, None].astype(bias_SM.dtype)
    return grouped_matmul(column_A1, bias_SM[:, None], sizes_S, alignment=block)
