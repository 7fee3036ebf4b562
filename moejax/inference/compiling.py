"""Several programs are compiled at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

import jax

__all__ = ["compile_together"]

_MOST = 8  # at once

Key = TypeVar("Key")


def compile_together(
    lowered: Iterable[tuple[Key, jax.stages.Lowered]],
) -> Iterator[tuple[Key, Future[jax.stages.Compiled]]]:
    """Compiles programs in threads; each is yielded with its key when it is done.

    Tracing keeps to this thread, where `lowered` is drawn from: one at a time is all that Python
    can. If the caller leaves off, those that have not begun are not compiled.
    """
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST))
    try:
        futures = {pool.submit(program.compile): key for key, program in lowered}
        for future in as_completed(futures):
            yield futures[future], future
    finally:
        pool.shutdown(cancel_futures=True)
