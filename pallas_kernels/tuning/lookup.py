"""Which cut a trace gets: that of the table in use, or the heuristic's."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path

from pallas_kernels.interpreting import is_interpreted
from pallas_kernels.tuning.product import Cut, Product
from pallas_kernels.tuning.table import Table, device_slug, read_table

__all__ = [
    "cut_for",
    "device_kind",
    "package_table",
    "recorded",
    "trace_context",
    "use_table",
]

TABLES = Path(__file__).parent / "tables"
NONE = Table("", {})

_used: ContextVar[Table | None] = ContextVar("used_table", default=None)
_asked: ContextVar[dict[Product, Cut] | None] = ContextVar("asked_products", default=None)


def device_kind() -> str:
    """The name of the first device of the default platform."""
    import jax

    return jax.devices()[0].device_kind


def package_table(device: str) -> Path:
    """Where the library's own table for a device lies, or would lie."""
    return TABLES / f"{device_slug(device)}.json"


@lru_cache
def _own(device: str) -> Table:
    path = package_table(device)
    return read_table(path, device) if path.is_file() else NONE


@contextmanager
def use_table(table: str | os.PathLike[str] | Table | None) -> Iterator[None]:
    """What is traced inside asks this table in the place of the library's own.

    Sizes belong to traces. What was traced or compiled before keeps its sizes inside; and a jitted
    function that is first traced inside keeps this table's sizes afterwards, as JAX finds that
    trace again. So trace a fresh function inside, with nothing jitted in it:
    `jax.jit(lambda *a: f(*a)).lower(*arguments).compile()`.

    Args:
        table: a file, read and checked at once, or a table; None: no table, so that the heuristic
            alone decides.

    Raises:
        TableError: the file is no valid table, or is one for another device.
    """
    if table is None:
        table = NONE
    elif not isinstance(table, Table):
        table = read_table(table, device_kind())
    token = _used.set(table)
    try:
        yield
    finally:
        _used.reset(token)


@contextmanager
def recorded() -> Iterator[dict[Product, Cut]]:
    """Gathers the products that are asked for while tracing inside, with the heuristic's cuts."""
    asked: dict[Product, Cut] = {}
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


class _Itself:
    """An object as a key that is equal to no other object."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def trace_context() -> Hashable:
    """What a trace of kernels depends on beside its arguments, for functions that keep traces.

    The table in use, what records, and whether kernels are interpreted.
    """
    return _Itself(_used.get()), _Itself(_asked.get()), is_interpreted()


def cut_for(product: Product, heuristic: Cut) -> Cut:
    """The cut of the table in use; the heuristic's where that has no entry.

    Raises:
        TableError: the library's table for this device is not valid.
    """
    asked = _asked.get()
    if asked is not None:
        asked[product] = heuristic
    table = _used.get()
    if table is None:
        table = _own(device_kind())
    entry = table.entries.get(product)
    return heuristic if entry is None else entry.cut
