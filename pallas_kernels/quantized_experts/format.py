"""Matrices of 8 bits: values, and a float32 scale for each block of 128 × 128 (DeepSeek-V3).

Source: arXiv 2412.19437 §3.3, figure 7: weights by blocks of 128 × 128, rows by blocks of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import numpy as jnp

__all__ = [
    "BLOCK",
    "QuantizedMatrices",
    "dequantize",
    "quantize",
    "quantize_rows",
    "rows_through_float8",
]

BLOCK = 128
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrices:
    """w[..., k, n] = values[..., n, k] · scales[..., n // 128, k // 128].

    values: int8 or float8_e4m3fn [..., N, K]; the contraction lies last and contiguous, as 8-bit
        wgmma wants it of both operands.
    scales: float32 [..., ceil(N / 128), ceil(K / 128)].
    """

    values: jax.Array
    scales: jax.Array


def _largest(dtype: Any) -> float:
    name = jnp.dtype(dtype).name
    if name not in _LARGEST:
        raise ValueError(f"dtype={name}: quantized values are {' or '.join(_LARGEST)}")
    return _LARGEST[name]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _to_values(scaled: jax.Array, dtype: Any, largest: float) -> jax.Array:
    """Rounds to nearest even, within the range: beyond 448 e4m3 has only NaN, which scales keep."""
    scaled = jnp.where(jnp.isnan(scaled), 0.0, scaled)
    scaled = jnp.clip(scaled, -largest, largest)
    if jnp.dtype(dtype) == jnp.int8:
        scaled = jnp.round(scaled)
    return scaled.astype(dtype)


def _scales(magnitudes: jax.Array, axes: tuple[int, ...], largest: float) -> jax.Array:
    """The scale that takes the largest magnitude to the largest value; 1 where all is zero.

    A magnitude so small that its scale is no normal float32 counts as zero. Where one is not finite
    the scale is NaN; it is looked for, since a maximum drops NaN on some platforms.
    """
    scales = jnp.max(magnitudes, axis=axes) / largest
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1.0, scales)
    return jnp.where(jnp.all(jnp.isfinite(magnitudes), axis=axes), scales, jnp.nan)


def _spread(scales: jax.Array, axis: int, size: int) -> jax.Array:
    """A block's scale for each of its elements along an axis of `size` elements."""
    return jax.lax.slice_in_dim(jnp.repeat(scales, BLOCK, axis=axis), 0, size, axis=axis)


def quantize(w: jax.Array, dtype: Any) -> QuantizedMatrices:
    """Quantizes matrices, each block by its largest magnitude.

    Args:
        w: [..., K, N] floats; K is the contraction.
        dtype: int8 (symmetric, ±127) or float8_e4m3fn (±448).

    Returns:
        Values [..., N, K], scales [..., ceil(N / 128), ceil(K / 128)].

    Raises:
        ValueError: another dtype.
    """
    largest = _largest(dtype)
    w = jnp.swapaxes(w, -1, -2).astype(jnp.float32)
    *lead, n, k = w.shape
    padding = [(0, 0)] * len(lead) + [(0, -n % BLOCK), (0, -k % BLOCK)]
    magnitudes = jnp.pad(jnp.abs(w), padding)
    magnitudes = magnitudes.reshape(*lead, _blocks(n), BLOCK, _blocks(k), BLOCK)
    scales = _scales(magnitudes, (-3, -1), largest)
    # Not w / scale: XLA divides or multiplies by the reciprocal as the program around it is, and a
    # value between two steps would be rounded up in one program, down in another.
    scaled = w * _spread(_spread(1.0 / scales, len(lead), n), len(lead) + 1, k)
    return QuantizedMatrices(_to_values(scaled, dtype, largest), scales)


def dequantize(q: QuantizedMatrices, dtype: Any) -> jax.Array:
    """The matrices [..., K, N] of a quantization, rounded to `dtype` once."""
    *lead, n, k = q.values.shape
    scales = _spread(_spread(q.scales, len(lead), n), len(lead) + 1, k)
    return jnp.swapaxes((q.values.astype(jnp.float32) * scales).astype(dtype), -1, -2)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes rows, each block of 128 columns by its largest magnitude.

    Args:
        x: [R, K] floats.

    Returns:
        float8_e4m3fn values [R, K], float32 scales [R, ceil(K / 128)].
    """
    largest = _largest(jnp.float8_e4m3fn)
    rows, k = x.shape
    x = x.astype(jnp.float32)
    magnitudes = jnp.pad(jnp.abs(x), ((0, 0), (0, -k % BLOCK))).reshape(rows, _blocks(k), BLOCK)
    scales = _scales(magnitudes, (-1,), largest)
    return _to_values(x / _spread(scales, 1, k), jnp.float8_e4m3fn, largest), scales


def rows_through_float8(x: jax.Array) -> jax.Array:
    """What `quantize_rows` makes of rows [R, K], as float32."""
    # A compiler that may keep more precision, as XLA may on a GPU, leaves out a conversion back and
    # forth.
    values, scales = jax.lax.optimization_barrier(quantize_rows(x))
    return values.astype(jnp.float32) * _spread(scales, 1, x.shape[1])
