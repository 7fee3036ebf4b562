"""Timing programs in rounds, and what the times say of each product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pallas_kernels.tuning.product import Cut, Product

__all__ = ["Cuts", "Finding", "Program", "Timer", "findings_of", "timed"]

WORTH = 0.98  # of the heuristic's time; what is above is not stored

Cuts = Mapping[Product, Cut]


@dataclass(frozen=True)
class Program:
    """A compiled operation; its products are cut as `cuts` says, others as the heuristic does."""

    cuts: Cuts
    call: Callable[..., Any]


@dataclass(frozen=True)
class Finding:
    """What came of a product.

    cut: the better one; None: none is worth an entry.
    ms, heuristic_ms: medians over the last rounds; equal where there is none.
    """

    cut: Cut | None
    ms: float
    heuristic_ms: float


Timer = Callable[[Program, tuple[Any, ...], Iterable[str]], dict[str, float]]
"""(program, inputs, kernels' names) -> ms of each kernel."""


def timed(
    programs: Sequence[Program],
    inputs: tuple[Any, ...],
    plain: Cuts,
    rounds: int,
    timer: Timer,
    say: Callable[[str], None],
) -> dict[Product, dict[Cut, list[float]]]:
    """Ms of every product's cuts, one value a round.

    Every round runs all programs, so that drift of the clocks hits all alike, and each begins with
    another one.
    """
    kernels = {product.kernel for product in plain}
    found: dict[Product, dict[Cut, list[float]]] = {p: defaultdict(list) for p in plain}
    for start in range(rounds):
        times: dict[tuple[Product, Cut], list[float]] = defaultdict(list)
        first = start % len(programs)
        for program in [*programs[first:], *programs[:first]]:
            ms = timer(program, inputs, kernels)
            for product, heuristic in plain.items():
                if product.kernel not in ms:
                    raise RuntimeError(f"no launch of {product.kernel!r} was seen")
                times[product, program.cuts.get(product, heuristic)].append(ms[product.kernel])
        for (product, cut), values in times.items():
            found[product][cut].append(median(values))
        say(f"  round {start + 1}/{rounds}")
    return found


def _better(times: Mapping[Cut, list[float]], heuristic: Cut) -> Cut | None:
    """The best cut by the median of its rounds' ratios, where it is worth an entry."""
    ratios = {
        cut: median(ms / other for ms, other in zip(values, times[heuristic], strict=True))
        for cut, values in times.items()
    }
    best = min(ratios, key=lambda cut: (ratios[cut], cut))
    return best if ratios[best] < WORTH else None


def findings_of(
    times: Mapping[Product, Mapping[Cut, list[float]]], plain: Cuts
) -> dict[Product, Finding]:
    """What came of each product; `plain` has the heuristic's cuts."""
    found = {}
    for product, heuristic in plain.items():
        cut, ms = _better(times[product], heuristic), times[product]
        heuristic_ms = median(ms[heuristic])
        found[product] = Finding(cut, median(ms[cut]) if cut else heuristic_ms, heuristic_ms)
    return found
