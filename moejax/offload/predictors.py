"""Guesses which experts the layers ahead will choose, from what was chosen so far.

A predictor follows one text. Layers are counted among those with experts. Going on from the last
layer one comes to the first layer of the next token; the `distance` of a guess is how many layers
ahead its target lies on this way, 1 to L: at distance L lies the same layer for the next token.

Shape letters: L layers with experts, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import numpy as np
from jaxtyping import Float, Int

from moejax.errors import UserError
from moejax.offload.fits import Fits

__all__ = ["PREDICTORS", "Predictor", "PredictorName", "distance_of", "make_predictor"]

PredictorName = Literal["frequent", "previous", "prompt", "coactivation", "history", "combined"]
PREDICTORS: tuple[PredictorName, ...] = get_args(PredictorName)
_RECENT = 0.9  # what is left of a use after a token, where recent frequency breaks ties
_LONGER = 0.98  # the same where recent frequency is a part of the guess


class Predictor(Protocol):
    """Follows a text layer by layer, token by token."""

    def begin(self, counts_LE: Int[np.ndarray, "L E"] | None) -> None:
        """A new text begins; how often its prompt chose each expert, if there was one."""

    def observe(self, layer: int, experts_K: Int[np.ndarray, " K"]) -> None:
        """What a layer chose for the token at hand; −1 for no choice. Layer 0 is a new token."""

    def scores(self, layer: int, target: int) -> Float[np.ndarray, " E"]:
        """How likely `target` is to choose each expert, after `layer` was observed.

        Args:
            layer: the layer observed last.
            target: behind it: of this token; `layer` or before it: of the next token.

        Returns:
            float32 [E], higher is likelier; only the order counts.
        """


def make_predictor(
    name: PredictorName, layers: int, num_experts: int, top_k: int, fits: Fits | None = None
) -> Predictor:
    """A predictor.

    Args:
        name: `frequent` goes by all choices so far, of all texts; `previous` by what the target
            chose for the token before, and then by what it chose lately; `prompt` by all choices in
            this text, its prompt included; `coactivation` by what is chosen together with what the
            layer observed last chose; `history` is a linear map on what the target chose for the
            token before and what the last two layers chose; `combined` adds to that how often the
            target chose each expert lately, which tells more of the tokens after the next.
        layers: L.
        num_experts: E, the most that any layer has.
        top_k: K, the most that any layer chooses.
        fits: for the last three: statistics of this model.

    Raises:
        UserError: there is no such predictor, or its fits are missing or of another model.
    """
    plain: dict[str, Callable[[int, int, int], Predictor]] = {
        "frequent": _Frequent,
        "previous": _Previous,
        "prompt": _Prompt,
    }
    if name in plain:
        return plain[name](layers, num_experts, top_k)
    if name not in PREDICTORS:
        raise UserError(f"predictor {name!r}: must be one of {', '.join(PREDICTORS)}")
    if fits is None:
        raise UserError(
            f"predictor {name!r}: needs what python -m moejax.offload MODEL FITS.npz writes for "
            "this model; name that file, or choose one that needs none, such as previous"
        )
    fits.check(layers, num_experts)
    fitted: dict[str, Callable[[int, int, int, Fits], Predictor]] = {
        "coactivation": _Coactivation,
        "history": _History,
        "combined": _Combined,
    }
    return fitted[name](layers, num_experts, top_k, fits)


def distance_of(layer: int, target: int, layers: int) -> int:
    """How many layers ahead of `layer` the next `target` lies, 1 to L."""
    return (target - layer - 1) % layers + 1


class _Recent:
    """How often each expert was chosen lately, in uses of a token; [L, E].

    Args:
        left: of a use after a token.
    """

    def __init__(self, layers: int, num_experts: int, top_k: int, left: float) -> None:
        self._top_k, self._left = top_k, np.float32(left)
        self.share_LE = np.zeros((layers, num_experts), np.float32)

    def begin(self, counts_LE: Float[np.ndarray, "L E"]) -> None:
        """Begins with the prompt's choices, as if those had been made for long."""
        total_L1 = np.maximum(counts_LE.sum(1, keepdims=True), 1.0)
        self.share_LE = counts_LE * np.float32(self._top_k) / total_L1

    def observe(self, layer: int, chosen: Int[np.ndarray, " K"]) -> None:
        """A layer has chosen."""
        self.share_LE[layer] *= self._left
        np.add.at(self.share_LE[layer], chosen, 1 - self._left)


