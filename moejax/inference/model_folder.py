"""A model folder: what is needed to run a model, in files small enough to be kept anywhere.

    config.json                          format, version, model, record of the training
    tokenizer/                           as `Tokenizer.save` writes it
    model-00001-of-00003.safetensors …   weights, `params/…` and `bias/…`, in logical order
    model.safetensors.index.json         the file of each tensor; size and hash of each file

Names are those of checkpoints. A tensor larger than a file may be is cut along its first dimension
into `NAME[start:stop]`. Nothing is unpickled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moejax.config import ModelConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.folder_files import (
    check_weights,
    config_head,
    describe_file,
    listed,
    read_json,
    replacing,
    write_json,
)
from moejax.inference.safetensors_file import header_bytes, open_safetensors, write_safetensors
from moejax.inference.stored import (
    Keep,
    StoredArray,
    collect_pieces,
    cut,
    keep_all,
    on_devices,
)
from moejax.training.config_json import config_from_json, config_to_json
from moejax.training.files import disk_errors

__all__ = [
    "FORMAT",
    "VERSION",
    "ModelFolder",
    "is_model_folder",
    "load_model_folder",
    "save_model_folder",
]

FORMAT = "moejax model"
VERSION = 1
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFolder:
    """What `load_model_folder` found; the weights are mapped, not read.

    path: the folder.
    config: the model.
    tokenizer: of its texts.
    record: how it was trained.
    arrays: the stored weights by name.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    record: dict[str, Any]
    arrays: dict[str, StoredArray]

    def read(self, targets: Mapping[str, Any], keep: Keep = keep_all) -> dict[str, Any]:
        """Reads weights onto devices, each device only its own part.

        Args:
            targets: `jax.ShapeDtypeStruct` with a sharding by name, as from `logical_targets` for
                `("params", "bias")`.
            keep: what becomes of each weight as soon as it is read.

        Returns:
            Arrays of these shapes and shardings, parameters in the dtype they are stored in,
            biases in the target's.

        Raises:
            UserError: the folder holds other names, shapes or kinds of numbers; all are told.
        """
        self.check(targets)
        kept: dict[str, Any] = {}
        for name, target in targets.items():
            dtype = target.dtype if name.startswith("bias/") else self.arrays[name].dtype
            kept |= keep(name, self._read_as(name, target, dtype))
        return kept

    def check(self, targets: Mapping[str, Any]) -> None:
        """Compares the weights with those that a model needs.

        Args:
            targets: anything with `shape`, by name.

        Raises:
            UserError: the folder holds other names, shapes or kinds of numbers; all are told.
        """
        check_weights(self.path, self.arrays, targets)

    def read_weight(self, name: str, target: Any) -> Any:
        """One weight in the dtype and sharding of its target, after `check`."""
        return self._read_as(name, target, target.dtype)

    def read_part(self, name: str, target: Any, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a parameter on the host, in the dtype it is stored in, after `check`."""
        del target
        return self.arrays[name].read(index)

    def stored_bytes(self, name: str, target: Any) -> int:
        """Size of a weight in the files."""
        del target
        stored = self.arrays[name]
        return math.prod(stored.shape) * stored.dtype.itemsize

    def _read_as(self, name: str, target: Any, dtype: Any) -> Any:
        stored = self.arrays[name]
        return on_devices(target, lambda index: stored.read(index).astype(dtype, copy=False))


def is_model_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder claims to be a model folder, sound or not.

    Raises:
        UserError: its config.json is too large, or something else than a file.
    """
    folder = Path(path)
    head = config_head(folder)
    # Folders of transformers may have an index of the same name.
    return "format" in head or ("model_type" not in head and (folder / _INDEX).exists())


def load_model_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """Opens a model folder and checks that its files are those that were written.

    Raises:
        UserError: something is missing, damaged, or of another format or version.
    """
    folder = Path(path)
    head = read_json(folder / "config.json")
    if head.get("format") != FORMAT:
        raise UserError(
            f"{folder}/config.json: format {head.get('format')!r} and not {FORMAT!r}: name a "
            "model folder or a run directory"
        )
    if head.get("version") != VERSION:
        raise UserError(
            f"{folder}/config.json: version {head.get('version')!r}, and this program reads "
            f"{VERSION}: use the program that wrote it"
        )
    config = config_from_json(ModelConfig, head.get("model"), source=f"{folder}/config.json")
    record = head.get("record")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    index = read_json(folder / _INDEX)
    files, names = index.get("files"), index.get("weight_map")
    if not isinstance(files, dict) or not isinstance(names, dict):
        raise UserError(f"{folder / _INDEX}: damaged: no files or weight_map; restore the folder")
    tensors: dict[str, np.ndarray] = {}
    for file, expected in files.items():
        if Path(file).name != file:
            raise UserError(f"{folder / _INDEX}: names {file!r}, which is outside of the folder")
        tensors |= _open_checked(folder / file, expected)
    if tensors.keys() != names.keys():
        differ = sorted(tensors.keys() ^ names.keys())
        raise UserError(
            f"{folder / _INDEX}: damaged: it and the files differ in {listed(differ)}; restore "
            "the folder from a copy"
        )
    arrays = collect_pieces(str(folder), tensors)
    return ModelFolder(
        folder, config, tokenizer, record if isinstance(record, dict) else {}, arrays
    )


def save_model_folder(
    path: str | os.PathLike[str],
    flat: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    record: Mapping[str, Any],
    max_file_bytes: int = 16_000_000,
    dtype: Any = ml_dtypes.bfloat16,
) -> None:
    """Writes a model folder, replacing one that is there only when all is written.

    Args:
        path: the folder.
        flat: arrays in logical order, as `to_logical` gives them; of their names only `params/…`
            and `bias/…` are written.
        config: the model.
        tokenizer: of its texts.
        record: how it was trained; what JSON can hold.
        max_file_bytes: largest size of a weight file.
        dtype: of the weights that need not stay float32; whole numbers stay as they are.

    Raises:
        UserError: the weights are not those of `config`, the path is something else than a model
            folder, or the disk is full.
    """
    target = Path(path).absolute()
    weights = {n: v for n, v in flat.items() if n.startswith(("params/", "bias/"))}
    kept = _float32_names(config, weights, target)
    with replacing(target, is_model_folder, "model folder") as part:
        (part / "tokenizer").mkdir()
        tokenizer.save(part / "tokenizer")
        head = {"format": FORMAT, "version": VERSION, "model": config_to_json(config)}
        write_json(part / "config.json", {**head, "record": dict(record)})
        _write_weights(part, weights, kept, max_file_bytes, np.dtype(dtype))


def _write_weights(
    folder: Path, weights: Mapping[str, Any], kept: set[str], limit: int, dtype: np.dtype
) -> None:
    def stored(name: str) -> np.dtype:
        own = np.dtype(weights[name].dtype)
        if np.issubdtype(own, np.integer):
            return own
        return np.dtype(np.float32) if name in kept else dtype

    # The widest numbers first, so that all stay aligned; then by name.
    order = sorted(weights, key=lambda name: (-stored(name).itemsize, name))
    pieces = [
        piece for name in order for piece in cut(name, weights[name].shape, stored(name), limit)
    ]
    groups = _groups(pieces, limit)
    files: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        arrays = {p.key: p.of(weights[p.name]) for p in group}
        write_safetensors(folder / file, arrays)
        files[file] = describe_file(folder / file)
        weight_map |= {p.key: file for p in group}
    total = sum(p.num_bytes for p in pieces)
    index = {"metadata": {"total_size": total}, "files": files, "weight_map": weight_map}
    write_json(folder / _INDEX, index)


def _groups(pieces: list, limit: int) -> list[list]:
    """Fills files one after the other."""
    groups: list[list] = [[]]
    for piece in pieces:
        grown = [*groups[-1], piece]
        size = len(header_bytes({p.key: p for p in grown})) + sum(p.num_bytes for p in grown)
        if size > limit and groups[-1]:
            groups.append([piece])
        else:
            groups[-1] = grown
    return groups


def _float32_names(config: ModelConfig, weights: Mapping[str, Any], target: Path) -> set[str]:
    """The names whose values stay float32, after checking all names and shapes."""
    from moejax.model.canonical import canonical
    from moejax.training.state import Blueprint, logical_targets
    from sharding.mesh import MeshShape, abstract_mesh

    blueprint = Blueprint(config, abstract_mesh(MeshShape()))
    check_weights(target, weights, logical_targets(blueprint, ("params", "bias")))
    float32 = {
        f"params/{name}"
        for name, variable in canonical(blueprint.params).items()
        if variable.get_metadata()["float32"]
    }
    return float32 | {name for name in weights if name.startswith("bias/")}


def _open_checked(path: Path, expected: Any) -> dict[str, np.ndarray]:
    tensors = open_safetensors(path)
    with disk_errors(path):
        if describe_file(path) != expected:
            raise UserError(f"{path}: damaged: its content has changed; restore it from a copy")
    return tensors
