"""Guesses that were recorded, in place of a predictor: what probes of hidden states made of a text.

Shape letters: L layers with experts, E experts, K experts of a token, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Float32, Int

from moejax.offload.predictors import Predictor

__all__ = ["Replay"]


class Replay:
    """A predictor for the texts of a trace, in their order.

    Where nothing was recorded, as for the next token, another predictor is asked.

    Args:
        scores: by distance within a token and target: of all tokens of the trace, [N, E].
        lens: tokens of each text.
        prompt: tokens of each text that are not decoded.
        otherwise: the other predictor.
    """

    def __init__(
        self,
        scores: Mapping[tuple[int, int], Float32[np.ndarray, "N E"]],
        lens: Sequence[int],
        prompt: int,
        otherwise: Predictor,
    ) -> None:
        self._scores, self._otherwise = scores, otherwise
        starts = np.cumsum([0, *lens[:-1]])
        self._first = iter((starts + np.minimum(prompt, lens) - 1).tolist())
        self._place = -1

    def begin(self, counts_LE: Int[np.ndarray, "L E"] | None) -> None:
        """The next text begins."""
        self._place = next(self._first)
        self._otherwise.begin(counts_LE)

    def observe(self, layer: int, experts_K: Int[np.ndarray, " K"]) -> None:
        """As of a predictor."""
        self._place += layer == 0
        self._otherwise.observe(layer, experts_K)

    def scores(self, layer: int, target: int) -> Float[np.ndarray, " E"]:
        """As of a predictor."""
        found = self._scores.get((target - layer, target)) if target > layer else None
        if found is None:
            return self._otherwise.scores(layer, target)
        return found[self._place]
