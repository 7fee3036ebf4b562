"""From local gradients to reduced ones: each parameter over the axes that do not split it."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from sharding.collectives import axis_size
from sharding.mesh import AXES, EXPERT, TENSOR, TOKEN_AXES
from sharding.specs import axes_of

__all__ = ["global_norm", "missing_axes", "norm_of_data_rank", "reduce_gradients"]


def missing_axes(spec: P) -> tuple[str, ...]:
    """The token axes over which a parameter with this spec has local gradients to be summed.

    Expert weights are split over `expert` and are summed over `data` only; dense weights over
    both. Along `tensor` nothing is left to sum (see `sharding.collectives`).
    """
    return tuple(axis for axis in TOKEN_AXES if axis not in axes_of(spec))


def reduce_gradients(grads: Any, specs: Any) -> Any:
    """Sums local gradients in float32 over the axes that each parameter is not split over.

    Args:
        grads: tree of local gradients of the devices' loss shares.
        specs: tree of PartitionSpec, a prefix of `grads`.

    Returns:
        The same tree with gradients of the global loss, in the gradients' dtypes.
    """

    def reduce(spec: P, grad: Any) -> Any:
        axes = missing_axes(spec)
        return jax.tree.map(
            lambda g: lax.psum(g.astype(jnp.float32), axes).astype(g.dtype) if axes else g, grad
        )

    return jax.tree.map(reduce, specs, grads, is_leaf=lambda x: isinstance(x, P))


def global_norm(tree: Any, specs: Any) -> jax.Array:
    """Euclidean norm of a sharded tree, every element counted once.

    Args:
        tree: local shards of reduced gradients (or weights).
        specs: tree of PartitionSpec naming every axis that splits them, a prefix of `tree`.

    Returns:
        float32 [], equal on all devices.
    """
    sums: dict[tuple[str, ...], jax.Array] = {}

    def add(spec: P, part: Any) -> None:
        axes = tuple(a for a in AXES if a in axes_of(spec))
        for leaf in jax.tree.leaves(part):
            square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
            sums[axes] = sums[axes] + square if axes in sums else square

    jax.tree.map(add, specs, tree, is_leaf=lambda x: isinstance(x, P))
    total = jnp.zeros((), jnp.float32)
    for axes, square in sums.items():
        total = total + (lax.psum(square, axes) if axes else square)
    return jnp.sqrt(total)


def norm_of_data_rank(grads: Any, specs: Any) -> jax.Array:
    """Euclidean norm of what the devices of one data index add to the gradient, inside shard_map.

    Together they hold the model once. Of a parameter that `expert` does not split each has a term
    of the sum; where these are independent with mean zero, the square of their sum is on average
    the sum of their squares, which is what is taken.

    Args:
        grads: tree of local gradients, not reduced.
        specs: tree of PartitionSpec of the parameters in use, a prefix of `grads`.

    Returns:
        float32 [], equal on the devices of one data index.
    """
    squares = [jnp.zeros((), jnp.float32)]

    def add(spec: P, part: Any) -> None:
        copies = 1 if TENSOR in axes_of(spec) else axis_size(TENSOR)
        for leaf in jax.tree.leaves(part):
            squares.append(jnp.sum(jnp.square(leaf.astype(jnp.float32))) * (1 / copies))

    jax.tree.map(add, specs, grads, is_leaf=lambda x: isinstance(x, P))
    return jnp.sqrt(lax.psum(jnp.sum(jnp.stack(squares)), (EXPERT, TENSOR)))
