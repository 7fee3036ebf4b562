"""Stored tensors: those larger than one file are cut in pieces; how they come onto devices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moejax.errors import UserError

__all__ = [
    "Keep",
    "MappedWeights",
    "Piece",
    "StoredArray",
    "collect_pieces",
    "cut",
    "keep_all",
    "on_devices",
]

Keep = Callable[[str, Any], Mapping[str, Any]]
"""From a weight that was just read, its name and array, to what takes its place."""


class MappedWeights(Protocol):
    """The weights of a folder, mapped: the bytes of a part are read when it is asked for."""

    def check(self, targets: Mapping[str, Any]) -> None:
        """Compares the weights with those that a model needs; UserError tells all that is wrong."""

    def read_weight(self, name: str, target: Any) -> Any:
        """One weight in the dtype and sharding of its target, after `check`."""

    def read_part(self, name: str, target: Any, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of a part on the host, in the dtype in which `ModelSource.weights` reads it.

        Args:
            name: of the weight, one of the parameters; after `check`.
            target: of the whole weight, anything with `shape` and `dtype`.
            index: a slice with step 1 for each dimension.
        """

    def stored_bytes(self, name: str, target: Any) -> int:
        """Size of a weight in the files."""


_PIECE = re.compile(r"(.+)\[(\d+):(\d+)\]")
_HEADER_ROOM = 1024  # bytes of a file's header with one tensor, more than is needed


@dataclass(frozen=True)
class Piece:
    """A tensor, or some rows of one, as a file holds it.

    name: of the tensor.
    rows: which ones; None for the whole tensor.
    shape, dtype: of the piece.
    """

    name: str
    rows: slice | None
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def key(self) -> str:
        """The name in the file."""
        return (
            self.name if self.rows is None else f"{self.name}[{self.rows.start}:{self.rows.stop}]"
        )

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, whole: Any) -> np.ndarray:
        """The piece's numbers, from a tensor of numpy or JAX."""
        array = np.asarray(whole)
        return (array if self.rows is None else array[self.rows]).astype(self.dtype)


@dataclass(frozen=True)
class StoredArray:
    """A tensor on disk, whole or in pieces.

    shape, dtype: of the tensor.
    pieces: (first row, mapped array) in order, without holes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, np.ndarray], ...]

    def read(self, index: tuple[slice, ...] | None = ()) -> np.ndarray:
        """A copy of a part.

        Args:
            index: a slice with step 1 for each leading dimension; none: all.
        """
        index = index or ()
        if len(self.pieces) == 1:
            return np.array(self.pieces[0][1][index])
        start, stop, _ = (index[0] if index else slice(None)).indices(self.shape[0])
        parts = [
            array[(slice(max(start - first, 0), max(stop - first, 0)), *index[1:])]
            for first, array in self.pieces
        ]
        return np.concatenate(parts)


def keep_all(name: str, array: Any) -> Mapping[str, Any]:
    """Weights as they are."""
    return {name: array}


def on_devices(target: Any, read: Callable[[Any], np.ndarray]) -> Any:
    """Reads a tensor onto devices, each device only its own part.

    Devices that hold the same part share one copy on the host.

    Args:
        target: anything with `shape` and `sharding`, such as a `jax.ShapeDtypeStruct`.
        read: from the index of a part, a slice with step 1 for each dimension, to its numbers;
            their dtype becomes the result's.

    Returns:
        The array, when all of it is there: the host's copies of the next one are made when these
        are gone.
    """
    import jax

    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = repr(index)
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    array = jax.make_array_from_callback(target.shape, target.sharding, part)
    return jax.block_until_ready(array)


def cut(name: str, shape: tuple[int, ...], dtype: np.dtype, limit: int) -> Iterator[Piece]:
    """The pieces of a tensor, each small enough for a file of its own.

    Args:
        name: of the tensor.
        shape: of the tensor.
        dtype: in which it is stored.
        limit: largest size of a file, in bytes.

    Raises:
        UserError: one row does not fit.
    """
    whole = Piece(name, None, tuple(shape), dtype)
    room = limit - _HEADER_ROOM
    if whole.num_bytes <= room:
        yield whole
        return
    row = whole.num_bytes // shape[0] if shape else whole.num_bytes
    if row > room or not shape:
        raise UserError(
            f"max_file_bytes={limit}: a row of {name} has {row} bytes, and the header needs "
            f"{_HEADER_ROOM}; allow larger files"
        )
    step = room // row
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield Piece(name, slice(start, stop), (stop - start, *shape[1:]), dtype)


def collect_pieces(source: str, tensors: Mapping[str, np.ndarray]) -> dict[str, StoredArray]:
    """Puts pieces together again.

    Args:
        source: where the tensors come from, for messages.
        tensors: mapped arrays by their names in the files.

    Raises:
        UserError: pieces of a tensor are missing, overlap or differ in shape or dtype.
    """
    found: dict[str, list[tuple[int, int | None, np.ndarray]]] = {}
    for key, array in tensors.items():
        match = _PIECE.fullmatch(key)
        name, start, stop = (match[1], int(match[2]), int(match[3])) if match else (key, 0, None)
        found.setdefault(name, []).append((start, stop, array))
    arrays, broken = {}, []
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece[0])
        if _tiles(pieces):
            first = pieces[0][2]
            whole = pieces[0][1] is None
            shape = first.shape if whole else (pieces[-1][1], *first.shape[1:])
            arrays[name] = StoredArray(shape, first.dtype, tuple((s, a) for s, _, a in pieces))
        else:
            broken.append(name)
    if broken:
        raise UserError(
            f"{source}: damaged: the pieces of {', '.join(sorted(broken))} do not fit together; "
            "restore the folder from a copy"
        )
    return arrays


def _tiles(pieces: list[tuple[int, int | None, np.ndarray]]) -> bool:
    if len(pieces) == 1 and pieces[0][1] is None:
        return True
    at, first = 0, pieces[0][2]
    for start, stop, array in pieces:
        if stop is None or start != at or array.ndim == 0 or len(array) != stop - start:
            return False
        if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
            return False
        at = stop
    return True
