"""A model of random weights as a folder, so that its experts can be read from files."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from inference_models import draw_weight

from moejax.config import ModelConfig
from moejax.data.tokenizer import Tokenizer
from moejax.inference.model_folder import is_model_folder, save_model_folder
from moejax.inference.source import ModelSource, open_model
from moejax.training.state import Blueprint, weight_targets
from sharding.mesh import MeshShape, make_mesh


class _Drawn:
    """A weight that is drawn when numpy asks for its numbers.

    Args:
        target: shape, dtype and sharding.
        name: of the weight.
        number: of its key.
    """

    def __init__(self, target: Any, name: str, number: int) -> None:
        self._target, self._name, self._number = target, name, number
        self.shape, self.dtype = target.shape, target.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        key = jax.random.fold_in(jax.random.key(0), self._number)
        array = np.asarray(draw_weight(key, self._name, self._target))
        return array if dtype is None else array.astype(dtype)


def stored_source(config: ModelConfig, folder: Path) -> ModelSource:
    """The model of a folder, which is written if there is none: that of `random_source`, bfloat16.

    One weight at a time is in memory, and a file for each. Their hashes are made when they are
    written, and looked at when they are opened: so all of them have been read once, and the system
    may have them in its cache of files.

    Args:
        config: of the model.
        folder: which is kept.
    """
    if not (folder.exists() and is_model_folder(folder)):
        start = time.perf_counter()
        targets = weight_targets(Blueprint(config, make_mesh(MeshShape())), config.compute_dtype)
        flat = {
            name: _Drawn(target, name, number)
            for number, (name, target) in enumerate(targets.items())
        }
        largest = max(math.prod(target.shape) for target in targets.values())
        limit = 4 * largest + 4096
        save_model_folder(folder, flat, config, Tokenizer(), record={}, max_file_bytes=limit)
        print(f"{folder} written in {time.perf_counter() - start:.0f} s", flush=True)
    return open_model(folder)
