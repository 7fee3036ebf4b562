"""What a row looks like on the wire: activations, scores and slot ids, as one payload if small.

Integer payloads stop gradients silently, so encoding, packing, exchange, unpacking and decoding sit
together inside one custom VJP: the backward sends the cotangents as `WireConfig` says, and beside
them the scores' cotangents in float32. Rounding is straight-through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax import lax
from jax import numpy as jnp

from moejax.config import WireConfig, WireFormat
from moejax.exchange.codec import decode, encode, encoded_bytes
from sharding import collectives

__all__ = [
    "exchange_rows",
    "gather_assignments",
    "gather_tokens",
    "pack",
    "return_rows",
    "row_bytes",
    "travel",
    "unpack",
]

ALONE_BYTES = 2**22
"""From here on a part of the rows crosses by itself."""


def row_bytes(d_model: int, dtype, copies: int, wire: WireConfig) -> tuple[int, int, int, int]:
    """Bytes of one row on the wire, for byte counts.

    Args:
        d_model: D.
        dtype: compute dtype.
        copies: J, assignments that a row carries.
        wire: rounding of what travels.

    Returns:
        (dispatch, combine, dispatch backward, combine backward) bytes.
    """
    there, here = wire.widths(d_model)
    out, home, back, again = (
        encoded_bytes(width, dtype, form)
        for width, form in zip((there, here, there, here), wire.formats, strict=True)
    )
    return out + copies * 8, home, back + copies * 4, again


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


def travel(
    parts: Sequence[jax.Array], crossing: Callable[[jax.Array], jax.Array]
) -> list[jax.Array]:
    """Sends parts [M, n_i] of rows across: large ones each by itself, the rest as one payload.

    Packing and unpacking cost two more passes over what is packed, a crossing of its own a launch.

    Args:
        parts: of any dtype.
        crossing: [M, n] of uint8, or a dtype of two bytes or more → what arrives of it, [R, n].

    Returns:
        [R, n_i], in the parts' dtypes.
    """
    large = [part.nbytes >= ALONE_BYTES for part in parts]
    packed = [part for part, alone in zip(parts, large, strict=True) if not alone]
    if len(packed) > 1:
        layout = [(part.shape[1], part.dtype) for part in packed]
        small = iter(unpack(crossing(pack(packed)), layout))
    else:
        small = map(crossing, packed)

    def single(part: jax.Array) -> jax.Array:
        if part.dtype.itemsize > 1:
            return crossing(part)
        # As bytes: some platforms' collectives widen float8.
        moved = crossing(lax.bitcast_convert_type(part, jnp.uint8))
        return lax.bitcast_convert_type(moved, part.dtype)

    return [single(p) if alone else next(small) for p, alone in zip(parts, large, strict=True)]


def _exchange(parts: Sequence[jax.Array], axis: str | collectives.AxisGroups) -> list[jax.Array]:
    """Bucket g of the rows [G·C, n_i] to device g."""
    devices = collectives.axis_size(axis)

    def swapped(rows: jax.Array) -> jax.Array:
        sent = rows.reshape(devices, -1, rows.shape[1])
        return collectives.all_to_all(sent, axis).reshape(rows.shape)

    return travel(parts, swapped)


def _exchange_encoded(
    rows_MD: jax.Array,
    others: Sequence[jax.Array],
    axis: str | collectives.AxisGroups,
    wire: WireConfig,
    form: WireFormat,
    dtype,
) -> list[jax.Array]:
    encoded = encode(rows_MD, form, rotate=wire.rotate)
    received = _exchange([*encoded, *others], axis)
    rows = decode(received[: len(encoded)], form, rows_MD.shape[1], dtype, rotate=wire.rotate)
    return [rows, *received[len(encoded) :]]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def exchange_rows(
    rows_MD: jax.Array,
    scores_MJ: jax.Array,
    ids_MJ: jax.Array,
    axis: str | collectives.AxisGroups,
    wire: WireConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sends bucket g of the rows to device g of the axis.

    Args:
        rows_MD: [G·C, D] activations, bucket g in rows g·C … g·C + C − 1.
        scores_MJ: float32 weights of the assignments in a row.
        ids_MJ: int32 local slot of each assignment.
        axis: mesh axis of size G, or groups of one.
        wire: rounding of the activations.

    Returns:
        The same three for the rows received, bucket g from device g.
    """
    return _exchange_fwd(rows_MD, scores_MJ, ids_MJ, axis, wire)[0]


