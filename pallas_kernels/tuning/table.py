"""Tables of cuts: reading, checking, storing.

A table is a JSON file for one kind of device:

    {"format": 1, "device": "NVIDIA H100 80GB HBM3", "entries": [
        {"product": {…the fields of Product…}, "cut": {…those of Cut…},
         "measured": {"ms": …, "heuristic_ms": …, "jax": …, "jaxlib": …, "commit": …}}, …]}
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any

from pallas_kernels.tuning.product import (
    DTYPES,
    FLAGS,
    KERNELS,
    Cut,
    Product,
    bucket,
    refusal,
)

__all__ = ["Entry", "Measured", "Table", "TableError", "device_slug", "read_table", "store_table"]

FORMAT = 1


class TableError(ValueError):
    """A table that cannot be used, told in one line that names the file and the entry."""


@dataclass(frozen=True)
class Measured:
    """How an entry was found.

    ms, heuristic_ms: of the kernel, with the entry's cut and with the heuristic's, medians.
    jax, jaxlib, commit: what was measured.
    """

    ms: float
    heuristic_ms: float
    jax: str
    jaxlib: str
    commit: str


@dataclass(frozen=True)
class Entry:
    """A cut that is better than the heuristic's."""

    cut: Cut
    measured: Measured


@dataclass(frozen=True)
class Table:
    """The entries for one kind of device."""

    device: str
    entries: Mapping[Product, Entry]


def device_slug(device: str) -> str:
    """A device's name as tables are named: lower case, what is no letter or digit as one _."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def _refuse(reason: str) -> None:
    raise ValueError(reason)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a field twice in {short(found)}")
    return found


def _object(value: Any, names: list[str], what: str) -> dict[str, Any]:
    """A JSON object with exactly these names."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {short(value)}, not an object")
    for name in value:
        if name not in names:
            raise ValueError(f"{what} has an unknown field {short(name)}")
    for name in names:
        if name not in value:
            raise ValueError(f"{what} has no field {name!r}")
    return value


def _typed(found: dict[str, Any], cls: type, what: str) -> dict[str, Any]:
    """The fields of a flat dataclass: positive integers, finite positive numbers, names."""
    values = _object(found, [f.name for f in fields(cls)], what)
    for field in fields(cls):
        value, kind = values[field.name], str(field.type)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if kind == "int" and not (whole and 0 < value < 2**31):
            _refuse(f"{field.name} is {short(value)}, not a positive integer")
        number = whole or isinstance(value, float)
        if kind == "float" and not (number and 0 < value < math.inf):
            _refuse(f"{field.name} is {short(value)}, not a positive number")
        if kind == "str" and not (isinstance(value, str) and 0 < len(value) <= 100):
            _refuse(f"{field.name} is {short(value)}, not a name")
    return values


def _product(value: Any) -> Product:
    values = _typed(value, Product, "product")
    flags = values["flags"]
    if not isinstance(flags, list) or not all(isinstance(f, str) for f in flags):
        _refuse(f"flags are {short(flags)}, not a list of names")
    if flags != sorted(set(flags)):
        _refuse(f"flags are {short(flags)}, not sorted or not distinct")
    # A misspelt name would never be found, silently.
    for what, names, known in (
        ("kernel", [values["kernel"]], KERNELS),
        ("flag", flags, FLAGS),
        ("dtype", [values["dtype"]], DTYPES),
    ):
        for name in names:
            if name not in known:
                _refuse(f"{what} {short(name)} is none of {', '.join(known)}")
    if values["assignments"] != bucket(values["assignments"]):
        _refuse(f"assignments are {values['assignments']}, no power of two")
    return Product(**{**values, "flags": tuple(flags)})


def _entry(value: Any) -> tuple[Product, Entry]:
    found = _object(value, ["product", "cut", "measured"], "it")
    product = _product(found["product"])
    cut = Cut(**_typed(found["cut"], Cut, "cut"))
    reason = refusal(product, cut)
    if reason is not None:
        raise ValueError(reason)
    return product, Entry(cut, Measured(**_typed(found["measured"], Measured, "measured")))


def _parse(text: str, device: str | None) -> Table:
    content = json.loads(text, object_pairs_hook=_distinct)
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("no table: a JSON object with 'format' is expected")
    version = content["format"]
    if type(version) is not int or version < 1:
        raise ValueError(f"format is {short(version)}, not a positive integer")
    if version > FORMAT:
        raise ValueError(
            f"format {short(version)} is newer than {FORMAT}, the newest that this version reads; "
            "update the library, or tune again"
        )
    content = _object(content, ["format", "device", "entries"], "the table")
    kind, rows = content["device"], content["entries"]
    if not isinstance(kind, str) or not isinstance(rows, list):
        raise ValueError("'device' must be a name and 'entries' a list")
    if device is not None and device_slug(kind) != device_slug(device):
        raise ValueError(f"a table for {short(kind)}, and the device here is {device!r}")
    entries: dict[Product, Entry] = {}
    for number, row in enumerate(rows):
        try:
            product, entry = _entry(row)
            if product in entries:
                raise ValueError("its product has an entry already")
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from None
        entries[product] = entry
    return Table(kind, entries)


def read_table(path: str | os.PathLike[str], device: str | None = None) -> Table:
    """Reads a table and checks all of it.

    Args:
        path: of the file.
        device: that it must be for; None: any.

    Raises:
        TableError: in one line, the file, the entry's number from 0, and the rule it breaks.
    """
    try:
        return _parse(Path(path).read_text(encoding="utf-8"), device)
    except OSError as error:
        raise TableError(f"{os.fspath(path)}: {error.strerror or error}") from None
    except RecursionError:
        raise TableError(f"{os.fspath(path)}: too deeply nested for a table") from None
    except ValueError as error:
        raise TableError(f"{os.fspath(path)}: {error}") from None


def store_table(table: Table, path: str | os.PathLike[str]) -> None:
    """Writes a table, sorted, in one step: a reader sees the old file or the new one.

    A file that is there keeps its permissions, and a link its place.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    items = sorted(table.entries.items(), key=lambda item: item[0])
    rows = [{"product": asdict(product), **asdict(entry)} for product, entry in items]
    content = {"format": FORMAT, "device": table.device, "entries": rows}
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    _parse(text, table.device)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has.
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        if target.exists():
            os.chmod(draft, stat.S_IMODE(target.stat().st_mode))
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
