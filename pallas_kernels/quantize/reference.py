"""Rows of numbers to bytes and back in plain JAX."""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.quantize.format import (
    FRACTION,
    HASH,
    INFINITY,
    INVERSE,
    LEAST,
    NAN_SCALE,
    ONE_SCALE,
    Format,
)

__all__ = ["add_terms", "add_up", "decode", "dither", "encode"]


def dither(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Integers of 16 bits, uniform: what is rounded is raised by them and a half, over 2¹⁶.

    Two rounds of the finalizer of MurmurHash3 over the position and the key's words; two
    neighbours get the halves of one result.

    Args:
        key: uint32 [2].
        shape: of the numbers.

    Returns:
        int32 of that shape.
    """
    words = key.astype(jnp.uint32)
    at = lax.iota(jnp.uint32, shape[0] * shape[1]).reshape(shape)
    mixed = _mix(_mix((at >> jnp.uint32(1)) ^ words[0]) + words[1])
    half = mixed >> ((at & jnp.uint32(1)) << jnp.uint32(4))
    return lax.bitcast_convert_type(half & jnp.uint32(0xFFFF), jnp.int32)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(HASH[0])
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(HASH[1])
    return h ^ (h >> jnp.uint32(16))


def encode(
    x_RN: jax.Array, form: Format, key: jax.Array | None, *, residual: bool
) -> tuple[jax.Array, jax.Array | None]:
    """See `api.encode`."""
    rows, width = x_RN.shape
    x_RN = x_RN.astype(jnp.float32)
    x_RBC = x_RN.reshape(rows, -1, form.block)
    magnitude = lax.bitcast_convert_type(x_RBC, jnp.int32) & jnp.int32(0x7FFFFFFF)
    most_RB = jnp.max(magnitude, axis=2)
    finite_RB = most_RB < INFINITY
    scale_RB = _scales(most_RB, form.largest)
    power_RB, inverse_RB = _over(jnp.where(finite_RB, scale_RB, ONE_SCALE))
    scaled = x_RBC * power_RB[..., None] * inverse_RB[..., None]
    scaled = jnp.where(finite_RB[..., None], scaled, 0.0).astype(jnp.int32).reshape(rows, width)
    most = form.largest << FRACTION
    scaled = jnp.clip(scaled, jnp.int32(-most), jnp.int32(most))
    if key is None:
        odd = (scaled >> jnp.int32(FRACTION)) & jnp.int32(1)
        raised = scaled + odd + jnp.int32(2 ** (FRACTION - 1) - 1)  # a tie goes to the even one
    else:
        raised = scaled + (dither(key, (rows, width)) << jnp.int32(8)) + jnp.int32(128)
    whole_RN = raised >> jnp.int32(FRACTION)
    values = whole_RN
    if form.bits == 4:
        halves = ((whole_RN + 8) & 15).reshape(rows, -1, 2, form.block // 2)
        values = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(rows, -1)
    values = values.astype(jnp.uint8)
    scales = lax.bitcast_convert_type(scale_RB.astype(jnp.uint16), jnp.uint8).reshape(rows, -1)
    padding = form.row_bytes(width) - values.shape[1] - scales.shape[1]
    parts = [values, scales, jnp.zeros((rows, padding), jnp.uint8)]
    payload = jnp.concatenate(parts[: 3 if padding else 2], axis=1)
    return payload, x_RN - _times(whole_RN, scale_RB, form) if residual else None


def _scales(most_RB: jax.Array, largest: int) -> jax.Array:
    """Bits of bfloat16 as int32 [R, B], from those of the largest magnitudes as float32."""
    scale = lax.bitcast_convert_type(most_RB, jnp.float32) * jnp.float32(1.0 / largest)
    up = (lax.bitcast_convert_type(scale, jnp.int32) + jnp.int32(0xFFFF)) >> jnp.int32(16)
    up = jnp.where(most_RB < LEAST, ONE_SCALE, up)
    return jnp.where(most_RB < INFINITY, up, NAN_SCALE)


def _over(scale_RB: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two float32 whose product is 2 to the `FRACTION` over a scale, from its bits."""
    power = (254 - (scale_RB >> jnp.int32(7))) << jnp.int32(23)
    digits = (scale_RB & 127) + 128
    inverse = (2**INVERSE + digits // 2) // digits * 2
    return lax.bitcast_convert_type(power, jnp.float32), inverse.astype(jnp.float32)


def _times(whole_RN: jax.Array, scale_RB: jax.Array, form: Format) -> jax.Array:
    """Integers times their block's scale, which is exact; float32 [R, N]."""
    scale = lax.bitcast_convert_type(scale_RB << jnp.int32(16), jnp.float32)
    blocks = whole_RN.astype(jnp.float32).reshape(*scale_RB.shape, form.block)
    return (blocks * scale[..., None]).reshape(whole_RN.shape)


def decode(payload_RN: jax.Array, form: Format, width: int) -> jax.Array:
    """See `api.decode`."""
    rows, split = len(payload_RN), form.value_bytes(width)
    values = payload_RN[:, :split]
    scales = payload_RN[:, split : split + 2 * (width // form.block)].reshape(rows, -1, 2)
    scale_RB = lax.bitcast_convert_type(scales, jnp.uint16).astype(jnp.int32)
    if form.bits == 4:
        pairs = values.astype(jnp.int32).reshape(rows, -1, form.block // 2)
        whole = jnp.stack([(pairs & 15) - 8, (pairs >> 4) - 8], axis=2).reshape(rows, width)
    else:
        whole = lax.bitcast_convert_type(values, jnp.int8)
    return _times(whole, scale_RB, form)


def add_up(payload_RN: jax.Array, rows_RN: jax.Array, me: jax.Array, form: Format) -> jax.Array:
    """See `api.add_up`."""
    return add_terms(decode(payload_RN, form, rows_RN.shape[1]), rows_RN, me)


def add_terms(terms_RN: jax.Array, rows_RN: jax.Array, me: jax.Array) -> jax.Array:
    """The sum of float32 terms in their order, one on every platform; row `me` is of `rows_RN`."""
    own_N = lax.dynamic_index_in_dim(rows_RN, me, keepdims=False).astype(jnp.float32)
    total = None
    for rank in range(len(rows_RN)):
        term = jnp.where(me == rank, own_N, terms_RN[rank])
        total = term if total is None else total + term
    assert total is not None
    return total
