"""Progress of what takes long, told now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["NowAndThen"]

SECONDS = 5.0
"""Between two lines, and before the first."""


class NowAndThen:
    """Takes a line whenever there is news, and passes one on every few seconds.

    Args:
        tell: gets the lines.
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._told = time.monotonic()

    def __call__(self, line: str) -> None:
        """Passes a line on, unless the last one, or the beginning, was a moment ago."""
        if time.monotonic() - self._told > SECONDS:
            self._told = time.monotonic()
            self._tell(line)
