"""Writes a model as a folder that Hugging Face transformers opens."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import ModelConfig
from moejax.data.tokenizer import Tokenizer
from moejax.families import bindings, write_config
from moejax.families.folder import is_hf_folder
from moejax.families.table import Binding
from moejax.families.tensors import INDEX, SINGLE
from moejax.inference.folder_files import check_weights, replacing, write_json
from moejax.inference.safetensors_file import write_safetensors

__all__ = ["save_hf_folder"]


def save_hf_folder(
    path: str | os.PathLike[str],
    flat: Mapping[str, Any],
    config: ModelConfig,
    *,
    family: str,
    tokenizer: Tokenizer | None = None,
    files: Iterable[Path] = (),
    end_ids: Sequence[int] | None = None,
    bos_id: int | None = None,
    max_file_bytes: int = 5_000_000_000,
    dtype: Any = None,
) -> None:
    """Writes a folder for transformers, replacing one that is there only when all is written.

    One tensor at a time is on the host.

    Args:
        path: the folder.
        flat: arrays in logical order, as `to_logical` gives them, sharded or not; of their names
            only `params/…` and `bias/…` are written.
        config: the model.
        family: its `model_type`, such as `qwen3_moe`.
        tokenizer: of its texts; one of bytes has no tokenizer.json and is left out.
        files: copied as they are, such as a tokenizer.json or a chat template.
        end_ids: the ids that end a text; None: the tokenizer's.
        bos_id: the id that stands before every text, if one does.
        max_file_bytes: size of a weight file from which on another one is begun.
        dtype: of the weights, selection biases aside, which are float32; None: the model's compute
            dtype.

    Raises:
        UserError: the family cannot say this model, the weights are not those of `config`, the
            path is something else than a folder of transformers, or the disk is full.
    """
    target = Path(path).absolute()
    stored = np.dtype(config.compute_dtype if dtype is None else dtype)
    hf = {**write_config(config, family), "torch_dtype": stored.name}
    if end_ids is None:
        end_ids = () if tokenizer is None else (tokenizer.eos_id,)
    # Said even where there are none: transformers has ids of its own for fields that are missing.
    ids = {"eos_token_id": _one_or_all(end_ids), "bos_token_id": bos_id, "pad_token_id": None}
    weights = {n: v for n, v in flat.items() if n.startswith(("params/", "bias/"))}
    _check(config, weights, target)
    parts = list(_Weights(weights, bindings(config, family)).parts(stored))
    with replacing(target, is_hf_folder, "model of transformers") as part:
        _write_weights(part, parts, max_file_bytes)
        write_json(part / "config.json", {**hf, **ids})
        write_json(part / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
        _write_tokenizer(part, tokenizer)
        for file in files:
            shutil.copyfile(file, part / Path(file).name)


class _Weights:
    """Our tensors cut into theirs; of ours the one that was last asked for stays on the host."""

    def __init__(self, arrays: Mapping[str, Any], bound: Mapping[str, Binding]):
        self._arrays, self._bound = arrays, bound
        self._held = ""
        self._parts: dict[str, np.ndarray] = {}

    def parts(self, stored: np.dtype) -> Iterator[_Part]:
        """All of theirs, in the order of ours."""
        for ours, array in self._arrays.items():
            binding = self._bound[ours]
            shape = binding.shape(array.shape)
            dtype = np.dtype(np.float32) if ours.startswith("bias/") else stored
            for name in binding.names(array.shape):
                yield _Part(ours, name, shape, dtype, self)

    def get(self, ours: str, name: str) -> np.ndarray:
        """One of theirs."""
        if self._held != ours:
            self._parts = {}  # before the next one comes
            self._parts = dict(self._bound[ours].split(np.asarray(self._arrays[ours])))
            self._held = ours
        return self._parts[name]


@dataclass(frozen=True)
class _Part:
    """A tensor of theirs, made when numpy asks for its numbers."""

    ours: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    weights: _Weights

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        part = self.weights.get(self.ours, self.name)
        return np.array(part, self.dtype if dtype is None else dtype)


def _write_weights(folder: Path, parts: list[_Part], limit: int) -> None:
    files: list[list[_Part]] = []
    size = limit
    for part in parts:
        if size + part.num_bytes > limit:
            files.append([])
            size = 0
        files[-1].append(part)
        size += part.num_bytes
    weight_map: dict[str, str] = {}
    for number, group in enumerate(files, 1):
        many = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        name = SINGLE if len(files) == 1 else many
        # The widest numbers first: torch maps only what is aligned.
        group.sort(key=lambda part: -part.dtype.itemsize)
        tensors: dict[str, Any] = {part.name: part for part in group}
        write_safetensors(folder / name, tensors, framework="pt")
        weight_map |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        total = sum(part.num_bytes for part in parts)
        weight_map = dict(sorted(weight_map.items()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None or tokenizer.kind == "bytes":
        return
    tokenizer.save(folder)
    (folder / "tokenizer_meta.json").unlink()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    write_json(folder / "tokenizer_config.json", settings)


def _check(config: ModelConfig, weights: Mapping[str, Any], target: Path) -> None:
    from moejax.training.state import Blueprint, logical_targets
    from sharding.mesh import MeshShape, abstract_mesh

    blueprint = Blueprint(config, abstract_mesh(MeshShape()))
    check_weights(target, weights, logical_targets(blueprint, ("params", "bias")))


def _one_or_all(ids: Sequence[int]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)
