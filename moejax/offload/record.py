"""Runs texts through a stored model layer by layer and shows each layer with experts.

Shape letters: W windows of text, S tokens of a window, T = W · S, D model width, E experts,
K experts of a token, R outputs of a router.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float32, Int32

from moejax.compress.experts import LayerRouter
from moejax.compress.layers import LayerRunner, StoredLayers, router_of, table_of
from moejax.config import LayerConfig
from moejax.routing.choice import selection_scores

__all__ = ["LayerRecord", "record_layers"]


@dataclass(frozen=True)
class LayerRecord:
    """What passed through a layer with experts.

    layer: its number in the model.
    config: of the layer.
    entered_TD: the residual stream before attention and its norm.
    attended_TD: after attention, before the experts and their norm.
    experts_TK: what was chosen; −1 for none.
    scale_D: of the norm before the experts.
    router: of the layer.
    table_R: the expert that each of the router's outputs became, or None.
    """

    layer: int
    config: LayerConfig
    entered_TD: Float32[np.ndarray, "T D"]
    attended_TD: Float32[np.ndarray, "T D"]
    experts_TK: Int32[np.ndarray, "T K"]
    scale_D: Float32[np.ndarray, " D"]
    router: LayerRouter
    table_R: Int32[np.ndarray, " R"] | None

    @property
    def num_experts(self) -> int:
        """E of this layer."""
        assert self.config.moe is not None
        return self.config.moe.router.num_experts

    def router_scores(self, x_TD: Float32[np.ndarray, "T D"]) -> Float32[np.ndarray, "T E"]:
        """What this layer's norm and router make of any residual stream.

        Scores as the choice compares them, without looking at groups of experts: a guess that is
        one group off still has the right order within the others.
        """
        assert self.config.moe is not None
        config = self.config.moe.router.of_outputs
        square_T1 = np.mean(np.square(x_TD), axis=-1, keepdims=True)
        h_TD = x_TD / np.sqrt(square_T1 + np.float32(self.config.norm_eps)) * self.scale_D
        logits_TR = h_TD @ self.router.w_DE
        if self.router.b_E is not None:
            logits_TR = logits_TR + self.router.b_E
        bias = self.router.selection_bias_E
        bias_R = None if bias is None else jnp.asarray(bias)
        scores_TR = np.asarray(selection_scores(jnp.asarray(logits_TR), config, bias_R))
        if self.table_R is None:
            return scores_TR
        scores_ET = np.full((self.num_experts, len(x_TD)), -np.inf, np.float32)
        np.maximum.at(scores_ET, self.table_R, scores_TR.T)  # its best output chooses an expert
        return scores_ET.T


def record_layers(
    stored: StoredLayers, tokens_WS: Int32[np.ndarray, "W S"]
) -> Iterator[LayerRecord]:
    """Runs texts through a model; one layer's weights are on the host at a time.

    Args:
        stored: the model.
        tokens_WS: windows of text, which know nothing of each other.

    Yields:
        Each layer with experts, in order.
    """
    run = LayerRunner(stored.config)
    x_WSD = stored.read("params/embedding.w")[tokens_WS]
    for index, layer in enumerate(stored.config.layers()):
        weights = stored.layer(index)
        passed = run(layer, weights, x_WSD)
        if layer.moe is not None:
            assert passed.sample is not None and passed.y_TD is not None
            width = x_WSD.shape[-1]
            yield LayerRecord(
                layer=index,
                config=layer,
                entered_TD=x_WSD.reshape(-1, width),
                attended_TD=passed.x_WSD.reshape(-1, width) - passed.y_TD,
                experts_TK=passed.sample.experts_TK,
                scale_D=weights["params/mlp_norm.scale"],
                router=router_of(weights),
                table_R=table_of(weights),
            )
        x_WSD = passed.x_WSD
