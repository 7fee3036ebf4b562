"""Load balancing without a loss: a bias per expert that only the choice sees (arXiv 2408.15664)."""

from __future__ import annotations

from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float32, Int32

__all__ = ["RouterBias", "RouterState", "update_bias"]


class RouterState(nnx.Variable):
    """What a router keeps beside its parameters.

    A type of its own so that the optimizer, which asks for `nnx.Param`, does not see it.
    """


class RouterBias(RouterState):
    """Selection bias of a router, float32 [E]."""


def update_bias(
    bias_E: Float32[Array, "*L E"], global_counts_E: Int32[Array, "*L E"], rate: float
) -> Float32[Array, "*L E"]:
    """One step of the bias towards equal loads: up for experts below the mean, down above it.

    Args:
        bias_E: float32 [..., E]; leading dimensions are layers.
        global_counts_E: int32 [..., E], assignments of the step summed over all devices.
        rate: size of the step, in units of the selection score.

    Returns:
        The new bias, bias + rate·sign(mean − count); an expert at the mean keeps its bias.

    Source: arXiv 2408.15664, algorithm 1.
    """
    counts_E = global_counts_E.astype(jnp.float32)
    mean = jnp.mean(counts_E, axis=-1, keepdims=True)
    return bias_E + rate * jnp.sign(mean - counts_E)
