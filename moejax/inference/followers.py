"""An engine over several processes: process 0 decides, the others do the same steps.

Requests come to process 0 alone. Before each of its steps it tells the others what has come since
the last one; the rest of a step follows from that, since the scheduler knows neither clock nor
chance. So all start the same programs in the same order, as JAX asks of them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.inference.params import SamplingParams
from sharding.distributed import from_first, is_first, several

__all__ = ["Notes", "Sharing"]

_NAME = "engine's step"


@dataclasses.dataclass
class Notes:
    """What has come since the last step.

    added: of each request its id, prompt ids, sampling and stream, see `Engine.add`.
    cancelled: ids, and which of their texts; None: all.
    expected: see `Engine.expect`.
    """

    added: list[tuple[int, list[int], dict[str, Any], int]] = dataclasses.field(
        default_factory=list
    )
    cancelled: list[tuple[int, int | None]] = dataclasses.field(default_factory=list)
    expected: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class Sharing:
    """What an engine of several processes tells or is told before each step."""

    def __init__(self) -> None:
        self.leads = is_first()
        self._lock = threading.Lock()
        self._raw: dict[int, tuple[int, list[int], dict[str, Any], int]] = {}
        self._expected: list[tuple[int, int]] = []

    @staticmethod
    def of_processes() -> Sharing | None:
        """None where there is one process."""
        return Sharing() if several() else None

    def remember(self, id: int, tokens: np.ndarray, params: SamplingParams, stream: int) -> None:
        """Keeps a request that a later step takes up; its seed is given."""
        with self._lock:
            self._raw[id] = (id, tokens.tolist(), dataclasses.asdict(params), stream)

    def expect(self, texts: int, tokens: int) -> None:
        """Keeps what is expected."""
        with self._lock:
            self._expected.append((texts, tokens))

    def tell(self, ids: Sequence[int], cancelled: Sequence[tuple[int, int | None]]) -> None:
        """Process 0 tells what its next step takes up."""
        with self._lock:
            added = [self._raw.pop(id) for id in ids]
            expected, self._expected = self._expected, []
        from_first(_NAME, dataclasses.asdict(Notes(added, list(cancelled), expected)))

    def end(self) -> None:
        """Process 0 tells that there are no more steps."""
        from_first(_NAME, None)

    def next(self) -> Notes | None:
        """What another process does next; None: nothing more."""
        told = from_first(_NAME, None)
        return None if told is None else Notes(**told)
