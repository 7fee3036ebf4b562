"""Which experts are guessed for a layer: by a program on the device, or by what was chosen before.

Layers are counted among those with experts. A predictor on the host follows one text; of texts that
decode together the scores are added up.

Shape letters: L layers with experts, E experts, K experts of a token, T tokens of a step, R rows of
a step, a token each where it decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from moejax.inference.scheduler import Plan
from moejax.offload.config import OffloadConfig
from moejax.offload.predictors import PREDICTORS, Predictor, make_predictor

__all__ = ["Guesses"]


@dataclass
class _Followed:
    """A text that decodes, or whose prompt is being run, in a slot of the engine."""

    predictor: Predictor
    counts_LE: np.ndarray
    begun: bool = field(default=False)


class Guesses:
    """What is known of the layers ahead.

    Args:
        config: which predictor.
        experts_L: E of each layer.
        top_k: K, the most that any layer chooses.
    """

    def __init__(self, config: OffloadConfig, experts_L: Sequence[int], top_k: int) -> None:
        self._config, self._experts_L, self._top_k = config, tuple(experts_L), top_k
        self._layers, self._most = len(self._experts_L), max(self._experts_L)
        self._on_host = config.predictor in PREDICTORS
        self._follows: str | None = config.predictor if self._on_host else None
        if config.policy == "predicted" and not self._on_host:
            # A program tells nothing of the next token, which is what this policy asks for.
            self._follows = "previous" if config.fits is None else "combined"
        if self._follows is not None:
            self._new()  # its fits may be of another model
        self._texts: dict[int, _Followed] = {}
        self._rows: list[tuple[_Followed, int, int]] = []
        self._decodes = False
        self._probed: dict[int, np.ndarray] = {}

    def begin(self, plan: Plan) -> None:
        """A step begins."""
        shape = plan.shape
        self._decodes = shape.tokens == 0
        self._rows = []
        if self._follows is None:
            return
        width = shape.tokens or 1
        for row, work in enumerate(plan.rows[0]):
            slot = work.text.slot
            if slot not in self._texts:
                self._texts[slot] = self._new()
            text = self._texts[slot]
            if work.first:
                text.counts_LE[:], text.begun = 0, False
            if self._decodes and not text.begun:
                text.predictor.begin(text.counts_LE)
                text.begun = True
            self._rows.append((text, row * width, row * width + work.count))

    def observe(
        self, layer: int, experts_TK: Int[np.ndarray, "T K"], probe_E: np.ndarray | None
    ) -> None:
        """What a layer has chosen for the step, and what a program thinks of the next one."""
        if probe_E is not None and layer + 1 < self._layers:
            self._probed[layer + 1] = probe_E
        for text, start, stop in self._rows:
            chosen = experts_TK[start:stop].reshape(-1)
            if self._decodes:
                text.predictor.observe(layer, chosen)
            else:
                np.add.at(text.counts_LE[layer], chosen[chosen >= 0], 1)

    def ahead(self, layer: int) -> tuple[int, Float[np.ndarray, " E"]] | None:
        """After a layer was observed: the next one, and scores of its experts; None: no guess."""
        if self._on_host:
            target = (layer + 1) % self._layers
            scores_E = self._scores(layer, target)
            return None if scores_E is None else (target, scores_E)
        if self._config.predictor == "none" or layer + 1 == self._layers:
            return None
        scores_E = self._probed.get(layer + 1)
        return None if scores_E is None else (layer + 1, scores_E)

    def again(self, layer: int) -> Float[np.ndarray, " E"] | None:
        """After a layer was observed: scores of what it will choose for the next token."""
        return None if self._follows is None else self._scores(layer, layer)

    def forget(self) -> None:
        """Forgets all texts."""
        self._texts.clear()
        self._probed.clear()
        self._rows = []

    def _new(self) -> _Followed:
        config = self._config
        sizes = self._layers, self._most, self._top_k
        predictor = make_predictor(self._follows, *sizes, config.fits)  # type: ignore[arg-type]
        return _Followed(predictor, np.zeros((self._layers, self._most), np.int64))

    def _scores(self, layer: int, target: int) -> np.ndarray | None:
        if not self._decodes or not self._rows:
            return None
        total_E = sum(text.predictor.scores(layer, target) for text, _, _ in self._rows)
        return np.asarray(total_E)[: self._experts_L[target]]
