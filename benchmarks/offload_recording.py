"""What offloaded layers chose, and the best that any cache could have done with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from moejax.offload.belady import fewest_misses
from moejax.offload.experts import OffloadedExperts


class Recording:
    """What single tokens chose, text by text, and what slots held when each text's began.

    Args:
        experts: whose choices are noted from now on.
    """

    def __init__(self, experts: OffloadedExperts) -> None:
        layers = len(experts.layers)
        self._texts: list[list[tuple[list[int], list[np.ndarray]]]] = [[] for _ in range(layers)]
        self._numbers, self._new = experts.experts_L, [True] * layers
        arrive = experts.arrive

        def noted(at: int, experts_TK: np.ndarray, probe_E: np.ndarray | None) -> Any:
            if not experts._decodes:  # a piece of a prompt
                self._new[at] = True
                return arrive(at, experts_TK, probe_E)
            if self._new[at]:
                held = np.flatnonzero(experts.slots_of(at) >= 0).tolist()
                self._texts[at].append((held, []))
                self._new[at] = False
            self._texts[at][-1][1].append(experts_TK[0].copy())
            return arrive(at, experts_TK, probe_E)

        experts.arrive = noted  # type: ignore[method-assign]

    def belady(self, slots: int) -> float | None:
        """The best hit rate without guesses; None where a token needs more than there are."""
        missed = uses = 0
        for texts, experts in zip(self._texts, self._numbers, strict=True):
            for held, chosen in texts:
                trace = np.stack(chosen)
                if trace.shape[1] > slots:
                    return None
                missed += fewest_misses(trace, experts, slots, held)
                uses += trace.size
        return 1 - missed / uses
