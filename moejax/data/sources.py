"""Where text comes from: the standard library's own source, files, folders, globs, JSONL."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moejax.data.corpus import Document
from moejax.errors import UserError

__all__ = ["Corpus", "load_corpus", "load_standard_library", "read_text"]

# Tests are a third of the source and much of them is data.
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Documents as loaded, sorted by path, none of them empty.

    documents: the texts.
    skipped: files met under a folder or by a glob that are not UTF-8 text, such as images; files
        named one by one are never skipped.
    """

    documents: tuple[Document, ...]
    skipped: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Length of all texts in UTF-8 bytes."""
        return sum(document.num_bytes for document in self.documents)


def load_standard_library(folder: str | None = None) -> Corpus:
    """Loads the source of the running interpreter's standard library.

    Left out: tests, installed packages, and the files that describe how this interpreter was
    built (`_sysconfigdata*`, `config-*`), so that the same Python version gives the same corpus on
    every machine. About 11 MB on Python 3.11.

    Args:
        folder: the library's folder; None asks the interpreter.

    Raises:
        UserError: the interpreter has no library source on disk.
    """
    root = folder or sysconfig.get_path("stdlib")
    documents = []
    skipped = []
    for path, name in _walk(root, _TEST_FOLDERS | _NOT_LIBRARY):
        if not name.endswith(".py") or "_sysconfigdata" in name or name.startswith("config-"):
            continue
        text = _decode(_read(path))
        if isinstance(text, int):
            skipped.append(name)
        elif text:
            documents.append(Document(name, text))
    if not documents:
        raise UserError(
            f"{root}: holds no Python source of the standard library; name your own text with "
            "--data"
        )
    return Corpus(_sorted(documents), tuple(skipped))


def load_corpus(sources: Sequence[str]) -> Corpus:
    """Loads text from files, folders, globs and JSONL files.

    A folder is read recursively, without hidden files and `__pycache__`, and gives every file that
    is UTF-8 text; a `.jsonl` file, wherever it is met, gives one document for each line, the value
    of the field "text". Documents are named by their path under the folder or under the fixed
    part of the glob, single files by their name, so the split into training and held-out text does
    not change when the data moves. A file reached twice is taken once.

    Args:
        sources: paths and globs (`**` matches any depth).

    Raises:
        UserError: a path that does not exist or cannot be read, a glob that matches nothing, a
            file named by itself that is not UTF-8, a bad line of JSONL, or no text at all.
    """
    documents: list[Document] = []
    skipped: list[str] = []
    seen: set[str] = set()
    for source in sources:
        for path, name, named in _expand(source):
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            data = _read(path)
            text = _decode(data, binary=not named)
            if not isinstance(text, int):
                documents.extend(_documents(path, name, text))
            elif named:
                raise _not_utf8(path, text)
            else:
                skipped.append(path)
    if not documents:
        found = f"; {len(skipped)} file(s) are not UTF-8 text" if skipped else ""
        raise UserError(
            f"--data {' '.join(sources)}: holds no text{found}; name files, folders or globs of "
            "UTF-8 text or JSONL"
        )
    return Corpus(_sorted(documents), tuple(skipped))


def read_text(path: str) -> str:
    """Reads one UTF-8 file, without translating its line ends.

    Raises:
        UserError: the file does not exist, cannot be read, or is not UTF-8.
    """
    if not os.path.exists(path):
        raise _missing(path)
    text = _decode(_read(path))
    if isinstance(text, int):
        raise _not_utf8(path, text)
    return text


def _expand(source: str) -> Iterator[tuple[str, str, bool]]:
    """Yields `(path, name, named)`; named: the user wrote this very path."""
    if os.path.isdir(source):
        for path, name in _walk(source, frozenset({"__pycache__"}), hidden=False):
            yield path, name, False
    elif os.path.lexists(source):
        yield source, os.path.basename(source), True
    elif glob.has_magic(source):
        matches = sorted(glob.glob(source, recursive=True))
        if not matches:
            raise UserError(f"--data {source}: the glob matches nothing; check it, and quote it")
        root = _fixed_part(source)
        for match in matches:
            inner = _walk(match, frozenset({"__pycache__"}), hidden=False)
            for path in [p for p, _ in inner] if os.path.isdir(match) else [match]:
                yield path, os.path.relpath(path, root).replace(os.sep, "/"), False
    else:
        raise _missing(source)


def _fixed_part(pattern: str) -> str:
    """The folder of a glob above its first wildcard."""
    root = os.path.dirname(pattern)
    while glob.has_magic(root):
        root = os.path.dirname(root)
    return root or "."


def _walk(root: str, without: frozenset[str], hidden: bool = True) -> Iterator[tuple[str, str]]:
    """Yields `(path, name under root)` of the regular files below a folder, in sorted order."""

    def fail(error: OSError) -> None:
        raise _unreadable(error.filename or root, error)

    for folder, subfolders, files in os.walk(root, onerror=fail):
        subfolders[:] = sorted(
            f for f in subfolders if f not in without and (hidden or not f.startswith("."))
        )
        for file in sorted(files):
            path = os.path.join(folder, file)
            # Sockets, pipes and broken links hold no text, and reading a pipe would wait forever.
            if os.path.isfile(path) and (hidden or not file.startswith(".")):
                yield path, os.path.relpath(path, root).replace(os.sep, "/")


def _read(path: str) -> bytes:
    try:
        if not os.path.isfile(path):
            raise OSError("not a regular file")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from None


def _decode(data: bytes, binary: bool = False) -> str | int:
    """The text, or the byte offset at which it stops being UTF-8.

    binary: a NUL byte, which is legal UTF-8, also counts as not text.
    """
    if binary and (offset := data.find(b"\0")) >= 0:
        return offset
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return error.start


def _documents(path: str, name: str, text: str) -> Iterator[Document]:
    if not name.endswith(".jsonl"):
        if text:
            yield Document(name, text)
        return
    # Only "\n" ends a line of JSONL; splitlines() would also split inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and (value := _text_field(path, number, line)):
            yield Document(f"{name}:{number}", value)


def _text_field(path: str, number: int, line: str) -> str:
    rule = 'each line must be a JSON object with a string in the field "text"; correct the line'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise UserError(f"{path}, line {number}: not JSON ({problem}); {rule}") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        got = f"fields {sorted(value)[:5]}" if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{path}, line {number}: got {got}; {rule}")
    try:
        value["text"].encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path}, line {number}: character {error.start} of the text is half a surrogate "
            "pair, which UTF-8 cannot hold; correct the line"
        ) from None
    return value["text"]


def _sorted(documents: list[Document]) -> tuple[Document, ...]:
    # The text breaks ties, so the order of the sources never matters.
    return tuple(sorted(documents, key=lambda document: (document.path, document.text)))


def _missing(path: str) -> UserError:
    return UserError(f"{path}: no such file or folder; check the path")


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read ({error.strerror or error}); make it a readable file or leave it "
        "out"
    )


def _not_utf8(path: str, offset: int) -> UserError:
    return UserError(
        f"{path}: not UTF-8 at byte {offset}; convert the file (for example with iconv -t UTF-8) "
        "or leave it out"
    )
