"""The files of a model folder: reading, checking and replacing them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.training.files import disk_errors

__all__ = [
    "check_weights",
    "contents",
    "describe_file",
    "listed",
    "put_in_place",
    "read_json",
    "write_json",
]

_LISTED = 20  # names in one message


def check_weights(path: Path, arrays: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    """Compares the weights of a folder with those that a model needs.

    Args:
        path: the folder, for the message.
        arrays: anything with `shape` and `dtype`, by name.
        targets: likewise; their dtypes do not matter.

    Raises:
        UserError: names, shapes or kinds of numbers differ; all are told.
    """
    import jax.numpy as jnp

    wrong = [f"{name} is missing" for name in targets if name not in arrays]
    wrong += [f"{name} is unknown" for name in arrays if name not in targets]
    for name in targets.keys() & arrays.keys():
        found, wanted = arrays[name], targets[name]
        if tuple(found.shape) != tuple(wanted.shape):
            wrong.append(f"{name} has shape {tuple(found.shape)} and not {tuple(wanted.shape)}")
        elif not jnp.issubdtype(found.dtype, jnp.floating):
            wrong.append(f"{name} is {found.dtype} and not a float")
    if wrong:
        raise UserError(
            f"{path}: the weights are of another model: {listed(sorted(wrong))}; use the config "
            "they were made with"
        )


def describe_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the index notes them.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": file.tell(), "blake2b": digest.hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path"
        ) from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged: no JSON object; restore the folder from a copy")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as a JSON file.

    Raises:
        OSError: the disk is full.
    """
    path.write_bytes((json.dumps(content, indent=1) + "\n").encode())


def put_in_place(part: Path, target: Path) -> None:
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


def contents(folder: Path) -> Iterator[Path]:
    """What lies in a folder.

    Raises:
        UserError: it is a file, or cannot be read.
    """
    with disk_errors(folder):
        yield from folder.iterdir()


def listed(names: list[str]) -> str:
    """Some words for a message, no more than fit one."""
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
