"""Fused experts on TPUs: the kernels of the forward and of the backward.

As on Hopper, but for the gather: XLA gathers the rows before the products, since a copy of a single
row from HBM would be narrower than the tiles in which a TPU keeps bfloat16 there. Projections and
their matrices lie in planes, [N, A, H] and [S, N, D, H], so that a block of them is one piece of
memory; a compiler may keep the weights that way from the start, since they are only transposed.
"""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.grouped_matmul.spans import group_spans
from pallas_kernels.tpu.rows import (
    block,
    plain_product,
    planes_block,
    rows_product,
    scores_block,
)
from pallas_kernels.tpu.tiles import LANES, choose_tiles
from pallas_kernels.tpu.weights import weights_product

__all__ = ["down", "down_backward", "rows_gradient", "up", "w_in_gradient", "w_out_gradient"]


def _spans(sizes_S: jax.Array, places: int) -> jax.Array:
    return group_spans(sizes_S, sizes_S.shape[0], None, places)


def up(
    x_AD: jax.Array,
    w_in_SDNH: jax.Array,
    sizes_S: jax.Array,
    *,
    activation: str,
    keep: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """act(x @ w_in of the group).

    Args:
        x_AD: bfloat16 or float32, the token row of each place.
        w_in_SDNH: input projections, same dtype; N is 2 for gated activations.
        sizes_S: int32, any sizes.
        activation: name.
        keep: whether the projections are written too, for the backward.

    Returns:
        [A, H], and the projections [N, A, H] or None. Tiles past the last group are not written.
    """
    act, dtype = ACTIVATIONS[activation], x_AD.dtype
    slots, d_model, parts, hidden = w_in_SDNH.shape
    places = x_AD.shape[0]
    blocks = 1 + parts if keep else 1
    tiles = choose_tiles(places, slots, d_model, hidden, dtype, parts=parts, blocks=blocks)

    def finish(sums, _, outputs, store):
        store(outputs[0], ..., act.value(sums))
        for part, values in enumerate(sums if keep else []):
            store(outputs[1], part, values)

    outputs = [(jax.ShapeDtypeStruct((places, hidden), dtype), block(tiles))]
    if keep:
        shape = jax.ShapeDtypeStruct((parts, places, hidden), dtype)
        outputs.append((shape, planes_block(tiles, parts)))
    out = rows_product(
        finish,
        x_AD[None],
        w_in_SDNH.swapaxes(1, 2),
        _spans(sizes_S, places),
        name="experts_up",
        tiles=tiles,
        outputs=outputs,
    )
    return out[0], out[1] if keep else None


def _diagonal() -> jax.Array:
    square = (LANES, LANES)
    row, column = (lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
    return row == column


def _to_column(row: jax.Array) -> jax.Array:
    """[1, M] → [M, 1]: each value alone in its row of a square, summed along it."""
    pieces = [row[:, i : i + LANES] for i in range(0, row.shape[1], LANES)]
    squares = [jnp.where(_diagonal(), piece, 0.0) for piece in pieces]
    return jnp.concatenate([jnp.sum(square, axis=1, keepdims=True) for square in squares])


def _to_row(column: jax.Array) -> jax.Array:
    """[M, 1] → [1, M]."""
    pieces = [column[i : i + LANES] for i in range(0, column.shape[0], LANES)]
    squares = [jnp.where(_diagonal(), piece, 0.0) for piece in pieces]
    return jnp.concatenate([jnp.sum(square, axis=0, keepdims=True) for square in squares], axis=1)


def down_backward(
    ct_AD: jax.Array,
    w_out_SHD: jax.Array,
    h_NAH: jax.Array,
    scores_A: jax.Array,
    sizes_S: jax.Array,
    *,
    activation: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the cotangent of the layer's output to those of the input projections.

    Args:
        ct_AD: bfloat16 or float32, for each place the cotangent of its token row's sum.
        w_out_SHD: output projections, same dtype.
        h_NAH: input projections kept by `up`.
        scores_A: float32, the weight of each place; 0 in padding.
        sizes_S: int32, any sizes.
        activation: name.

    Returns:
        cotangent of h [N, A, H]; act(h) times the score [A, H]; float32 [tiles of columns, A],
        partial sums of the scores' cotangents. Tiles past the last group are not written.
    """
    act, dtype = ACTIVATIONS[activation], ct_AD.dtype
    slots, hidden, d_model = w_out_SHD.shape
    parts, places, _ = h_NAH.shape
    tiles = choose_tiles(
        places,
        slots,
        d_model,
        hidden,
        dtype,
        blocks=2 * parts + 1 + 2,  # 2: float32 temporaries
    )

    def finish(sums, inputs, outputs, store):
        h, scores = inputs
        h_ct, weighted, scores_ct = outputs
        ct, score = sums[0], _to_column(scores[...])
        kept = tuple(h[part].astype(jnp.float32) for part in range(parts))
        value, gradients = act.gradients(kept, ct * score)
        for part, gradient in enumerate(gradients):
            store(h_ct, part, gradient)
        store(weighted, ..., value * score)
        total = jnp.sum(ct * value, axis=1, keepdims=True)
        store(scores_ct, ..., _to_row(total), axis=1)

    h_ct, weighted_AH, partial_sums = rows_product(
        finish,
        ct_AD[None],
        w_out_SHD[:, None],
        _spans(sizes_S, places),
        name="experts_down_backward",
        tiles=tiles,
        transpose_rhs=True,
        inputs=[
            (h_NAH, planes_block(tiles, parts)),
            (scores_A.reshape(1, 1, places), scores_block(tiles)),
        ],
        outputs=[
            (jax.ShapeDtypeStruct((parts, places, hidden), dtype), planes_block(tiles, parts)),
            (jax.ShapeDtypeStruct((places, hidden), dtype), block(tiles)),
            (
                jax.ShapeDtypeStruct((hidden // tiles.columns, 1, places), jnp.float32),
                scores_block(tiles, of_columns=True),
            ),
        ],
    )
    return h_ct, weighted_AH, partial_sums[:, 0]


def down(a_AH: jax.Array, w_out_SHD: jax.Array, sizes_S: jax.Array) -> jax.Array:
    """Products [A, D] with the output projections. Tiles past the last group are not written."""
    spans_2S = _spans(sizes_S, a_AH.shape[0])
    return plain_product(a_AH[None], w_out_SHD[:, None], spans_2S, name="experts_down")


def rows_gradient(h_ct_NAH: jax.Array, w_in_SDNH: jax.Array, sizes_S: jax.Array) -> jax.Array:
    """Cotangents [A, D] of the rows, from those of the projections."""
    return plain_product(
        h_ct_NAH,
        w_in_SDNH.swapaxes(1, 2),
        _spans(sizes_S, h_ct_NAH.shape[1]),
        transpose_rhs=True,
        name="rows_gradient",
    )


def w_in_gradient(
    x_AD: jax.Array,
    h_ct_NAH: jax.Array,
    sizes_S: jax.Array,
) -> jax.Array:
    """Gradients [S, D, N, H] of the input projections' matrices; `x_AD` as for `up`."""
    out_SNDH = weights_product(
        x_AD,
        h_ct_NAH,
        _spans(sizes_S, h_ct_NAH.shape[1]),
        name="w_in_gradient",
        dtype=x_AD.dtype,
    )
    return out_SNDH.swapaxes(1, 2)


def w_out_gradient(weighted_AH: jax.Array, ct_AD: jax.Array, sizes_S: jax.Array) -> jax.Array:
    """Gradients [S, H, D] of the output projections; `ct_AD` as for `down_backward`."""
    return weights_product(
        weighted_AH,
        ct_AD[None],
        _spans(sizes_S, weighted_AH.shape[0]),
        name="w_out_gradient",
        dtype=ct_AD.dtype,
    )[:, 0]
