"""RMSNorm in plain JAX, over the last dimension of arrays of any rank."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax
from jax import numpy as jnp

__all__ = ["add_and_normalize", "normalize_backward"]


def add_and_normalize(
    x_D: jax.Array, other_D: jax.Array | None, scale_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `api.add_and_normalize`."""
    x_D = x_D if other_D is None else x_D + other_D
    wide = x_D.astype(jnp.float32)
    inverse_1 = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return x_D, (wide * inverse_1 * scale_D.astype(jnp.float32)).astype(x_D.dtype), inverse_1


def normalize_backward(
    x_D: jax.Array,
    inverse_1: jax.Array,
    scale_D: jax.Array,
    ct_D: Sequence[jax.Array],
    passed_D: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As `api.normalize_backward`."""
    unit = x_D.astype(jnp.float32) * inverse_1
    ct = sum((more.astype(jnp.float32) for more in ct_D[1:]), ct_D[0].astype(jnp.float32))
    scaled = ct * scale_D.astype(jnp.float32)
    along = jnp.mean(scaled * unit, axis=-1, keepdims=True)
    x_ct = inverse_1 * (scaled - unit * along)
    if passed_D is not None:
        x_ct = x_ct + passed_D.astype(jnp.float32)
    scale_ct = jnp.sum(ct * unit, axis=tuple(range(ct.ndim - 1)))
    return x_ct.astype(x_D.dtype), scale_ct.astype(scale_D.dtype)
