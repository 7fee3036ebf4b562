"""Root-mean-square normalisation, float32 inside."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.model.initializers import make_constant
from pallas_kernels.norm import api
from sharding.collectives import axis_size, enter_parallel, exit_parallel
from sharding.mesh import TENSOR

__all__ = ["RMSNorm", "rms_branch", "rms_normalize", "rms_normalize_heads"]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_normalize(
    x_D: jax.Array, scale_D: jax.Array, eps: float, backend: str | None = "reference"
) -> jax.Array:
    """RMSNorm over the last dimension: scale · x / sqrt(mean(x²) + eps) (arXiv 1910.07467 eq. 4).

    Args:
        x_D: [..., D], any float dtype; the arithmetic is float32.
        scale_D: [D] float32.
        eps: added to the mean square.
        backend: of `pallas_kernels.norm.api`; plain JAX for short rows such as heads.

    Returns:
        [..., D] in x's dtype. It has a backward, but no forward-mode derivative.
    """
    return api.add_and_normalize(x_D, None, scale_D, eps, backend=backend)[1]


def _normalize_fwd(
    x_D: jax.Array, scale_D: jax.Array, eps: float, backend: str | None
) -> tuple[jax.Array, Any]:
    _, y_D, inverse_1 = api.add_and_normalize(x_D, None, scale_D, eps, backend=backend)
    return y_D, (x_D, inverse_1, scale_D)


def _normalize_bwd(
    eps: float, backend: str | None, kept: Any, ct_D: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del eps  # in the inverse
    x_D, inverse_1, scale_D = kept
    return api.normalize_backward(x_D, inverse_1, scale_D, [ct_D], None, backend=backend)


# Left to itself, differentiation keeps several float32 copies of x for the backward.
rms_normalize.defvjp(_normalize_fwd, _normalize_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def rms_branch(
    x_D: jax.Array, other_D: jax.Array | None, scale_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """A residual stream after a sum, and its normalised branch.

    Args:
        x_D: [..., D].
        other_D: [..., D] of x's dtype, is added; None: nothing is.
        scale_D: [D] float32.
        eps: added to the mean square.

    Returns:
        The stream, and `rms_normalize` of it. In the backward both cotangents meet in one pass.
    """
    return api.add_and_normalize(x_D, other_D, scale_D, eps)[:2]


def _branch_fwd(
    x_D: jax.Array, other_D: jax.Array | None, scale_D: jax.Array, eps: float
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    total_D, y_D, inverse_1 = api.add_and_normalize(x_D, other_D, scale_D, eps)
    alone = () if other_D is None else None  # a structure, since what is kept is traced
    return (total_D, y_D), (total_D, inverse_1, scale_D, alone)


def _branch_bwd(
    eps: float, kept: Any, cts: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    del eps
    total_D, inverse_1, scale_D, alone = kept
    x_ct, scale_ct = api.normalize_backward(total_D, inverse_1, scale_D, [cts[1]], cts[0])
    return x_ct, x_ct if alone is None else None, scale_ct


rms_branch.defvjp(_branch_fwd, _branch_bwd)


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
        return rms_normalize(x_D, self.scale[...], self.eps, None)

    def branch(
        self, x_D: jax.Array, other_D: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The stream and its normalised branch, both [..., D]; see `rms_branch`."""
        return rms_branch(x_D, other_D, self.scale[...], self.eps)
