"""Parameters as the reduction of gradients sees them, and which of these stay exact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flax import nnx
from jax.sharding import PartitionSpec as P

from sharding import zero
from sharding.gradients import missing_axes
from sharding.mesh import AXES
from sharding.specs import axes_of
from sharding.zero import Storage

__all__ = ["Leaf", "leaf_of", "stays_exact"]

EXACT = ("router", "embedding")
"""Modules whose parameters stay exact: few numbers decide much there, or rows are rarely hit."""


def stays_exact(path: tuple, variable: nnx.Variable, elements: int) -> bool:
    """Whether a parameter's gradient is summed as float32 under every method.

    As for the decay, matrices are what is named w…: norms and biases stay exact, and so does what
    is kept in float32, is part of a module in `EXACT`, or is small.

    Args:
        path: of the parameter in the model.
        variable: its metadata.
        elements: numbers of it on a device that uses it.
    """
    if elements < zero.SMALLEST or not str(path[-1]).startswith("w"):
        return True
    return variable.get_metadata()["float32"] or any(str(part) in EXACT for part in path)


@dataclass(frozen=True)
class Leaf:
    """One parameter as the reduction sees it.

    path: in the model; name: the same as text.
    storage: how it is used and stored.
    shape: of the local gradient; whole: of the parameter.
    axes: mesh axes over which its gradient is summed.
    exact: whether it is summed as float32.
    stacked: leading dimensions that number layers and experts.
    larger: whether it is exact only because the method would send as many bytes or more.
    """

    path: tuple
    storage: Storage
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    axes: tuple[str, ...]
    exact: bool
    stacked: int = 0
    larger: bool = False

    @property
    def name(self) -> str:
        """The path as text."""
        return ".".join(map(str, self.path))

    @property
    def differs(self) -> tuple[str, ...]:
        """Mesh axes along which devices have different gradients of it."""
        return tuple(a for a in AXES if a in self.axes or a in axes_of(self.storage.spec))


def leaf_of(
    path: tuple, variable: nnx.Variable, storage: Storage, sizes: Mapping[str, int]
) -> Leaf:
    """A parameter as it lies on a mesh.

    Args:
        path: in the model.
        variable: its metadata, and its whole shape.
        storage: how it is used and stored.
        sizes: devices along each mesh axis.
    """
    whole = tuple(variable.get_value().shape)
    shape, axes = _local(whole, storage.spec, sizes), missing_axes(storage.spec)
    stacked = _stacked(path, variable)
    exact = stays_exact(path, variable, math.prod(shape))
    exact |= math.prod(sizes[a] for a in axes) == 1
    exact |= len(shape) < 2 + stacked
    return Leaf(path, storage, shape, whole, axes, exact, stacked)


def _stacked(path: tuple, variable: nnx.Variable) -> int:
    """Leading dimensions that number layers, where they are scanned, and experts."""
    scanned = any(":" in str(part) for part in path)
    return int(scanned) + int(variable.get_metadata().get("home") is not None)


def _local(shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> tuple[int, ...]:
    entries = list(spec) + [None] * (len(shape) - len(spec))
    return tuple(
        size // math.prod(sizes[a] for a in axes_of(P(entry)))
        for size, entry in zip(shape, entries)
    )
