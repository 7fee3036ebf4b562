"""What compression works on: a layer's experts and router, and tokens that went through them.

Everything is numpy on the host, in logical order, one layer at a time.

Shape letters: D model width, E experts, H hidden width of an expert, N input projections (2 for
gated activations: gate, then up), T tokens, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from moejax.config import Activation

__all__ = ["LayerExperts", "LayerRouter", "Sample"]


@dataclass(frozen=True)
class LayerExperts:
    """The routed experts of one layer.

    w_in_EDNH: input projections.
    w_out_EHD: output projection.
    b_in_ENH, b_out_ED: biases or None.
    activation: between the two.
    """

    w_in_EDNH: Float32[np.ndarray, "E D N H"]
    w_out_EHD: Float32[np.ndarray, "E H D"]
    b_in_ENH: Float32[np.ndarray, "E N H"] | None
    b_out_ED: Float32[np.ndarray, "E D"] | None
    activation: Activation

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.w_out_EHD)

    def take(self, experts: np.ndarray) -> LayerExperts:
        """Some of the experts, in the order of their numbers given."""
        return LayerExperts(
            self.w_in_EDNH[experts],
            self.w_out_EHD[experts],
            None if self.b_in_ENH is None else self.b_in_ENH[experts],
            None if self.b_out_ED is None else self.b_out_ED[experts],
            self.activation,
        )


@dataclass(frozen=True)
class LayerRouter:
    """The router of one layer, a column for each of the experts that it chooses among.

    w_DE: float32.
    b_E: bias of the logits, or None.
    selection_bias_E: what only the choice sees, or None.
    """

    w_DE: Float32[np.ndarray, "D E"]
    b_E: Float32[np.ndarray, " E"] | None
    selection_bias_E: Float32[np.ndarray, " E"] | None

    def take(self, experts: np.ndarray) -> LayerRouter:
        """The columns of some experts, in the order given: the others are never chosen."""
        return LayerRouter(
            self.w_DE[:, experts],
            None if self.b_E is None else self.b_E[experts],
            None if self.selection_bias_E is None else self.selection_bias_E[experts],
        )


@dataclass(frozen=True)
class Sample:
    """Tokens of some text as they reached the experts of one layer.

    x_TD: what the experts were given, after the norm.
    experts_TK: the experts chosen, distinct within a token; −1 for none.
    scores_TK: their weights, 0 for none.
    """

    x_TD: Float32[np.ndarray, "T D"]
    experts_TK: Int32[np.ndarray, "T K"]
    scores_TK: Float32[np.ndarray, "T K"]

    def weights(self, num_experts: int) -> Float32[np.ndarray, "T E"]:
        """Each token's score of each expert, 0 where it was not chosen."""
        weights_TE = np.zeros((len(self.x_TD), num_experts + 1), np.float32)
        rows_T = np.arange(len(self.x_TD))
        for experts_T, scores_T in zip(self.experts_TK.T, self.scores_TK.T):
            weights_TE[rows_T, experts_T] += scores_T  # −1 is the last column
        return weights_TE[:, :num_experts]
