"""The files of a batch: lines of requests and of answers, and which have been answered."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import IO, Any

from moejax.errors import UserError
from moejax.serving.errors import ApiError
from moejax.serving.json_text import parse_json
from moejax.serving.protocol import ENDPOINTS

__all__ = ["line_id", "lines", "name_of", "open_input", "open_output", "read_line", "write_all"]

_MAX_LINE = 8 << 20


def read_line(data: bytes) -> dict[str, Any]:
    """A request of a batch.

    Raises:
        ApiError: it is none; what can be said without the model.
    """
    if len(data) > _MAX_LINE:
        raise ApiError(400, f"the line is longer than {_MAX_LINE} bytes")
    request = parse_json(data)
    if not isinstance(request, dict):
        raise ApiError(400, "the line must be a JSON object")
    name = request.get("custom_id")
    if not isinstance(name, str) or not name or len(name) > 512:
        raise ApiError(400, f"custom_id={name!r:.80}: must be a string of 1 to 512 characters")
    if request.get("method", "POST") != "POST":
        raise ApiError(400, f"method={request['method']!r:.80}: must be POST")
    url = request.get("url")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise ApiError(400, f"url={url!r:.80}: must be one of {', '.join(ENDPOINTS)}")
    if not isinstance(request.get("body"), dict):
        raise ApiError(400, "body: must be an object")
    return request


def line_id(number: int) -> str:
    """The `id` of a line of the output."""
    return f"batch_req_{number}"


def name_of(number: int, custom_id: str | None) -> str:
    """What tells an answered line from others; a nameless one is known by its place."""
    return _name_of(line_id(number), custom_id)


def _name_of(line: str, custom_id: str | None) -> str:
    return f"line {line}" if custom_id is None else f"id {custom_id}"


def lines(source: IO[bytes]) -> Iterator[bytes]:
    """Lines, of one that is too long only the beginning."""
    while data := source.readline(_MAX_LINE + 1):
        rest = data
        while len(rest) > _MAX_LINE and not rest.endswith(b"\n"):
            rest = source.readline(_MAX_LINE + 1)
        yield data


def open_input(path: str) -> IO[bytes]:
    """The file of requests.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"--input {path}: {error.strerror or error}; check the path") from None


@contextlib.contextmanager
def open_output(path: str) -> Iterator[tuple[IO[bytes], dict[str, bool]]]:
    """The file to append to, and the names of lines that it answers, with whether they failed.

    Raises:
        UserError: it cannot be written, another program writes it, or it is no such file.
    """
    try:
        # Unbuffered, and not emptied.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or error}; check the path") from None
    with open(descriptor, "r+b", buffering=0) as out:
        _lock(out, path)
        yield out, _answered(out, path)


def _lock(out: IO[bytes], path: str) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"--output {path}: another program is writing it; wait for its end or name another file"
        ) from None


def _answered(out: IO[bytes], path: str) -> dict[str, bool]:
    """Whether each line in the file failed; the file then ends behind its last whole line."""
    done: dict[str, bool] = {}
    end = 0
    with open(os.dup(out.fileno()), "rb") as reader:
        for number, data in enumerate(reader, 1):
            if not data.endswith(b"\n"):
                break
            end += len(data)
            try:
                line = json.loads(data)
                name = _name_of(line["id"], line["custom_id"])
                failed = (line.get("response") or {}).get("status_code") != 200
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(
                    f"--output {path}: line {number} is no answer of a batch; name another file"
                ) from None
            done[name] = failed
    out.truncate(end)
    out.seek(end)
    return done


def write_all(out: IO[bytes], data: bytes) -> None:
    """Writes to an unbuffered file, which may take less than all at once."""
    left = memoryview(data)
    while left:
        left = left[out.write(left) :]
