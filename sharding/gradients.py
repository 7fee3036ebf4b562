"""From local gradients to reduced ones: each parameter over the axes that do not split it."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from sharding.mesh import AXES, TOKEN_AXES
from sharding.specs import axes_of

__all__ = ["global_norm", "missing_axes", "reduce_gradients"]


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
