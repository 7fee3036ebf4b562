"""Which settings are worth having: least traffic for a loss, and least loss for some traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moejax.errors import UserError

__all__ = ["frontier", "parse_budget", "recommend"]

Point = tuple[float, float]
"""Remote sends of a token, and the relative increase of the loss."""


def frontier(points: Sequence[Point]) -> list[int]:
    """The points that no other one beats, by falling traffic and therefore rising loss.

    A point is beaten by one that is no worse in both and better in one; of equal points the first
    stays.

    Args:
        points: traffic and loss of each setting; finite.

    Returns:
        Their indices.
    """
    order = sorted(range(len(points)), key=lambda i: (*points[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept[::-1]


def recommend(points: Sequence[Point], budget: float) -> int | None:
    """The point with least traffic whose loss rises by at most a budget; None if all rise more.

    Among equal traffic the one with less loss, then the first.

    Args:
        points: traffic and relative loss increase of each setting.
        budget: 0.02 allows 2 %.
    """
    allowed = [i for i, (_, loss) in enumerate(points) if loss <= budget]
    return min(allowed, key=lambda i: (*points[i], i), default=None)


def parse_budget(text: str) -> float:
    """A share as a person writes it: `2%` or `0.02`.

    Raises:
        UserError: it is no number, or negative.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(
            f"--loss-budget {text}: must be a share such as 2% or 0.02, and not negative"
        )
    return value
