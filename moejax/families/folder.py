"""A folder of transformers: config.json, tokenizer, and weights that are laid over any mesh."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from moejax.config import ModelConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.families import bindings, read_config
from moejax.families.fields import short
from moejax.families.quantized import dequantized
from moejax.families.tensors import open_tensors
from moejax.inference.folder_files import (
    TOKENIZER_BYTES,
    config_head,
    differences,
    file_in,
    listed,
    read_json,
    read_small,
)
from moejax.inference.stored import Keep, keep_all, on_devices

if TYPE_CHECKING:
    from moejax.families.table import Binding
    from moejax.training.state import Blueprint

__all__ = ["HfFolder", "Progress", "is_hf_folder", "open_hf_folder"]

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and those in all."""

_PASSED_OVER = re.compile(r".*\.rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.")


@dataclass(frozen=True)
class HfFolder:
    """What `open_hf_folder` found; the weights are mapped, not read.

    path: the folder.
    config: the model.
    model_type: its family.
    tokenizer: None where the folder has no tokenizer.json.
    end_ids: the ids that end a text.
    bos_id: the id that stands before every text, if one does.
    tensors: the stored weights by their names there, without those that the model has no use for.
    """

    path: Path
    config: ModelConfig
    model_type: str
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    bos_id: int | None
    tensors: Mapping[str, Any]

    def read(
        self, blueprint: Blueprint, progress: Progress | None = None, keep: Keep = keep_all
    ) -> dict[str, Any]:
        """Reads the weights onto devices, one after the other, each device only its own part.

        Args:
            blueprint: the model on a mesh; its `compute_dtype` decides.
            progress: told after each weight.
            keep: what becomes of each weight as soon as it is read.

        Returns:
            Arrays in logical order, as `weight_targets` says: `load_weights` takes them as they
            are.

        Raises:
            UserError: the folder holds other names, shapes or kinds of numbers; all are told. Or
                a scale is not finite.
        """
        from moejax.training.state import weight_targets

        targets = weight_targets(blueprint, np.dtype(blueprint.config.compute_dtype))
        self.check(targets)
        total = sum(math.prod(t.shape) * t.dtype.itemsize for t in targets.values())
        done = 0
        arrays: dict[str, Any] = {}
        for name, target in targets.items():
            arrays |= keep(name, self.read_weight(name, target))
            done += math.prod(target.shape) * target.dtype.itemsize
            if progress is not None:
                progress(done, total)
        return arrays

    def check(self, targets: Mapping[str, Any]) -> None:
        """Compares the tensors with the weights that a model needs.

        Args:
            targets: anything with `shape`, by name in logical order.

        Raises:
            UserError: the folder holds other names, shapes or kinds of numbers; all are told.
        """
        import jax
        from jax import numpy as jnp

        bound = self._bound
        wrong = [f"{name} has no rule" for name in targets.keys() - bound.keys()]
        wrong += [f"{name} is not in the model" for name in bound.keys() - targets.keys()]
        theirs = {
            name: jax.ShapeDtypeStruct(bound[ours].shape(target.shape), jnp.float32)
            for ours, target in targets.items()
            if ours in bound
            for name in bound[ours].names(target.shape)
        }
        wrong += differences(self.tensors, theirs)
        if wrong:
            raise UserError(
                f"{self.path}: the weights are not those of config.json, or it is of another "
                f"model: {listed(sorted(wrong))}; fetch the whole folder again"
            )

    def read_weight(self, name: str, target: Any) -> Any:
        """One weight in the dtype and sharding of its target, after `check`.

        Raises:
            UserError: a scale is not finite.
        """
        return on_devices(target, lambda index: self.read_part(name, target, index))

    def read_part(self, name: str, target: Any, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a weight on the host, in the dtype of its target, after `check`.

        Raises:
            UserError: a scale is not finite.
        """
        try:
            return self._bound[name].read(self.tensors, target.shape, index, target.dtype)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def stored_bytes(self, name: str, target: Any) -> int:
        """Size of a weight in the files, with the scales of numbers of few bits."""
        return sum(self.tensors[theirs].nbytes for theirs in self._bound[name].names(target.shape))

    @functools.cached_property
    def _bound(self) -> dict[str, Binding]:
        return bindings(self.config, self.model_type)


def is_hf_folder(path: Path) -> bool:
    """Whether a folder claims to hold a model of transformers.

    Raises:
        UserError: its config.json is too large, or something else than a file.
    """
    head = config_head(path)
    return "model_type" in head and "format" not in head


def open_hf_folder(path: Path) -> HfFolder:
    """Opens a folder; of the weights only the headers are read.

    Raises:
        UserError: something is missing, damaged, or of a kind that this program does not know.
    """
    hf = read_json(file_in(path, "config.json"))
    try:
        config = read_config(hf)
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: {error}") from None
    stored = open_tensors(path)
    try:
        tensors = dequantized(_of_model(stored, config, hf), hf.get("quantization_config"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    _check_layers(path, tensors, config)
    tokenizer, end_ids, bos_id = _read_tokenizer(path, hf, config)
    return HfFolder(path, config, hf["model_type"], tokenizer, end_ids, bos_id, tensors)


def _check_layers(path: Path, tensors: Iterable[str], config: ModelConfig) -> None:
    """Refuses layers that only config.json has, before a model of so many is built."""
    found = {int(layer[1]) for name in tensors if (layer := _LAYER.match(name))}
    missing = next((layer for layer in range(config.num_layers) if layer not in found), None)
    if missing is not None:
        raise UserError(
            f"{path}: num_hidden_layers={config.num_layers} in config.json, and the weights have "
            f"no layer {missing}; fetch the whole folder again"
        )


def _of_model(
    stored: Mapping[str, Any], config: ModelConfig, hf: Mapping[str, Any]
) -> dict[str, Any]:
    """The tensors without those that are known to be of no use."""
    # Modules that predict further tokens (arXiv 2412.19437 §2.2) lie behind the layers.
    fields = "num_nextn_predict_layers", "num_mtp_layers"
    further = next((hf[f] for f in fields if isinstance(hf.get(f), int)), 0)
    passed = range(config.num_layers, config.num_layers + further)

    def is_used(name: str) -> bool:
        layer = _LAYER.match(name)
        if (layer and int(layer[1]) in passed) or _PASSED_OVER.fullmatch(name):
            return False
        return not (config.tie_embeddings and name == "lm_head.weight")

    return {name: tensor for name, tensor in stored.items() if is_used(name)}


def _read_tokenizer(
    folder: Path, hf: Mapping[str, Any], config: ModelConfig
) -> tuple[Tokenizer | None, tuple[int, ...], int | None]:
    """The tokenizer, the ids that end a text, and the one that begins it."""
    generation, settings = (
        read_json(file_in(folder, name), optional=True)
        for name in ("generation_config.json", "tokenizer_config.json")
    )
    end_ids = _ids(folder / "config.json", "eos_token_id", hf, config)
    end_ids += _ids(folder / "generation_config.json", "eos_token_id", generation, config)
    path = file_in(folder, "tokenizer.json")
    if not path.exists():
        begins = _ids(folder / "config.json", "bos_token_id", hf, config)
        bos_id = begins[0] if begins and settings.get("add_bos_token") is True else None
        return None, _unique(end_ids), bos_id
    try:
        text = read_small(path, TOKENIZER_BYTES).decode()
        model = tokenizers.Tokenizer.from_str(text)
    except UserError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise UserError(
            f"{path}: not a tokenizer ({str(error).splitlines()[0]}); fetch it again"
        ) from None
    if (named := _token_id(model, settings.get("eos_token"))) is not None:
        end_ids += (named,)
    bos_id = _token_id(model, settings.get("bos_token"))
    if settings.get("add_bos_token") is None:
        # What the tokenizer itself puts before an empty text.
        before = model.encode("", add_special_tokens=True).ids
        bos_id = before[0] if before and before[0] not in end_ids[:1] else None
    elif not settings["add_bos_token"]:
        bos_id = None
    # An id above all others is a tokenizer's of ours.
    above = max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    known = [i for i in end_ids if model.id_to_token(i) is not None or i == above]
    try:
        tokenizer = Tokenizer(text, known[0]) if known else Tokenizer.from_file(str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tokenizer, _unique(end_ids) or (tokenizer.eos_id,), bos_id


def _ids(file: Path, field: str, data: Mapping[str, Any], config: ModelConfig) -> tuple[int, ...]:
    value = data.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or not 0 <= i < config.vocab_size for i in ids):
        raise UserError(
            f"{file}: {field}={short(value)}: must be ids below vocab_size={config.vocab_size}; "
            "mend the file"
        )
    return tuple(ids)


def _token_id(model: tokenizers.Tokenizer, token: Any) -> int | None:
    """The id of a token as tokenizer_config.json names it: as a text, or as an object with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return model.token_to_id(text) if isinstance(text, str) else None


def _unique(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))
