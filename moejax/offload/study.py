"""Fits predictors on some texts of a model and measures all of them on others, in one pass.

Shape letters: W windows of text, S tokens of a window, T = W · S, L layers with experts, E experts,
K experts of a token, D model width, O offsets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int16, Int32

from moejax.compress.layers import StoredLayers
from moejax.offload.fits import Fits
from moejax.offload.fitting import (
    DISTANCES,
    OFFSETS,
    distances_for,
    fit_choices,
    fit_linear,
    one_hot,
    unit_rms,
)
from moejax.offload.predictors import PREDICTORS, make_predictor
from moejax.offload.recall import Recall, predictor_recalls, recall_of
from moejax.offload.record import LayerRecord, record_layers

__all__ = ["Study", "host_recalls", "study"]

Say = Callable[[str], None]
ProbeScores = dict[tuple[str, int, int], Float32[np.ndarray, "T E"]]
"""By the probe's name, its distance and its target; of the held-out text."""


@dataclass(frozen=True)
class Study:
    """What was found.

    fits: for predictors.
    held_WSLK: what the held-out text chose; −1 for none.
    num_experts: E, the most of any layer.
    recalls: of the probes, which look at hidden states: `routers`, the target's norm and router on
        the residual stream after a layer's attention; `linear`, see `Fits`.
    scores: of the probes, if they were to be kept.
    """

    fits: Fits
    held_WSLK: Int16[np.ndarray, "W S L K"]
    num_experts: int
    recalls: list[Recall]
    scores: ProbeScores


@dataclass
class _Tally:
    """Counts of choices found, by probe and distance."""

    counts: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def add(
        self, probe: str, distance: int, scores_TE: np.ndarray, experts_TK: np.ndarray, top_k: int
    ) -> None:
        new = [recall_of(scores_TE, experts_TK, most) for most in (top_k, 2 * top_k)]
        self.counts[probe, distance] = self.counts.get((probe, distance), 0) + np.array(new)

    def rows(self) -> list[Recall]:
        return [
            Recall(probe, distance, *(found_22[:, 0] / np.maximum(found_22[:, 1], 1)).tolist())
            for (probe, distance), found_22 in sorted(self.counts.items())
        ]


def study(
    stored: StoredLayers,
    fit_WS: Int32[np.ndarray, "V S"],
    held_WS: Int32[np.ndarray, "W S"],
    *,
    prompt: int,
    ridge: float,
    keep: bool = False,
    say: Say = lambda line: None,
) -> Study:
    """Runs a model over texts, fits on some, and measures probes on the others.

    Args:
        stored: the model.
        fit_WS: windows to fit on.
        held_WS: windows of the same length to measure on, each a prompt and what follows it.
        prompt: tokens of the prompt, which do not count.
        ridge: of all fits, see `fit_linear`.
        keep: the probes' scores, W · S · E · 4 bytes for each pair of layers.
        say: is told how far it is.
    """
    configs = [layer.moe.router for layer in stored.config.layers() if layer.moe is not None]
    num_experts = max(config.num_experts for config in configs)
    most = max(config.top_k for config in configs)
    cut, length = fit_WS.size, fit_WS.shape[1]
    judged_T = np.tile(np.arange(length) >= prompt, len(held_WS))
    behind: deque[LayerRecord] = deque(maxlen=1 + max(*DISTANCES, *OFFSETS))
    shape = (len(OFFSETS), len(configs), stored.config.d_model, num_experts)
    w_OLDE, b_OLE = np.zeros(shape, np.float32), np.zeros((*shape[:2], num_experts), np.float32)
    tally, scores, numbers = _Tally(), ProbeScores(), []
    chosen: list[np.ndarray] = []  # [T, K] of both texts, by layer

    def judge(probe: str, distance: int, target: int, scores_TE: np.ndarray) -> None:
        # Experts that this layer lacks are never guessed.
        lacking = num_experts - scores_TE.shape[1]
        scores_TE = np.pad(scores_TE, ((0, 0), (0, lacking)), constant_values=-np.inf)
        held_TK, top_k = chosen[target][cut:], configs[target].top_k
        tally.add(probe, distance, scores_TE[judged_T], held_TK[judged_T], top_k)
        if keep:
            scores[probe, distance, target] = scores_TE

    for target, record in enumerate(record_layers(stored, np.concatenate([fit_WS, held_WS]))):
        behind.appendleft(record)
        numbers.append(record.layer)
        lacking = most - record.experts_TK.shape[1]
        padded_TK = np.pad(record.experts_TK, ((0, 0), (0, lacking)), constant_values=-1)
        chosen.append(padded_TK.astype(np.int16))
        wanted_TE = one_hot(record.experts_TK[:cut], num_experts)
        for index, offset in enumerate(OFFSETS):
            if offset < len(behind):
                source, x_TD = target - offset, unit_rms(behind[offset].entered_TD)
                w_DE, b_E = fit_linear(x_TD[:cut], wanted_TE, ridge)
                w_OLDE[index, source], b_OLE[index, source] = w_DE, b_E
                judge("linear", offset, target, x_TD[cut:] @ w_DE + b_E)
        for distance in DISTANCES:
            if distance < len(behind):
                x_TD = behind[distance].attended_TD[cut:]
                judge("routers", distance, target, record.router_scores(x_TD))
        say(f"layer {record.layer}: {len(record.experts_TK)} tokens")
    experts_WSLK = np.stack(chosen, axis=1).reshape(-1, length, len(configs), most)
    fit_WSLK, held_WSLK = np.split(experts_WSLK, [len(fit_WS)])
    distances = distances_for(len(configs))
    fits = Fits(
        layers_L=np.array(numbers, np.int64),
        distances_J=np.array(distances, np.int64),
        offsets_O=np.array(OFFSETS, np.int64),
        **fit_choices(fit_WSLK, num_experts, distances, ridge),
        linear_w_OLDE=w_OLDE,
        linear_b_OLE=b_OLE,
    )
    return Study(fits, held_WSLK, num_experts, tally.rows(), scores)


def host_recalls(found: Study, *, prompt: int) -> list[Recall]:
    """Recall of the predictors that see choices alone, on the same text."""
    layers, top_k = found.held_WSLK.shape[2:]
    rows = []
    for name in PREDICTORS:
        predictor = make_predictor(name, layers, found.num_experts, top_k, found.fits)
        rows += predictor_recalls(
            name, predictor, found.held_WSLK, found.num_experts, prompt=prompt, distances=DISTANCES
        )
    return rows
