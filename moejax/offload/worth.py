"""Whether a guess is worth its transfer, by what was measured of guesses, transfers and layers.

A device's copies from the host come one after the other, and one that has begun goes on to its end.
So a guess that is right saves as much of its transfer as fits the time in which the link would have
been idle, and a wrong one delays what the next layer lacks by the rest. Where experts are small all
of a guess fits that time and it costs nothing; where one travels for as long as several layers
compute, only guesses pay that are nearly always right.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["Worth"]

_TIME = 1 / 4  # weight of a time among those before it
_RIGHT = 1 / 16  # of a guess


class Worth:
    """What is known of guesses; the first of a layer's are apart from the second, and so on.

    Guesses are counted whether they are sent or not, and those of steps that decode apart from
    those of prompts, which need nearly everything.

    Args:
        most: guesses for a layer, at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._right: dict[bool, list[float]] = {}
        self._each: float | None = None
        self._idle: dict[bool, float] = {}
        self._expected: dict[int, list[int]] = {}

    def sent(self, seconds: float) -> None:
        """An expert took so long to come while nothing else travelled."""
        self._each = _mean(self._each, seconds)

    def idle(self, decodes: bool, seconds: float) -> None:
        """From the last weights of a layer to the choice of the next one it took so long.

        Args:
            decodes: in a step that decodes; others are kept apart.
            seconds: the time.
        """
        self._idle[decodes] = _mean(self._idle.get(decodes), seconds)

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """These are absent and likely to be needed by a layer, the likeliest first."""
        self._expected[layer] = [*experts][: self._most]

    def chosen(self, decodes: bool, layer: int, experts: Collection[int]) -> None:
        """A layer needs these."""
        right_R = self.right(decodes)
        for rank, expert in enumerate(self._expected.pop(layer, ())):
            right_R[rank] += _RIGHT * ((expert in experts) - right_R[rank])

    def right(self, decodes: bool) -> list[float]:
        """Which share of guesses was right lately, by rank."""
        return self._right.setdefault(decodes, [0.5] * self._most)

    def forget(self) -> None:
        """Forgets what was expected, of a step that has failed."""
        self._expected.clear()

    def count(self, decodes: bool, most: int) -> int:
        """How many guesses for the next layer pay: of some, the first ones.

        Args:
            decodes: in a step that decodes.
            most: how many there are.
        """
        most = min(most, self._most)
        idle = self._idle.get(decodes)
        if self._each is None or idle is None:
            return most
        for rank, right in enumerate(self.right(decodes)[:most]):
            hidden = min(max(idle - rank * self._each, 0.0), self._each)
            if right * hidden <= (1 - right) * (self._each - hidden):
                return rank
        return most


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _TIME * (value - before)
