"""Rotary position embedding (arXiv 2104.09864 §3.4)."""

from __future__ import annotations

import jax
from jax import numpy as jnp

__all__ = ["rotate"]


def rotate(x_BSNh: jax.Array, positions_BS: jax.Array, theta: float) -> jax.Array:
    """Turns the pairs (i, i + h/2) of every head by position · theta^(-2i/h).

    Pairs lie half a head apart, as in the Llama checkpoints on Hugging Face, not side by side as
    in the paper. Angles and products are float32.

    Args:
        x_BSNh: [B, S, N, h], any float dtype, h even.
        positions_BS: int32 [B, S], in tokens from the start of the text.
        theta: base of the wavelengths.

    Returns:
        [B, S, N, h] in x's dtype.
    """
    half = x_BSNh.shape[-1] // 2
    exponents = jnp.arange(half, dtype=jnp.float32) * (-1.0 / half)
    frequencies = jnp.power(jnp.float32(theta), exponents)
    angles = positions_BS.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    wide = x_BSNh.astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSNh.dtype)
