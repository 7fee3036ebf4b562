"""Where a model comes from: a run, a folder of ours or of transformers, the package."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.config import ModelConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.families.folder import Progress, is_hf_folder, open_hf_folder
from moejax.inference.model_folder import is_model_folder, load_model_folder
from moejax.inference.stored import Keep, MappedWeights, keep_all
from moejax.training.config_json import config_from_json

if TYPE_CHECKING:
    from moejax.training.state import Blueprint

__all__ = ["PARTS", "ModelSource", "open_model", "packaged_model"]

PARTS = ("params", "bias")
"""The parts of a training state that a model needs."""


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded onto any mesh.

    path: where it lies, with its other files, such as chat templates.
    config: the model.
    tokenizer: of its texts; None where a folder of transformers has no tokenizer.json.
    weights: reads the weights for a blueprint of this config, its `compute_dtype` aside: a flat
        dict in logical order for `load_weights`. With a second argument, what that makes of each
        weight, by its name and array, takes the weight's place as soon as it is read.
    end_ids: the ids that end a text.
    bos_id: the id that stands before every text, if one does.
    files: the same weights, mapped; None: they lie in no files that can be, as those of a run.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    weights: Callable[..., dict[str, Any]]
    end_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    files: MappedWeights | None = None

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: there is none.
        """
        if self.tokenizer is None:
            raise UserError(
                f"{self.path}: no tokenizer.json there, so texts cannot be read; put the model's "
                "tokenizer.json beside its weights"
            )
        return self.tokenizer


def packaged_model() -> Path:
    """The folder of the model that comes with the package."""
    return Path(str(resources.files("moejax"))) / "assets" / "reference"


def open_model(
    path: str | os.PathLike[str] | None,
    report: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """Opens a model without reading its weights.

    Args:
        path: a run directory, of which the newest complete checkpoint is taken, a model folder, or
            a folder of Hugging Face transformers; None takes the packaged model.
        report: gets a line for each damaged checkpoint passed over; None writes to stderr.
        progress: told the bytes done and in all while weights of a folder of transformers are
            read.

    Raises:
        UserError: there is no model, or it is damaged or of another version.
    """
    folder = packaged_model() if path is None else Path(path)
    if path is None and not folder.is_dir():
        raise UserError(
            f"{folder}: this installation has no packaged model; name a run directory or a model "
            "folder with --model"
        )
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise UserError(f"{folder}: {found}; name a run directory or a model folder")
    if is_hf_folder(folder):
        source = _open_hf(folder, progress)
    elif is_model_folder(folder):
        source = _open_folder(folder)
    else:
        source = _open_run(folder, report or _to_stderr)
    tokenizer = source.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{source.config.vocab_size}: they do not belong together; restore the folder"
        )
    return source


def _open_hf(folder: Path, progress: Progress | None) -> ModelSource:
    found = open_hf_folder(folder)
    return ModelSource(
        folder,
        found.config,
        found.tokenizer,
        lambda bp, keep=keep_all: found.read(bp, progress, keep),
        found.end_ids,
        found.bos_id,
        found,
    )


def _open_folder(folder: Path) -> ModelSource:
    model = load_model_folder(folder)
    return _with_ids(
        ModelSource(
            folder,
            model.config,
            model.tokenizer,
            lambda bp, keep=keep_all: model.read(_targets(bp), keep),
            (model.tokenizer.eos_id,),
            files=model,
        )
    )


def _with_ids(source: ModelSource) -> ModelSource:
    """The ids of texts as the model has them that it came from, if it was one of transformers."""
    from moejax.training.origin import origin_of

    origin = origin_of(source)
    return dataclasses.replace(source, end_ids=origin.end_ids, bos_id=origin.bos_id)


def _open_run(folder: Path, report: Callable[[str], None]) -> ModelSource:
    # Of the configuration only the model: the rest may be of another version of train.py.
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"{folder}: no config.json there; name a run directory or a model folder")
    try:
        data = json.loads(config_path.read_bytes())["model"]
    except OSError as error:
        raise UserError(f"{config_path}: {error.strerror or error}; check the path") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{config_path}: holds no model configuration; restore it or name another run"
        ) from None
    config = config_from_json(ModelConfig, data, source=str(config_path))
    tokenizer = Tokenizer.load(folder / "tokenizer")

    def weights(blueprint: Blueprint, keep: Keep = keep_all) -> dict[str, Any]:
        # Imported late, as orbax takes a second.
        from moejax.training.checkpoint import Checkpoints

        with Checkpoints(folder / "checkpoints") as checkpoints:
            found = checkpoints.restore_latest(_targets(blueprint), partial=True, report=report)
        if found is None:
            raise UserError(
                f"{folder}: no complete checkpoint there yet; wait for the first save, or name "
                "another model"
            )
        arrays = found[1]
        kept: dict[str, Any] = {}
        while arrays:
            kept |= keep(*arrays.popitem())
        return kept

    return _with_ids(ModelSource(folder, config, tokenizer, weights, (tokenizer.eos_id,)))


def _targets(blueprint: Blueprint) -> dict[str, Any]:
    from moejax.training.state import logical_targets

    return logical_targets(blueprint, PARTS)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