class _Followed:
    """What predictors remember of a text."""

    recent_left: float | None = None
    """Of a use after a token, for those that ask how often experts were chosen lately."""

    def __init__(self, layers: int, num_experts: int, top_k: int) -> None:
        self.layers = layers
        left = self.recent_left
        self.recent = None if left is None else _Recent(layers, num_experts, top_k, left)
        self.last: list[np.ndarray] = [np.zeros(0, np.int64)] * layers
        self.text_LE = np.zeros((layers, num_experts), np.float32)

    def begin(self, counts_LE: Int[np.ndarray, "L E"] | None) -> None:
        self.last = [np.zeros(0, np.int64)] * self.layers
        self.text_LE[:] = 0.0 if counts_LE is None else counts_LE
        if self.recent is not None:
            self.recent.begin(self.text_LE)

    def observe(self, layer: int, experts_K: Int[np.ndarray, " K"]) -> None:
        chosen = np.asarray(experts_K).reshape(-1)
        chosen = chosen[chosen >= 0]
        self.last[layer] = chosen
        np.add.at(self.text_LE[layer], chosen, np.float32(1.0))
        if self.recent is not None:
            self.recent.observe(layer, chosen)


class _Prompt(_Followed):
    """`prompt`."""

    def scores(self, layer: int, target: int) -> Float[np.ndarray, " E"]:
        return self.text_LE[target].copy()


class _Frequent(_Followed):
    """`frequent`."""

    def __init__(self, layers: int, num_experts: int, top_k: int) -> None:
        super().__init__(layers, num_experts, top_k)
        self._before_LE = np.zeros((layers, num_experts), np.float32)

    def begin(self, counts_LE: Int[np.ndarray, "L E"] | None) -> None:
        self._before_LE += self.text_LE
        super().begin(counts_LE)

    def scores(self, layer: int, target: int) -> Float[np.ndarray, " E"]:
        return self._before_LE[target] + self.text_LE[target]


class _Previous(_Followed):
    """`previous`."""

    recent_left = _RECENT

    def scores(self, layer: int, target: int) -> Float[np.ndarray, " E"]:
        assert self.recent is not None
        found = self.recent.share_LE[target].copy()
        found[self.last[target]] += found.max() + 1.0  # ahead of all others
        return found


class _Fitted(_Followed):
    """With the statistics of a model."""

    def __init__(self, layers: int, num_experts: int, top_k: int, fits: Fits) -> None:
        super().__init__(layers, num_experts, top_k)
        self.fits = fits

    def frequency(self, target: int) -> Float[np.ndarray, " E"]:
        """Where nothing better is known."""
        return self.fits.frequency_LE[target].copy()


class _Coactivation(_Fitted):
    """`coactivation`."""

    def scores(self, layer: int, target: int) -> Float[np.ndarray, " E"]:
        map_EE = self.fits.coactivation(layer, distance_of(layer, target, self.layers))
        chosen = self.last[layer]
        if map_EE is None or not len(chosen):
            return self.frequency(target)
        return map_EE[chosen].mean(0)


class _History(_Fitted):
    """`history`."""

    def scores(self, layer: int, target: int) -> Float[np.ndarray, " E"]:
        distance = distance_of(layer, target, self.layers)
        map_FEE = self.fits.history(layer, distance)
        found = self.frequency(target)
        if map_FEE is None:
            return found
        # What was not observed yet adds nothing, as what was not chosen.
        for map_EE, seen in zip(map_FEE, (target, layer, (layer - 1) % self.layers)):
            found += map_EE[self.last[seen]].sum(0)
        return found


class _Combined(_History):
    """`combined`."""

    recent_left = _LONGER

    def scores(self, layer: int, target: int) -> Float[np.ndarray, " E"]:
        assert self.recent is not None
        return super().scores(layer, target) + self.recent.share_LE[target]
