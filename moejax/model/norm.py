"""Root-mean-square normalisation, float32 inside."""

from __future__ import annotations

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.model.initializers import make_constant
from sharding.collectives import axis_size, enter_parallel, exit_parallel
from sharding.mesh import TENSOR

__all__ = ["RMSNorm", "rms_normalize", "rms_normalize_heads"]


def rms_normalize(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last dimension: scale · x / sqrt(mean(x²) + eps) (arXiv 1910.07467 eq. 4).

    Args:
        x_D: [..., D], any float dtype; the arithmetic is float32.
        scale_D: [D] float32.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype.
    """
    wide = x_D.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale_D.astype(jnp.float32)).astype(x_D.dtype)


def rms_normalize_heads(x_Nh: jax.Array, scale_Nh: jax.Array, eps: float) -> jax.Array:
    """The same over all heads together, while the heads are split along `tensor` (OLMoE).

    Runs inside a tensor-parallel region: the sum of squares crosses devices, both ways.

    Args:
        x_Nh: [..., N local, h], any float dtype.
        scale_Nh: [N local, h] float32, this device's heads.
        eps: added to the mean square.

    Returns:
        [..., N local, h] in x's dtype.
    """
    wide = x_Nh.astype(jnp.float32)
    squares = exit_parallel(jnp.sum(jnp.square(wide), axis=(-2, -1), keepdims=True), TENSOR)
    width = x_Nh.shape[-2] * x_Nh.shape[-1] * axis_size(TENSOR)
    inverse = enter_parallel(lax.rsqrt(squares / width + eps), TENSOR)
    return (wide * inverse * scale_Nh.astype(jnp.float32)).astype(x_Nh.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the model width; its scale [D] is replicated and stays float32."""

    def __init__(self, d_model: int, eps: float):
        self.eps = eps
        self.scale = make_constant((d_model,), P(None), 1.0, float32=True)

    def __call__(self, x_D: jax.Array) -> jax.Array:
        """Normalises [..., D]; returns the same shape and dtype."""
        return rms_normalize(x_D, self.scale[...], self.eps)
