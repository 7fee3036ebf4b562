"""The manifest of a checkpoint: what it holds and how to tell that it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.training.files import disk_errors, write_atomically

__all__ = [
    "FORMAT",
    "DamagedCheckpoint",
    "check_targets",
    "find_damage",
    "head",
    "path_in",
    "read",
    "write",
]

FORMAT = 1
"""Version of the layout and of the arrays' meaning; another one is refused."""


_LISTED = 40  # names in one message


class DamagedCheckpoint(UserError):
    """A checkpoint that was complete and is not as it was written."""


def path_in(folder: Path) -> Path:
    """The manifest of the checkpoint in `folder`."""
    return folder / "manifest.json"


def head(step: int, arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without the files, made before they are written.

    Args:
        step: training steps done.
        arrays: anything with `shape` and `dtype`, by name.
        metadata: what JSON can hold; copied.

    Raises:
        TypeError: the metadata hold something else (a mistake in the program).
    """
    return {
        "format": FORMAT,
        "step": step,
        "arrays": {
            name: {"shape": list(array.shape), "dtype": array.dtype.name}
            for name, array in arrays.items()
        },
        "metadata": json.loads(json.dumps(metadata)),
    }


def write(folder: Path, start: Mapping[str, Any]) -> None:
    """Describes the files of a finished checkpoint, atomically: this completes it.

    Raises:
        OSError: the disk is full.
    """
    names = sorted(
        str(path.relative_to(folder)) for path in (folder / "arrays").rglob("*") if path.is_file()
    )
    with ThreadPoolExecutor(8) as pool:
        described = pool.map(lambda name: _describe(folder / name), names)
        content = {**start, "files": dict(zip(names, described))}
    content["checksum"] = _checksum(content)
    write_atomically(path_in(folder), json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest, checked against itself and against the sizes of the files.

    Raises:
        DamagedCheckpoint: it or a file is not as it was written; the message says how.
        UserError: it is of another format version, or cannot be read.
    """
    with disk_errors(path_in(folder)):
        text = path_in(folder).read_bytes()
    try:
        content = json.loads(text)
        version = content["format"]
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint("manifest.json is no manifest") from None
    # Another version may reckon its checksum in another way, so this comes first.
    if version != FORMAT:
        raise UserError(
            f"{folder}: the checkpoint has format version {version!r} and this program reads "
            f"{FORMAT}: use the version that wrote it, or start a new run"
        )
    if content.get("checksum") != _checksum(content):
        raise DamagedCheckpoint("manifest.json was altered")
    for name, expected in content["files"].items():
        try:
            size = os.stat(folder / name).st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{name}: {error.strerror}") from error
        if size != expected["bytes"]:
            told = f"{name} has {size} bytes of {expected['bytes']}"
            raise DamagedCheckpoint(f"{told}{' (truncated)' if size < expected['bytes'] else ''}")
    return content


def find_damage(folder: Path, content: Mapping[str, Any]) -> str | None:
    """Reads all files and compares their hashes; the first that differs is told, None if none."""

    def check(item: tuple[str, dict[str, Any]]) -> str | None:
        name, expected = item
        try:
            found = _describe(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None if found == expected else f"the content of {name} has changed"

    with ThreadPoolExecutor(8) as pool:
        return next(filter(None, pool.map(check, content["files"].items())), None)


def check_targets(
    folder: Path, content: Mapping[str, Any], targets: Mapping[str, Any], partial: bool | str
) -> None:
    """Compares the arrays of a checkpoint with those that a model wants.

    Args:
        folder: where the checkpoint is, for the message.
        content: its manifest.
        targets: anything with `shape` and `dtype`, by name. Any float dtype fits any other.
        partial: whether arrays that no target names are fine; text: if their names begin so.

    Raises:
        UserError: they differ; every name is told (of very many the first).
    """
    import jax.numpy as jnp

    saved = content["arrays"]
    wrong = [f"{name} is missing" for name in targets if name not in saved]
    for name in saved if partial is not True else ():
        if name not in targets and not (partial and name.startswith(partial)):
            wrong.append(f"{name} is not part of this model")
    for name in targets.keys() & saved.keys():
        shape, dtype = tuple(saved[name]["shape"]), jnp.dtype(saved[name]["dtype"])
        wanted_shape, wanted = tuple(targets[name].shape), targets[name].dtype
        floats = all(jnp.issubdtype(d, jnp.floating) for d in (dtype, wanted))
        if shape != wanted_shape:
            wrong.append(f"{name} has shape {shape} and this model's {wanted_shape}")
        elif dtype != wanted and not floats:
            wrong.append(f"{name} is {dtype} and this model's {wanted}")
    if wrong:
        more = f", and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise UserError(
            f"{folder}: the checkpoint is of another model: "
            f"{', '.join(sorted(wrong)[:_LISTED])}{more}; use the model it was made with"
        )


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        # BLAKE2b: no slower than a disk on machines without SHA instructions.
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": file.tell(), "blake2b": digest.hexdigest()}


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
