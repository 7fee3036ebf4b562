"""Reading .npz files that anybody may have written: no pickle, no surprise, one line of error."""

from __future__ import annotations

import io
import os
import tokenize
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.lib import format as npy

from moejax.errors import UserError
from moejax.training.files import disk_errors, write_atomically

__all__ = ["read_arrays", "read_number", "write_arrays"]

_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# Headers are Python literals, with all that reading those may raise.
_BAD_HEADERS = (
    ValueError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    RecursionError,
    MemoryError,
    OverflowError,
)
# A header may claim any shape: what it claims must lie in the file, and fit a plain machine.
_MOST_BYTES = 16 << 30


def read_arrays(
    path: str | os.PathLike[str], kinds: Mapping[str, tuple[str, int]], optional: frozenset[str]
) -> dict[str, np.ndarray]:
    """Reads the named arrays of a .npz file; others in it are not looked at.

    Args:
        path: the file.
        kinds: of each array its kinds of dtype, such as "iu" (`numpy.dtype.kind`), and its number
            of dimensions.
        optional: names that may be missing.

    Raises:
        UserError: the file cannot be read, is no .npz, lacks an array, or holds one of another
            kind, pickled objects included.
    """
    name = os.fspath(path)
    try:
        with zipfile.ZipFile(name) as archive:
            arrays = {}
            members = {info.filename: info for info in archive.infolist()}
            for key, (kind, dims) in kinds.items():
                info = members.get(f"{key}.npy")
                if info is not None:
                    arrays[key] = _read_member(archive, info, name, key, kind, dims)
                elif key not in optional:
                    raise UserError(
                        f"{name}: has no array {key!r}, only "
                        f"{sorted(n.removesuffix('.npy') for n in members)[:8]}; write it with "
                        f"numpy.savez(FILE, {key}=…)"
                    )
            return arrays
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}; name a readable .npz file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{name}: no whole .npz file ({error}); write it anew") from None


def _read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, key: str, kind: str, dims: int
) -> np.ndarray:
    def wrong(what: object) -> UserError:
        return UserError(
            f"{name}: {key}: {what}; must be an array of {dims} dimensions and a dtype of kind "
            f"{kind!r}"
        )

    try:
        with archive.open(info) as file:
            reader = _HEADER_READERS.get(npy.read_magic(file))
            if reader is None:
                raise wrong("a header of an unknown version")
            shape, _, dtype = reader(file)
            held = info.file_size - file.tell()
            if dtype.kind not in kind or len(shape) != dims:
                raise wrong(f"{dtype} of shape {shape}")
            size = dtype.itemsize
            for length in shape:
                size *= int(length)
            if size != held or size > _MOST_BYTES:
                raise wrong(f"shape {shape} of {dtype} takes {size} bytes, the file holds {held}")
            file.seek(0)
            return npy.read_array(file, allow_pickle=False)
    except _BAD_HEADERS as error:
        raise wrong(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def read_number(array: np.ndarray) -> int:
    """A whole number that was saved as an array of no dimension."""
    return int(array.reshape(()))


def write_arrays(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Writes a .npz file in one piece.

    Raises:
        UserError: the place cannot be written.
    """
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    with disk_errors(path):
        write_atomically(path, content.getvalue())
