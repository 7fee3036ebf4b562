"""What a row looks like on the wire: one uint8 payload holding activations, scores and slot ids.

Integer payloads stop gradients silently, so packing, exchange and unpacking sit together inside
one custom VJP: the backward sends the rows' cotangents in the rows' dtype and, beside them in the
same payload, the scores' cotangents in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
from jax import lax
from jax import numpy as jnp

from sharding import collectives

__all__ = ["exchange_rows", "pack", "row_bytes", "unpack"]


def row_bytes(d_model: int, dtype, copies: int) -> tuple[int, int, int]:
    """Bytes of one row on the wire, for byte counts.

    Args:
        d_model: D.
        dtype: dtype of activations on the wire.
        copies: J, assignments that a row carries.

    Returns:
        (dispatch, combine, dispatch backward) bytes; combine's backward equals combine.
    """
    activations = d_model * jnp.dtype(dtype).itemsize
    return activations + copies * 8, activations, activations + copies * 4


def pack(parts: Sequence[jax.Array]) -> jax.Array:
    """Lays arrays [M, n_i] of any dtype side by side as bytes: uint8 [M, Σ n_i·itemsize_i]."""
    return jnp.concatenate(
        [lax.bitcast_convert_type(p, jnp.uint8).reshape(p.shape[0], -1) for p in parts], axis=1
    )


def unpack(payload: jax.Array, layout: Sequence[tuple[int, jnp.dtype]]) -> list[jax.Array]:
    """Inverse of `pack`.

    Args:
        payload: uint8 [M, bytes].
        layout: (n_i, dtype_i) of each part.
    """
    parts, offset = [], 0
    for width, dtype in layout:
        size = jnp.dtype(dtype).itemsize
        piece = payload[:, offset : offset + width * size]
        if size > 1:
            piece = piece.reshape(payload.shape[0], width, size)
        parts.append(lax.bitcast_convert_type(piece, dtype))
        offset += width * size
    return parts


def _exchange(parts: Sequence[jax.Array], axis: str) -> list[jax.Array]:
    devices = collectives.axis_size(axis)
    layout = [(p.shape[1], p.dtype) for p in parts]
    payload = pack(parts)
    sent = payload.reshape(devices, -1, payload.shape[1])
    received = collectives.all_to_all(sent, axis).reshape(payload.shape)
    return unpack(received, layout)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange_rows(
    rows_MD: jax.Array, scores_MJ: jax.Array, ids_MJ: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sends bucket g of the rows to device g of the axis, as one payload.

    Args:
        rows_MD: [G·C, D] activations, bucket g in rows g·C … g·C + C − 1.
        scores_MJ: float32 weights of the assignments in a row.
        ids_MJ: int32 local slot of each assignment.
        axis: mesh axis of size G.

    Returns:
        The same three for the rows received, bucket g from device g.
    """
    rows, scores, ids = _exchange((rows_MD, scores_MJ, ids_MJ), axis)
    return rows, scores, ids


def _exchange_fwd(rows_MD, scores_MJ, ids_MJ, axis):
    return exchange_rows(rows_MD, scores_MJ, ids_MJ, axis), None


def _exchange_bwd(axis, _, cts):
    rows_ct, scores_ct, _ = cts
    rows_back, scores_back = _exchange((rows_ct, scores_ct), axis)
    return rows_back, scores_back, None


exchange_rows.defvjp(_exchange_fwd, _exchange_bwd)
