"""How activations are rounded for the wire: int8, float8 or int4 by blocks of 128, or not at all.

A block's scale is its largest magnitude over the largest value, in float32, beside the values.
With `rotate` each block is first multiplied with a Hadamard matrix, which spreads outliers over the
block (QuaRot, arXiv 2404.00456), and rotated back on arrival.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import jax
import numpy as np
from jax import numpy as jnp

from moejax.config import WireFormat
from pallas_kernels.precision import precision_of

__all__ = ["BLOCK", "decode", "encode", "encoded_bytes", "layout", "rotated"]

BLOCK = 128
_LARGEST = {"int8": 127.0, "float8": 448.0, "int4": 7.0}
_BITS = {"int8": 8, "float8": 8, "int4": 4}
_DTYPES = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn, "int4": jnp.uint8}


def layout(d_model: int, dtype, wire_format: WireFormat) -> list[tuple[int, jnp.dtype]]:
    """Columns and dtype of each part of an encoded row.

    Args:
        d_model: D.
        dtype: of the activations.
        wire_format: one of `moejax.config.WireFormat`.
    """
    if wire_format == "compute":
        return [(d_model, jnp.dtype(dtype))]
    values = -(-d_model * _BITS[wire_format] // 8)
    blocks = -(-d_model // BLOCK)
    return [(values, jnp.dtype(_DTYPES[wire_format])), (blocks, jnp.dtype(jnp.float32))]


def encoded_bytes(d_model: int, dtype, wire_format: WireFormat) -> int:
    """Bytes of one row's activations."""
    return sum(width * part.itemsize for width, part in layout(d_model, dtype, wire_format))


@lru_cache(maxsize=1)
def _hadamard() -> np.ndarray:
    """Orthonormal and its own inverse, [128, 128] (Sylvester's construction)."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(BLOCK))


def rotated(x_MBC: jax.Array) -> jax.Array:
    """Blocks [M, blocks, 128] times the Hadamard matrix, which is its own inverse."""
    return jnp.matmul(x_MBC, jnp.asarray(_hadamard()), precision=precision_of(x_MBC.dtype))


def _blocks(x_MD: jax.Array) -> jax.Array:
    """float32 [M, blocks, 128], zeros in the place of what is missing."""
    rows, width = x_MD.shape
    padded = jnp.pad(x_MD.astype(jnp.float32), ((0, 0), (0, -width % BLOCK)))
    return padded.reshape(rows, -1, BLOCK)


def encode(x_MD: jax.Array, wire_format: WireFormat, *, rotate: bool = False) -> list[jax.Array]:
    """The parts that travel, as `layout` lists them.

    Args:
        x_MD: activations; a block with a NaN or an infinity arrives as NaN.
        wire_format: one of `moejax.config.WireFormat`; `compute` changes nothing.
        rotate: D is then a multiple of 128.
    """
    if wire_format == "compute":
        return [x_MD]
    rows, width = x_MD.shape
    x_MBC = _blocks(x_MD)
    x_MBC = rotated(x_MBC) if rotate else x_MBC
    largest = _LARGEST[wire_format]
    most_MB = jnp.max(jnp.abs(x_MBC), axis=2)
    scale_MB = most_MB / largest
    # Of so small a magnitude that its scale is no normal float32, nothing remains.
    scale_MB = jnp.where(scale_MB < jnp.finfo(jnp.float32).tiny, 1.0, scale_MB)
    # Not by the maximum, which drops a NaN on some platforms.
    scale_MB = jnp.where(jnp.all(jnp.isfinite(x_MBC), axis=2), scale_MB, jnp.nan)
    scaled = jnp.clip(x_MBC / scale_MB[:, :, None], -largest, largest)
    scaled = jnp.where(jnp.isnan(scaled), 0.0, scaled).reshape(rows, -1)[:, :width]
    if wire_format == "float8":
        return [scaled.astype(jnp.float8_e4m3fn), scale_MB]
    whole = jnp.round(scaled).astype(jnp.int8)
    if wire_format == "int8":
        return [whole, scale_MB]
    nibbles = jnp.pad(whole + jnp.int8(8), ((0, 0), (0, width % 2))).astype(jnp.uint8)
    pairs = nibbles.reshape(rows, -1, 2)
    return [pairs[:, :, 0] | (pairs[:, :, 1] << 4), scale_MB]


def decode(
    parts: Sequence[jax.Array],
    wire_format: WireFormat,
    d_model: int,
    dtype,
    *,
    rotate: bool = False,
) -> jax.Array:
    """Inverse of `encode`, up to rounding: [M, D] in `dtype`."""
    if wire_format == "compute":
        return parts[0]
    values, scale_MB = parts
    if wire_format == "int4":
        pairs = jnp.stack([values & jnp.uint8(15), values >> 4], axis=2)
        values = pairs.reshape(values.shape[0], -1)[:, :d_model].astype(jnp.int8) - jnp.int8(8)
    x_MBC = _blocks(values) * scale_MB[:, :, None]
    x_MBC = rotated(x_MBC) if rotate else x_MBC
    return x_MBC.reshape(values.shape[0], -1)[:, :d_model].astype(dtype)
