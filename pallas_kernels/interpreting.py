"""Whether kernels are interpreted, for GPUs and TPUs alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["interpreted", "is_interpreted"]

_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run in Pallas's interpreters, on a CPU."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether this is inside of `interpreted`."""
    return _interpreted.get()