def _exchange_fwd(rows_MD, scores_MJ, ids_MJ, axis, wire):
    others = (scores_MJ, ids_MJ)
    sent = _exchange_encoded(rows_MD, others, axis, wire, wire.dispatch, rows_MD.dtype)
    rows, scores, ids = sent
    return (rows, scores, ids), None


def _exchange_bwd(axis, wire, _, cts):
    rows_ct, scores_ct, _ = cts
    dtype, form = rows_ct.dtype, wire.dispatch_grad
    rows, scores = _exchange_encoded(rows_ct, (scores_ct,), axis, wire, form, dtype)
    return rows, scores, None


exchange_rows.defvjp(_exchange_fwd, _exchange_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def return_rows(y_RD: jax.Array, axis: str | collectives.AxisGroups, wire: WireConfig) -> jax.Array:
    """Sends bucket g of the outputs back to device g of the axis.

    Args:
        y_RD: [G·C, D] outputs, bucket g from device g.
        axis: mesh axis of size G, or groups of one.
        wire: rounding of the outputs.

    Returns:
        [G·C, D], bucket g from device g; in y's dtype, or in float32 where they were rounded.
    """
    return _return_fwd(y_RD, axis, wire)[0]


def _return_fwd(y_RD, axis, wire):
    dtype = y_RD.dtype if wire.combine == "compute" else jnp.float32
    back_MD = _exchange_encoded(y_RD, (), axis, wire, wire.combine, dtype)[0]
    return back_MD, jnp.zeros((), y_RD.dtype)


def _return_bwd(axis, wire, like, ct_MD):
    if wire.combine_grad == "compute":
        ct_MD = ct_MD.astype(like.dtype)
    form = wire.combine_grad
    return (_exchange_encoded(ct_MD, (), axis, wire, form, like.dtype)[0],)


return_rows.defvjp(_return_fwd, _return_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_tokens(
    x_TD: jax.Array, axis: str | collectives.AxisGroups, wire: WireConfig
) -> jax.Array:
    """All tokens of the axis, [G·T, D]; the backward sums the devices' cotangents in float32.

    Args:
        x_TD: this device's tokens.
        axis: mesh axis of size G, or groups of one.
        wire: rounding of the tokens.
    """
    return _gather_fwd(x_TD, axis, wire)[0]


def _gather_fwd(x_TD, axis, wire):
    encoded = encode(x_TD, wire.dispatch, rotate=wire.rotate)
    received = travel(encoded, lambda part: collectives.all_gather(part, axis))
    x_RD = decode(received, wire.dispatch, x_TD.shape[1], x_TD.dtype, rotate=wire.rotate)
    return x_RD, None


def _gather_bwd(axis, wire, _, ct_RD):
    # Each device's share is rounded once, and the sum is not: float32 until the end.
    devices, form = collectives.axis_size(axis), wire.dispatch_grad
    dtype = ct_RD.dtype if form == "compute" else jnp.float32
    back = _exchange_encoded(ct_RD, (), axis, wire, form, dtype)[0]
    back = back.reshape(devices, -1, ct_RD.shape[1]).astype(jnp.float32)
    return (jnp.sum(back, axis=0).astype(ct_RD.dtype),)


gather_tokens.defvjp(_gather_fwd, _gather_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_assignments(
    slots_TK: jax.Array, scores_TK: jax.Array, axis: str | collectives.AxisGroups
) -> tuple[jax.Array, jax.Array]:
    """Slots and scores of all tokens of the axis, in one all-gather.

    Args:
        slots_TK: int32.
        scores_TK: float32.
        axis: mesh axis of size G, or groups of one.

    Returns:
        int32 and float32 [G·T, K]; the backward sums the scores' cotangents of all devices.
    """
    return _assignments_fwd(slots_TK, scores_TK, axis)[0]


def _assignments_fwd(slots_TK, scores_TK, axis):
    bits_TK = lax.bitcast_convert_type(scores_TK, jnp.int32)
    both = collectives.all_gather(jnp.concatenate([slots_TK, bits_TK], axis=1), axis)
    slots_RK, bits_RK = jnp.split(both, 2, axis=1)
    return (slots_RK, lax.bitcast_convert_type(bits_RK, jnp.float32)), None


def _assignments_bwd(axis, _, cts):
    scores_ct = cts[1]
    sent = scores_ct.reshape(collectives.axis_size(axis), -1, scores_ct.shape[1])
    return None, jnp.sum(collectives.all_to_all(sent, axis), axis=0)


gather_assignments.defvjp(_assignments_fwd, _assignments_bwd)
