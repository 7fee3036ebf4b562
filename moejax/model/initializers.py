"""How weights start: normal with standard deviation 0.02, less for products into the residual."""

from __future__ import annotations

import math

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

__all__ = ["INIT_STD", "make_constant", "make_normal", "residual_std"]

INIT_STD = 0.02


def residual_std(num_layers: int) -> float:
    """Standard deviation of products that add to the residual: 0.02 / sqrt(2 L).

    GPT-2's rule (Radford et al. 2019, §2.3): 2 L such products add up, so that the residual
    starts with the same variance whatever the depth.
    """
    return INIT_STD / math.sqrt(2 * num_layers)


def make_normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], spec: P, std: float = INIT_STD
) -> nnx.Param:
    """A float32 normal parameter of global `shape` and deviation `std`, split as `spec`."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, spec=spec, float32=False)


def make_constant(
    shape: tuple[int, ...], spec: P, value: float, *, float32: bool = False
) -> nnx.Param:
    """A float32 parameter of global `shape` filled with `value`.

    Args:
        shape: global shape.
        spec: how it is split over the mesh axes.
        value: what it starts as.
        float32: keep it float32 when the step casts weights to the compute dtype.
    """
    return nnx.Param(jnp.full(shape, value, jnp.float32), spec=spec, float32=float32)
