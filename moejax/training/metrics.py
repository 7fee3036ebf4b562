"""`metrics.jsonl`: one JSON object a line, one line a step, whatever happens in between."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.training.files import disk_errors, write_atomically

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends rows to a metrics file; each is on disk (in the page cache) when `append` returns.

    A half-written last line, left by a process that was killed, is removed on opening.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the file, or makes it.

        Args:
            path: `metrics.jsonl` of a run directory.

        Raises:
            UserError: the file cannot be opened for writing.
        """
        self._path = Path(path)
        self._fd = -1
        with disk_errors(self._path):
            _drop_half_line(self._path)
            self._open()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one line.

        Args:
            row: has an int `step`; other values are numbers, text, None, NumPy or JAX scalars or
                arrays, or lists, tuples and dictionaries of these. Infinities and NaN become null.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        plain = _plain(row)
        if type(plain.get("step")) is not int:
            raise ValueError(f"a metrics row needs an int 'step', got {plain.get('step')!r}")
        line = json.dumps(plain, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with disk_errors(self._path):
            while line:
                line = line[os.write(self._fd, line) :]

    def cut(self, step: int) -> int:
        """Removes the lines of `step` and later, which a resumed run writes again.

        The file is replaced in one piece. Lines that cannot be read go too.

        Returns:
            The number of lines removed.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        with disk_errors(self._path):
            lines = self._path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) < step]
            if len(kept) < len(lines):
                os.close(self._fd)
                try:
                    write_atomically(self._path, b"".join(kept))
                finally:
                    self._open()
        return len(lines) - len(kept)

    def close(self) -> None:
        """Closes the file; further rows are refused."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file in order; [] without a file.

    Lines that are not complete JSON objects with a `step` are left out: a run may be writing.

    Raises:
        UserError: the file is there and cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return []
    with disk_errors(path):
        rows = map(_parse, path.read_bytes().splitlines(keepends=True))
        return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _step_of(line: bytes) -> float:
    row = _parse(line)
    return math.inf if row is None else row["step"]


def _drop_half_line(path: Path) -> None:
    """Cuts the file after its last newline."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX scalars and arrays, without importing either
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
