"""Reading and writing one safetensors file, bfloat16 included, by mapping it into memory.

A file is the length of its header (8 bytes, little endian), the header in JSON (for each tensor
dtype, shape and where its bytes lie), and the bytes. Nothing in it can be executed; everything that
the header says is checked before use. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moejax.errors import UserError
from moejax.inference.folder_files import check_regular

__all__ = ["header_bytes", "open_safetensors", "write_safetensors"]

_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "I64": np.int64,
    "U64": np.uint64,
    "F64": np.float64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
_METADATA = "__metadata__"
_MOST_DIMS = 32  # of an array of every numpy
_MOST_BYTES = 1 << 48  # of a tensor, and what addresses have


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Maps the tensors of a file; their bytes are read when they are used.

    Args:
        path: the file.

    Returns:
        Name to read-only array of any dtype of the format up to 64 bits.

    Raises:
        UserError: the file is missing, truncated, no file, or not what its header says.
    """
    path = Path(path)
    try:
        size = check_regular(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise _damaged(path, f"a header of {length} bytes in a file of {size}")
            header = _parse_header(path, file.read(length))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path"
        ) from None
    start = 8 + length
    entries = {name: _checked(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise _damaged(path, f"{name} begins at byte {begin} of the data and not at {end}")
        end = stop
    if start + end != size:
        how = "truncated" if start + end > size else "something follows the data"
        raise _damaged(path, f"{size} bytes and not {start + end}: {how}")
    data = np.memmap(path, np.uint8, "r", offset=0) if end else np.zeros(start, np.uint8)
    return {
        name: data[start + begin : start + stop].view(dtype).reshape(shape)
        for name, (dtype, shape, begin, stop) in entries.items()
    }


def header_bytes(tensors: Mapping[str, np.ndarray | Any], framework: str = "np") -> bytes:
    """The beginning of a file that holds these tensors in this order, the length included.

    Args:
        tensors: anything with `shape` and `dtype`, by name.
        framework: that the metadata name: `np`, or `pt`, which transformers asks for.

    Raises:
        TypeError: a dtype that the format lacks (a mistake in the program).
    """
    header: dict[str, Any] = {_METADATA: {"format": framework}}
    at = 0
    for name, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        if dtype not in _NAMES:
            raise TypeError(f"{name}: safetensors files cannot hold {dtype}")
        stop = at + dtype.itemsize * math.prod(tensor.shape)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray | Any], framework: str = "np"
) -> None:
    """Writes arrays in the order given; the widest dtypes first keep all of them aligned.

    Args:
        path: the file.
        tensors: arrays, or what becomes one when numpy asks, with `shape` and `dtype`, by name.
        framework: see `header_bytes`.

    Raises:
        OSError: the disk is full or the place cannot be written.
        TypeError: a dtype that the format lacks (a mistake in the program).
    """
    with open(path, "wb") as file:
        file.write(header_bytes(tensors, framework))
        for tensor in tensors.values():
            little = np.ascontiguousarray(tensor)
            file.write(little.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no object")
    header.pop(_METADATA, None)
    return header


def _checked(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, first and last byte of a tensor, which agree with each other."""
    try:
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape, (begin, stop) = tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, stop))
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"the header's entry of {name} cannot be read") from None
    # An empty tensor may claim any length beside its zero, which numpy multiplies all the same.
    sound = (
        whole
        and len(shape) <= _MOST_DIMS
        and dtype.itemsize * math.prod(n or 1 for n in shape) <= _MOST_BYTES
        and stop <= 2**63
        and stop - begin == dtype.itemsize * math.prod(shape)
    )
    if not sound:
        said = f"has shape {list(shape)!s:.200} of {dtype} in bytes {begin!s:.80} to {stop!s:.80}"
        raise _damaged(path, f"{name:.200} {said}")
    return dtype, shape, begin, stop


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path}: damaged: {how}; restore the file from a copy")
