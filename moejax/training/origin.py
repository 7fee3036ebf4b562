"""Where weights of a run or a model folder came from: family, ids of texts, files about texts.

origin.json                                        path, family, end_ids, bos_id
tokenizer_config.json  chat_template.jinja  …      copies of the folder's, if it has them
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.families.folder import is_hf_folder
from moejax.inference.folder_files import file_in, read_json
from moejax.inference.source import ModelSource
from moejax.training.files import disk_errors, write_atomically

__all__ = ["Origin", "keep_origin", "origin_of", "text_files"]

_FILE = "origin.json"
_TEXT_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Origin:
    """What a folder says of where its model comes from.

    path: the folder.
    family: `model_type` of transformers; None for a model that was never one of theirs.
    end_ids: the ids that end a text.
    bos_id: the id that stands before every text, if one does.
    """

    path: str
    family: str | None
    end_ids: tuple[int, ...]
    bos_id: int | None


def origin_of(source: ModelSource) -> Origin:
    """Of a model: a folder of transformers is its own, a run may have begun from one.

    Raises:
        UserError: the run's record is damaged.
    """
    own = Origin(str(source.path.absolute()), None, source.end_ids, source.bos_id)
    if is_hf_folder(source.path):
        return dataclasses.replace(own, family=read_json(source.path / "config.json")["model_type"])
    if not (source.path / _FILE).exists():
        return own
    said = read_json(source.path / _FILE)
    try:
        return Origin(
            said["path"], said["family"], tuple(int(i) for i in said["end_ids"]), said["bos_id"]
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{source.path / _FILE}: damaged: restore it from a copy, or remove it"
        ) from None


def text_files(source: ModelSource) -> list[Path]:
    """The files about texts that a model's folder has, its tokenizer aside.

    Raises:
        UserError: one is a link that leads out of the folder.
    """
    files = (file_in(source.path, name) for name in _TEXT_FILES)
    return [file for file in files if file.exists()]


def keep_origin(folder: Path, source: ModelSource) -> None:
    """Notes in a run's directory, or a model folder, where its weights come from.

    Args:
        folder: the directory.
        source: the model that the run begins with, or that the folder's was made of.

    Raises:
        UserError: the disk is full or the directory cannot be written.
    """
    record: dict[str, Any] = dataclasses.asdict(origin_of(source))
    with disk_errors(folder):
        for file in text_files(source):
            shutil.copyfile(file, folder / file.name)
        write_atomically(folder / _FILE, json.dumps(record, indent=2) + "\n")
