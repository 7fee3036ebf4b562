"""Fits what predictors need, from texts that a model has read.

Shape letters: W windows of text, S tokens of a window, T = W · S, L layers with experts, E experts,
K experts of a token, D model width, J distances, O offsets, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int

from moejax.offload.recall import count_choices

__all__ = [
    "distances_for",
    "fit_choices",
    "fit_linear",
    "one_hot",
    "unit_rms",
]

DISTANCES = (1, 2, 3)
OFFSETS = (0, 1, 2)


def distances_for(layers: int) -> tuple[int, ...]:
    """What choices are predicted from: 1 to 3 layers ahead, and the same layer a token later."""
    return (*(d for d in DISTANCES if d < layers), layers)


def one_hot(experts_NK: Int[np.ndarray, "*N K"], num_experts: int) -> Float32[np.ndarray, "*N E"]:
    """1 where an expert is chosen."""
    found_NE = np.zeros((*experts_NK.shape[:-1], num_experts + 1), np.float32)
    np.put_along_axis(found_NE, experts_NK.astype(np.int64), 1.0, axis=-1)
    return found_NE[..., :num_experts]  # −1 is the last column


def unit_rms(x_TD: Float32[np.ndarray, "T D"]) -> Float32[np.ndarray, "T D"]:
    """Divided by the root of the mean square; zeros stay zero."""
    square_T1 = np.mean(np.square(x_TD), axis=-1, keepdims=True)
    return x_TD / np.sqrt(np.maximum(square_T1, np.finfo(np.float32).tiny))


def fit_linear(
    x_TD: Float32[np.ndarray, "T D"], chosen_TE: Float32[np.ndarray, "T E"], ridge: float
) -> tuple[Float32[np.ndarray, "D E"], Float32[np.ndarray, " E"]]:
    """A linear map with a bias from tokens to what is chosen for them, by least squares.

    Args:
        x_TD: the tokens.
        chosen_TE: 1 where an expert is chosen, else 0.
        ridge: penalty on the weights, times the mean square of a centred feature and T.

    Returns:
        The weights, and the bias, which is not penalised.
    """
    mean_D, mean_E = x_TD.mean(0, dtype=np.float64), chosen_TE.mean(0, dtype=np.float64)
    near_TD = x_TD - mean_D.astype(np.float32)
    w_DE = _solve(near_TD.T @ near_TD, near_TD.T @ chosen_TE, ridge)
    return w_DE.astype(np.float32), (mean_E - mean_D @ w_DE).astype(np.float32)


def fit_choices(
    experts_WSLK: Int[np.ndarray, "W S L K"],
    num_experts: int,
    distances: Sequence[int],
    ridge: float,
) -> dict[str, np.ndarray]:
    """What predicts choices from choices.

    Args:
        experts_WSLK: what was chosen; windows know nothing of each other.
        num_experts: E.
        distances: of `moejax.offload.predictors`, 1 to L.
        ridge: as of `fit_linear`.

    Returns:
        The fields `frequency_LE`, `coactivation_JLEE` and `history_JLFEE` of `Fits`.
    """
    windows, length, layers = experts_WSLK.shape[:3]
    counts_LE = count_choices(experts_WSLK.reshape(windows * length, layers, -1), num_experts)
    frequency_LE = (counts_LE / (windows * length)).astype(np.float32)
    shape = (len(distances), layers, num_experts, num_experts)
    coactivation_JLEE = np.zeros(shape, np.float32)
    history_JLFEE = np.zeros((*shape[:2], 3, *shape[2:]), np.float32)
    for layer in range(layers):
        here_WSE = one_hot(experts_WSLK[:, :, layer], num_experts)
        before_WSE = one_hot(experts_WSLK[:, :, layer - 1], num_experts)
        if layer == 0:
            before_WSE = _late(before_WSE)
        for index, distance in enumerate(distances):
            target = (layer + distance) % layers
            same = layer + distance < layers
            target_WSE = one_hot(experts_WSLK[:, :, target], num_experts)
            # What the target chose last is of this token where it is the next token's turn.
            last_WSE = _late(target_WSE) if same else target_WSE
            use = slice(None) if same else slice(0, length - 1)
            next_WSE = target_WSE if same else target_WSE[:, 1:]
            wanted_TE = next_WSE.reshape(-1, num_experts)
            parts = (last_WSE, here_WSE, before_WSE)
            x_TF = np.concatenate([p[:, use].reshape(-1, num_experts) for p in parts], axis=1)
            here_TE = x_TF[:, num_experts : 2 * num_experts]
            both_EE = here_TE.T @ wanted_TE
            # Half a token that chose by frequency stands beside what was counted.
            coactivation_JLEE[index, layer] = (both_EE + 0.5 * frequency_LE[target]) / (
                here_TE.sum(0)[:, None] + np.float32(0.5)
            )
            map_FE = _solve(x_TF.T @ x_TF, x_TF.T @ (wanted_TE - frequency_LE[target]), ridge)
            history_JLFEE[index, layer] = map_FE.reshape(3, num_experts, num_experts)
    return {
        "frequency_LE": frequency_LE,
        "coactivation_JLEE": coactivation_JLEE,
        "history_JLFEE": history_JLFEE,
    }


def _late(found_WSE: np.ndarray) -> np.ndarray:
    """The token before; nothing for the first."""
    return np.pad(found_WSE, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def _solve(
    gram_FF: Float[np.ndarray, "F F"], cross_FE: Float[np.ndarray, "F E"], ridge: float
) -> Float[np.ndarray, "F E"]:
    """Least squares with a penalty of `ridge` times the mean square of a feature."""
    gram_FF = gram_FF.astype(np.float64)
    # A layer that never varies leaves nothing to fit.
    penalty = max(ridge * float(np.trace(gram_FF)) / len(gram_FF), 1e-12)
    np.fill_diagonal(gram_FF, gram_FF.diagonal() + penalty)
    return np.linalg.solve(gram_FF, cross_FE.astype(np.float64))
