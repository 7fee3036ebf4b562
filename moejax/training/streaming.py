"""The weights of a stored model in float32, one tensor after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moejax.families import bindings
from moejax.families.folder import is_hf_folder, open_hf_folder
from moejax.inference.folder_files import check_weights
from moejax.inference.model_folder import is_model_folder, load_model_folder
from moejax.inference.source import PARTS, ModelSource
from moejax.training.state import Blueprint, logical_targets

__all__ = ["WeightStream"]

ReadPart = Callable[[str, tuple[slice, ...]], np.ndarray]


class WeightStream:
    """Reads one weight at a time, each device its own part of it.

    Of a folder nothing else is held. The checkpoint of a run is restored as a whole, and what was
    taken is let go.

    Attributes:
        targets: shape, dtype and sharding of each weight by its name in logical order: float32, as
            the masters of `blueprint` are stored.
    """

    def __init__(self, source: ModelSource, blueprint: Blueprint):
        """Opens the weights.

        Args:
            source: the model.
            blueprint: the same model on a mesh.

        Raises:
            UserError: they are damaged, or of another model; all that is wrong is told.
        """
        self.targets: dict[str, Any] = logical_targets(blueprint, PARTS)
        self._arrays: dict[str, jax.Array] = {}
        self._part: ReadPart | None = None
        if is_hf_folder(source.path):
            self._part = self._open_hf(source)
        elif is_model_folder(source.path):
            stored = load_model_folder(source.path).arrays
            check_weights(source.path, stored, self.targets)
            self._part = lambda name, index: stored[name].read(index)
        else:
            self._arrays = source.weights(blueprint)
            check_weights(source.path, self._arrays, self.targets)

    def read(self, name: str) -> jax.Array:
        """One weight, as its target says."""
        target, part = self.targets[name], self._part
        if part is None:
            return self._arrays[name]
        # Devices that hold the same part share one copy on the host.
        parts: dict[str, np.ndarray] = {}

        def on_device(index: Any) -> np.ndarray:
            key = repr(index)
            if key not in parts:
                parts[key] = part(name, index).astype(target.dtype, copy=False)
            return parts[key]

        array = jax.make_array_from_callback(target.shape, target.sharding, on_device)
        # The host's copies of the next one are made when these are gone.
        return jax.block_until_ready(array)

    def take(self, name: str) -> jax.Array:
        """The same, for the last time."""
        array = self.read(name)
        self._arrays.pop(name, None)
        return array

    def num_bytes(self, name: str) -> int:
        """Size of a weight in float32."""
        return 4 * math.prod(self.targets[name].shape)

    def _open_hf(self, source: ModelSource) -> ReadPart:
        found = open_hf_folder(source.path)
        bound = bindings(found.config, found.model_type)
        check_weights(source.path, _known(bound, self.targets), self.targets)
        theirs = {
            name: jax.ShapeDtypeStruct(bound[ours].shape(target.shape), np.float32)
            for ours, target in self.targets.items()
            for name in bound[ours].names(target.shape)
        }
        check_weights(source.path, found.tensors, theirs)

        def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
            shape = self.targets[name].shape
            return bound[name].read(found.tensors, shape, index, np.dtype(np.float32))

        return part


def _known(bound: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, Any]:
    """What a table of names knows, in the shapes that are wanted of it."""
    unknown = jax.ShapeDtypeStruct((), np.float32)
    return {name: targets.get(name, unknown) for name in bound}
