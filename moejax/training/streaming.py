"""The weights of a stored model in float32, one tensor after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moejax.families.folder import HfFolder, is_hf_folder, open_hf_folder
from moejax.inference.folder_files import check_weights
from moejax.inference.model_folder import ModelFolder, is_model_folder, load_model_folder
from moejax.inference.source import PARTS, ModelSource
from moejax.training.state import Blueprint, logical_targets

__all__ = ["LazyWeight", "WeightStream"]


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
        self._folder: HfFolder | ModelFolder | None = None
        if is_hf_folder(source.path):
            self._folder = open_hf_folder(source.path)
        elif is_model_folder(source.path):
            self._folder = load_model_folder(source.path)
        if self._folder is not None:
            self._folder.check(self.targets)
        else:
            self._arrays = source.weights(blueprint)
            check_weights(source.path, self._arrays, self.targets)

    def read(self, name: str) -> jax.Array:
        """One weight, as its target says."""
        if self._folder is None:
            return self._arrays[name]
        return self._folder.read_weight(name, self.targets[name])

    def take(self, name: str) -> jax.Array:
        """The same, for the last time."""
        array = self.read(name)
        self._arrays.pop(name, None)
        return array

    def num_bytes(self, name: str) -> int:
        """Size of a weight in float32."""
        return 4 * math.prod(self.targets[name].shape)


class LazyWeight:
    """A weight that is read when numpy asks for its numbers.

    Args:
        stream: where it is read from.
        name: of the weight.
        told: is called with the name when it has been read.

    Attributes:
        shape, dtype: of its target.
    """

    def __init__(
        self, stream: WeightStream, name: str, told: Callable[[str], None] = lambda name: None
    ) -> None:
        self._stream, self._name, self._told = stream, name, told
        self.shape, self.dtype = stream.targets[name].shape, stream.targets[name].dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self._stream.read(self._name))
        self._told(self._name)
        return array if dtype is None else array.astype(dtype)
