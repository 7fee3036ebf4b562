"""Rounds of timed programs: each round has a group of calls of every program, one after another,
so that what drifts (clocks, temperature) drifts for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax

GROUP_SECONDS = 0.03
LEAST_CALLS = 3


class Rounds:
    """Times programs; one that fails is left out from then on.

    Attributes:
        times: ms a call of each group so far.
        errors: one line for each program that failed.
    """

    def __init__(self, calls: dict[Any, Callable[[], Any]]) -> None:
        self.calls = dict(calls)
        self.times: dict[Any, list[float]] = {key: [] for key in calls}
        self.errors: dict[Any, str] = {}
        self.sizes: dict[Any, int] = {}
        # Devices that share the cores of one processor may wait for each other for ever.
        self.one_by_one = jax.default_backend() == "cpu"

    def warm_up(self) -> None:
        """First calls, and how many calls fill a group."""
        for key in list(self.calls):
            self._guarded(key, self._size)

    def run(self) -> None:
        """One round."""
        for key in list(self.calls):
            self._guarded(key, self._group)

    def ms(self, key: Any) -> float | None:
        """Median."""
        return median(self.times[key]) if self.times.get(key) else None

    def spread(self, key: Any) -> float:
        """(largest − smallest) / median."""
        times = self.times[key]
        return (max(times) - min(times)) / median(times)

    def _guarded(self, key: Any, do: Callable[[Any], None]) -> None:
        try:
            do(key)
        except Exception as why:  # a result as well
            self.errors[key] = one_line(why)
            del self.calls[key]

    def _seconds(self, key: Any, calls: int) -> float:
        call = self.calls[key]
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
            if self.one_by_one:
                jax.block_until_ready(last)
        jax.block_until_ready(last)
        return time.perf_counter() - start

    def _size(self, key: Any) -> None:
        self._seconds(key, 1)
        estimate = self._seconds(key, 2) / 2
        self.sizes[key] = max(LEAST_CALLS, round(GROUP_SECONDS / max(estimate, 1e-6)))

    def _group(self, key: Any) -> None:
        self._seconds(key, 1)  # another program ran before
        calls = self.sizes[key]
        self.times[key].append(self._seconds(key, calls) / calls * 1e3)


def one_line(why: BaseException) -> str:
    """An error for a row."""
    return f"{type(why).__name__}: {' '.join(str(why).split()) or 'no message'}"[:300]
