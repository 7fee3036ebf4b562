"""How well a layer's choice is guessed: the share of it among the highest scores.

Shape letters: N tokens, L layers with experts, T tokens that are judged, E experts, K experts of a
token, W windows of text, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from moejax.offload.predictors import Predictor, distance_of

__all__ = ["Recall", "count_choices", "predictor_recalls", "recall_of"]


@dataclass(frozen=True)
class Recall:
    """Recall of a predictor.

    predictor: its name.
    distance: layers ahead within a token; None: the same layer for the next token.
    at_k, at_2k: share of what is chosen among the K, or 2 · K, highest scores.
    """

    predictor: str
    distance: int | None
    at_k: float
    at_2k: float


def recall_of(
    scores_TE: Float[np.ndarray, "T E"], experts_TK: Int[np.ndarray, "T K"], most: int
) -> tuple[int, int]:
    """How many choices lie among the highest scores.

    Args:
        scores_TE: higher is likelier; of equal ones the lower expert counts as higher.
        experts_TK: what was chosen; −1 for none.
        most: how many scores are looked at.

    Returns:
        Those found, and all choices.
    """
    order_TE = np.argsort(-scores_TE, axis=1, kind="stable")[:, :most]
    guessed_TE = np.zeros((len(scores_TE), scores_TE.shape[1] + 1), bool)
    np.put_along_axis(guessed_TE, order_TE, True, axis=1)
    found_TK = np.take_along_axis(guessed_TE, experts_TK.astype(np.int64), axis=1)
    return int(found_TK.sum()), int((experts_TK >= 0).sum())  # −1 is the last column, never set


def count_choices(experts_NLK: Int[np.ndarray, "N L K"], num_experts: int) -> np.ndarray:
    """How often each expert of each layer is chosen, int64 [L, E]."""
    layers = experts_NLK.shape[1]
    keys_NLK = experts_NLK + num_experts * np.arange(layers)[:, None]
    keys = keys_NLK[experts_NLK >= 0]
    return np.bincount(keys, minlength=layers * num_experts).reshape(layers, num_experts)


def predictor_recalls(
    name: str,
    predictor: Predictor,
    experts_WSLK: Int[np.ndarray, "W S L K"],
    num_experts: int,
    *,
    prompt: int,
    distances: Iterable[int] = (1, 2, 3),
) -> list[Recall]:
    """Recall of a host predictor on texts whose first tokens are the prompt.

    Args:
        name: of the predictor.
        predictor: follows each text anew.
        experts_WSLK: what was chosen; −1 for none.
        num_experts: E.
        prompt: tokens of each window that are no decoding.
        distances: layers ahead within a token; the next token's same layer comes last.

    Returns:
        Recall by distance, over all layers that have a target at it.
    """
    layers, top_k = experts_WSLK.shape[2:]
    wanted = [d for d in distances if d < layers]
    guesses: dict[int | None, list[np.ndarray]] = {d: [] for d in [*wanted, None]}
    chosen: dict[int | None, list[np.ndarray]] = {d: [] for d in guesses}
    for experts_SLK in experts_WSLK:
        predictor.begin(count_choices(experts_SLK[:prompt], num_experts) if prompt else None)
        for place in range(prompt, len(experts_SLK)):
            for layer in range(layers):
                predictor.observe(layer, experts_SLK[place, layer])
                for target in [layer + d for d in wanted if layer + d < layers]:
                    guesses[target - layer].append(predictor.scores(layer, target))
                    chosen[target - layer].append(experts_SLK[place, target])
                if place + 1 < len(experts_SLK):
                    assert distance_of(layer, layer, layers) == layers
                    guesses[None].append(predictor.scores(layer, layer))
                    chosen[None].append(experts_SLK[place + 1, layer])
    rows = []
    for distance, found in guesses.items():
        if found:
            shares = shares_of(np.stack(found), np.stack(chosen[distance]), top_k)
            rows.append(Recall(name, distance, *shares))
    return rows


def shares_of(
    scores_TE: Float[np.ndarray, "T E"], experts_TK: Int[np.ndarray, "T K"], top_k: int
) -> tuple[float, float]:
    """Recall at K and at 2 · K."""
    found = [recall_of(scores_TE, experts_TK, most) for most in (top_k, 2 * top_k)]
    at_k, at_2k = (right / max(all_, 1) for right, all_ in found)
    return at_k, at_2k
