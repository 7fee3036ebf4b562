"""The files of a model folder: reading, checking and replacing them.

A folder may come from anybody. So nothing outside of it is read, a file must be a file (reading a
pipe may never end), and what is read as a whole has a largest size. The one exception to the first
are the links of transformers' own cache, where `models--NAME/snapshots/COMMIT/FILE` is a link into
`models--NAME/blobs/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.training.files import disk_errors

__all__ = [
    "TOKENIZER_BYTES",
    "check_regular",
    "check_weights",
    "config_head",
    "describe_file",
    "differences",
    "file_in",
    "listed",
    "read_json",
    "read_small",
    "replacing",
    "write_json",
]

TOKENIZER_BYTES = 256 << 20
"""Largest tokenizer.json; those of 250,000 ids take some 30 MB."""

_SMALL_BYTES = 64 << 20  # an index of 100,000 tensors takes some 10 MB
_NAME_BYTES = 255  # of a file, on the usual systems
_LISTED = 20  # names in one message


def file_in(folder: Path, name: str) -> Path:
    """The path of a file of a folder, there or not.

    Raises:
        UserError: the name, or a link, leads out of the folder, or it can be no name of a file.
    """
    path = folder / name
    try:
        if len(os.fsencode(name)) > _NAME_BYTES:
            raise ValueError(f"longer than {_NAME_BYTES} bytes")
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise UserError(
            f"{folder}: {name!r:.80}: no file's name, or a link that leads nowhere "
            f"({str(error)[:80]}); put the file itself there"
        ) from None
    if Path(name).name != name or not target.is_relative_to(_root(folder.resolve())):
        raise UserError(
            f"{folder}: {name!r} leads out of the folder, to {target}: put the file itself there"
        )
    return path


def check_regular(path: Path) -> int:
    """The size of a file in bytes, after checking that it is no pipe, device or folder.

    Raises:
        OSError: it is missing or out of reach.
        UserError: it is something else than a file.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is no regular file; put the file itself there")
    return found.st_size


def read_small(path: Path, limit: int = _SMALL_BYTES) -> bytes:
    """The content of a file that is read as a whole.

    Args:
        path: the file.
        limit: most bytes.

    Raises:
        OSError: it is missing or cannot be read.
        UserError: it is larger, or something else than a file.
    """
    size = check_regular(path)
    if size <= limit:
        with open(path, "rb") as file:
            # Some files of the system are longer than they say.
            data = file.read(limit + 1)
        if len(data) <= limit:
            return data
    raise UserError(
        f"{path}: {size} bytes, at most {limit} are read; restore it from where the model came from"
    )


def check_weights(path: Path, arrays: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    """Compares the weights of a folder with those that a model needs.

    Args:
        path: the folder, for the message.
        arrays: anything with `shape` and `dtype`, by name.
        targets: anything with `shape` and `dtype`, by name.

    Raises:
        UserError: names, shapes or kinds of numbers differ; all are told.
    """
    wrong = differences(arrays, targets)
    if wrong:
        raise UserError(
            f"{path}: the weights are of another model: {listed(sorted(wrong))}; use the config "
            "they were made with"
        )


def differences(arrays: Mapping[str, Any], targets: Mapping[str, Any]) -> list[str]:
    """How tensors differ from those wanted in name, shape and kind of number; a phrase for each.

    Args:
        arrays: anything with `shape` and `dtype`, by name.
        targets: likewise, those that are wanted: floats of any width, or whole numbers.
    """
    import jax.numpy as jnp

    wrong = [f"{name} is missing" for name in targets if name not in arrays]
    wrong += [f"{name} is unknown" for name in arrays if name not in targets]
    for name in targets.keys() & arrays.keys():
        found, wanted = arrays[name], tuple(targets[name].shape)
        whole = jnp.issubdtype(targets[name].dtype, jnp.integer)
        kind = "whole number" if whole else "float"
        if tuple(found.shape) != wanted:
            wrong.append(f"{name} has shape {tuple(found.shape)} and not {wanted}")
        elif not jnp.issubdtype(found.dtype, jnp.integer if whole else jnp.floating):
            wrong.append(f"{name} is {found.dtype} and not a {kind}")
    return wrong


def describe_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the index notes them.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": file.tell(), "blake2b": digest.hexdigest()}


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        optional: whether it may be missing, which then is an empty object.

    Raises:
        UserError: the file is missing, too large, no file, or holds something else.
    """
    try:
        content = json.loads(read_small(path))
    except OSError as error:
        if optional and isinstance(error, FileNotFoundError):
            return {}
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path"
        ) from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged: no JSON object; restore the folder from a copy")
    return content


def config_head(folder: Path) -> dict[str, Any]:
    """What a folder's config.json holds; nothing where it is missing or no JSON object.

    Raises:
        UserError: it is too large, or something else than a file.
    """
    try:
        head = json.loads(read_small(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return head if isinstance(head, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as a JSON file.

    Raises:
        OSError: the disk is full.
    """
    path.write_bytes((json.dumps(content, indent=1) + "\n").encode())


@contextlib.contextmanager
def replacing(target: Path, is_one: Callable[[Path], bool], kind: str) -> Iterator[Path]:
    """An empty folder to be filled, which takes the place of `target` when the block is done.

    If the block fails, what was there stays.

    Args:
        target: the folder that is made or replaced.
        is_one: whether a folder with something in it may be replaced.
        kind: what such a folder is, for the message.

    Raises:
        UserError: the path is something else, or the disk is full.
    """
    with disk_errors(target):
        if target.exists() and not is_one(target) and any(target.iterdir()):
            raise UserError(f"{target}: is there and is no {kind}: choose another path")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with disk_errors(target):
            part.mkdir(parents=True)
            yield part
            _put_in_place(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def listed(names: list[str]) -> str:
    """Some words for a message, no more than fit one."""
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _put_in_place(part: Path, target: Path) -> None:
    """Puts a finished folder in its place; the old one goes only when the new one is there."""
    if not target.exists():
        part.rename(target)
        return
    old = part.with_suffix(".old")
    target.rename(old)
    try:
        part.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _root(folder: Path) -> Path:
    """Where a folder's links may lead: the folder, or its model's part of transformers' cache."""
    model = folder.parent.parent
    cached = folder.parent.name == "snapshots" and model.name.startswith("models--")
    return model if cached else folder
