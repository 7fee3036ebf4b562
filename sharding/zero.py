"""Master weights and optimizer moments split over `data` (ZeRO, arXiv 1910.02054).

A parameter that every data rank would hold is stored in pieces along one more dimension. A step
gathers the weights in their compute dtype, and scatters the sum of the gradients back to the
pieces, where the optimizer works.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from sharding.gradients import missing_axes
from sharding.mesh import DATA
from sharding.specs import axes_of

__all__ = [
    "Storage",
    "gather_weights",
    "scatter_gradients",
    "storage_of",
    "storage_tree",
    "sum_to_piece",
]

SMALLEST = 1 << 14
"""Elements below which splitting saves nothing worth a collective."""


@dataclass(frozen=True)
class Storage:
    """How one parameter is used and stored.

    spec: how its weights are split where they are used.
    dim: the dimension that storage splits over `data` besides; None where nothing is split.
    dtype: dtype of the gathered weights; None for the compute dtype.
    """

    spec: P
    dim: int | None
    dtype: Any = None

    @property
    def stored(self) -> P:
        """The spec of masters and moments."""
        if self.dim is None:
            return self.spec
        entries = list(self.spec) + [None] * (self.dim + 1 - len(self.spec))
        entries[self.dim] = DATA
        return P(*entries)


def storage_of(
    shape: Sequence[int], spec: P, axis_sizes: Mapping[str, int], float32: bool
) -> Storage:
    """Chooses the dimension to split over `data`: the largest unsplit one that `data` divides.

    Args:
        shape: global shape.
        spec: how the weights are split where they are used.
        axis_sizes: devices along each mesh axis.
        float32: the weights stay float32 when gathered.
    """
    dtype = jnp.float32 if float32 else None
    data = axis_sizes[DATA]
    split = math.prod(axis_sizes[a] for a in axes_of(spec))
    if data == 1 or DATA in axes_of(spec) or math.prod(shape) // split < SMALLEST:
        return Storage(spec, None, dtype)
    entries = list(spec) + [None] * (len(shape) - len(spec))
    free = [d for d, e in enumerate(entries) if e is None and shape[d] % data == 0]
    return Storage(spec, max(free, key=lambda d: shape[d], default=None), dtype)


def storage_tree(params: Any, axis_sizes: Mapping[str, int]) -> Any:
    """`storage_of` for each variable of a state (arrays or ShapeDtypeStructs)."""

    def one(variable: nnx.Variable) -> Storage:
        metadata = variable.get_metadata()
        shape = variable.get_value().shape
        return storage_of(shape, metadata["spec"], axis_sizes, metadata["float32"])

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _map(fn: Any, storage: Any, tree: Any) -> Any:
    return jax.tree.map(lambda s, part: jax.tree.map(lambda leaf: fn(s, leaf), part), storage, tree)


def gather_weights(masters: Any, storage: Any, compute_dtype: Any) -> Any:
    """The weights a step uses, from stored pieces; casts first, so that few bytes travel.

    Args:
        masters: float32 pieces, local.
        storage: tree of `Storage`.
        compute_dtype: dtype of weights that need not stay float32.
    """

    def gather(s: Storage, piece: jax.Array) -> jax.Array:
        piece = piece.astype(s.dtype or compute_dtype)
        if s.dim is None:
            return piece
        return lax.all_gather(piece, DATA, axis=s.dim, tiled=True)

    return _map(gather, storage, masters)


def scatter_gradients(grads: Any, storage: Any) -> Any:
    """Local gradients → gradients of the global loss for the stored pieces, float32.

    Sums over `data` by a reduce-scatter where the storage is split (dense weights are then summed
    over `expert` on the piece only), and by an all-reduce elsewhere.
    """

    def scatter(s: Storage, grad: jax.Array) -> jax.Array:
        return sum_to_piece(grad.astype(jnp.float32), missing_axes(s.spec), s.dim)

    return _map(scatter, storage, grads)


def sum_to_piece(x: jax.Array, axes: Sequence[str], dim: int | None) -> jax.Array:
    """The exact sum over `axes`, or this rank's piece of it along `data`.

    Args:
        x: local.
        axes: mesh axes, with `data` where `dim` is given.
        dim: the dimension that storage splits over `data`; None: the whole sum.
    """
    rest = tuple(axes)
    if dim is not None:
        x = lax.psum_scatter(x, DATA, scatter_dimension=dim, tiled=True)
        rest = tuple(a for a in rest if a != DATA)
    return lax.psum(x, rest) if rest else x
