"""Times of kernels by name, by CUPTI, on a GPU that is kept busy."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import jax

__all__ = ["by_name", "measure_kernels"]

BUSY_SECONDS = 0.04  # of calls before those that are timed, and again of those
MOST_CALLS = 20

Launch = tuple[str, float]
"""Name of a kernel, ms."""


def by_name(launches: Iterable[Launch], kernels: Iterable[str]) -> dict[str, float]:
    """Ms of each kernel, summed over its launches; a launch's name contains the kernel's."""
    longest_first = sorted(kernels, key=len, reverse=True)  # one name may contain another
    found: dict[str, float] = defaultdict(float)
    for name, ms in launches:
        kernel = next((kernel for kernel in longest_first if kernel in name), None)
        if kernel is not None:
            found[kernel] += ms
    return dict(found)


def measure_kernels(
    call: Callable[..., Any], inputs: tuple[Any, ...], kernels: Iterable[str]
) -> dict[str, float]:
    """Ms of each kernel in a call, the median of some calls back to back.

    Raises:
        RuntimeError: CUPTI saw no kernels, as when another profiler holds it.
    """
    from jax.experimental.mosaic.gpu import profiler

    start = time.perf_counter()
    jax.block_until_ready(call(*inputs))
    calls = math.ceil(BUSY_SECONDS / (time.perf_counter() - start))
    calls = max(1, min(MOST_CALLS, calls))
    last = None
    for _ in range(calls - 1):  # the profiler makes one more before it measures
        last = call(*inputs)
    jax.block_until_ready(last)
    del last
    runs: Any
    try:
        runs = profiler.measure(call, aggregate=False, iterations=calls)(*inputs)[1]
        runs = [runs] if calls == 1 else runs
    except RuntimeError:  # kernels that overlap may change their order from call to call
        runs = [profiler.measure(call, aggregate=False)(*inputs)[1]]
    if not runs or not all(runs):
        raise RuntimeError("CUPTI saw no kernels: another profiler may hold it")
    tables = [by_name(launches, kernels) for launches in runs]
    return {kernel: median(t[kernel] for t in tables) for kernel in tables[0]}
