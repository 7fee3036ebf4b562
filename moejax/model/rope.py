"""Rotary position embedding (arXiv 2104.09864 §3.4), also stretched to longer texts (YaRN)."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax import numpy as jnp

from moejax.attention_config import YarnConfig

__all__ = ["rotate", "turns", "yarn_frequencies"]


def rotate(
    x_BSNh: jax.Array,
    positions_BS: jax.Array,
    theta: float,
    *,
    interleaved: bool = False,
    yarn: YarnConfig | None = None,
) -> jax.Array:
    """Turns the pairs (i, i + h/2) of every head by position · theta^(-2i/h).

    Pairs lie half a head apart, as in the Llama checkpoints on Hugging Face, or side by side as
    in the paper. Angles and products are float32.

    Args:
        x_BSNh: [B, S, N, h], any float dtype, h even.
        positions_BS: int32 [B, S], in tokens from the start of the text.
        theta: base of the wavelengths.
        interleaved: the pairs are (2i, 2i + 1).
        yarn: takes its frequencies, and multiplies the result by its `rotation_scale`.

    Returns:
        [B, S, N, h] in x's dtype, every number where it was.
    """
    half = x_BSNh.shape[-1] // 2
    cos, sin = (turn[:, :, None] for turn in turns(positions_BS, 2 * half, theta, yarn))
    wide = x_BSNh.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return pairs.reshape(x_BSNh.shape).astype(x_BSNh.dtype)
    first, second = wide[..., :half], wide[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSNh.dtype)


def turns(
    positions_BS: jax.Array, width: int, theta: float, yarn: YarnConfig | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each pair's angle, float32 [B, S, width / 2]; arguments as of `rotate`."""
    half = width // 2
    if yarn is None:
        exponents = jnp.arange(half, dtype=jnp.float32) * (-1.0 / half)
        frequencies = jnp.power(jnp.float32(theta), exponents)
    else:
        frequencies = jnp.asarray(yarn_frequencies(width, theta, yarn))
    angles = positions_BS.astype(jnp.float32)[:, :, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if yarn is not None:
        cos, sin = cos * yarn.rotation_scale, sin * yarn.rotation_scale
    return cos, sin


def yarn_frequencies(width: int, theta: float, yarn: YarnConfig) -> np.ndarray:
    """Radians a position for each pair, by parts plain and stretched (arXiv 2309.00071 §3.2).

    Args:
        width: rotated columns of a head, even.
        theta: base of the wavelengths.
        yarn: how far to stretch, and where the ramp lies.

    Returns:
        float32 [width / 2], computed in float64.
    """

    def pair_that_turns(times: float) -> float:
        # The pair, as a real number, that makes so many turns in the original context.
        turns = math.log(yarn.original_context / (times * 2 * math.pi))
        return width * turns / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0.0  # a step in the place of a ramp without length
    pairs = np.arange(width // 2, dtype=np.float64)
    stretched = np.clip((pairs - low) / (high - low), 0.0, 1.0)
    plain = theta ** (-2.0 * pairs / width)
    return (plain * (1.0 - stretched) + plain / yarn.factor * stretched).astype(np.float32)
