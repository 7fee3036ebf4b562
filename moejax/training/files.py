"""Writing files so that a crash or a full disk loses nothing and is told in one line."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from moejax.errors import UserError

__all__ = ["disk_errors", "is_disk_full", "write_atomically"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
# Storage libraries raise their own exceptions and keep the operating system's words.
_FULL_WORDS = ("ENOSPC", "EDQUOT", os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, or one that led to it, says that there is no space left."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, OSError) and link.errno in _FULL:
            return True
        if not isinstance(link, OSError) and any(word in str(link) for word in _FULL_WORDS):
            return True
        link = link.__cause__ or link.__context__
    return False


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an `OSError` of the block into one line about `path`.

    Raises:
        UserError: the disk is full, the place cannot be written, or the path is of another kind.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if is_disk_full(error):
            rule = f"the disk is full ({reason}): free some space and start again"
        elif error.errno in _FORBIDDEN:
            rule = f"permission is lacking ({reason}): choose another place or change its rights"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            rule = f"a directory is needed and a file is there ({reason}): choose another path"
        else:
            rule = f"{reason}: choose another path"
        raise UserError(f"{os.fspath(path)}: {rule}") from error


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replaces a file in one piece: readers and crashes see the old content or the new.

    Args:
        path: the file; its directory exists.
        data: the whole content; text is written as UTF-8.

    Raises:
        OSError: the disk is full or the place cannot be written; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = data.encode() if isinstance(data, str) else data
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    # The rename itself reaches the disk with the directory.
    with contextlib.suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
