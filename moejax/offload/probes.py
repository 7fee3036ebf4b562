"""What a layer's program can tell of the next layer's choice, while the residual is at hand.

Shape letters: T tokens, D model width, E experts and R outputs of the router of the next layer with
experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from moejax.offload.parts import Structure
from moejax.routing.choice import selection_scores

__all__ = ["LinearProbe", "RouterProbe"]


@dataclass(frozen=True)
class RouterProbe:
    """The next layer's norm and router on the residual after this layer's attention.

    It lacks what this layer's experts, and the next one's attention, will add to the residual.

    norm, router: their structure.
    """

    norm: Structure
    router: Structure

    @staticmethod
    def of(block: Any) -> tuple[RouterProbe, tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]:
        """The probe for a layer, and its weights."""
        norm, norm_weights = Structure.of(block.mlp_norm)
        router, router_weights = Structure.of(block.moe.router)
        return RouterProbe(norm, router), (norm_weights, router_weights)

    def __call__(
        self,
        weights: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
        before_TD: Float[Array, "T D"],
        after_TD: Float[Array, "T D"],
        mask_T: Bool[Array, " T"],
    ) -> Float32[Array, " E"]:
        """How many tokens choose each expert; what is equal goes by its mean probability."""
        del before_TD
        norm, router = self.norm.around(weights[0]), self.router.around(weights[1])
        x_TD = norm(after_TD)
        counts_E = router(x_TD, token_mask_T=mask_T).counts_E.astype(jnp.float32)
        config = router.config.of_outputs
        bias_R = None if router.selection_bias_E is None else router.selection_bias_E[...]
        select_TR = selection_scores(router.logits(x_TD), config, bias_R)
        likely_TR = jnp.where(mask_T[:, None], jax.nn.softmax(select_TR, axis=-1), 0.0)
        likely_R = jnp.sum(likely_TR, axis=0) / jnp.float32(len(mask_T) + 1)  # less than a count
        if router.table_R is None:
            return counts_E + likely_R
        return counts_E.at[router.table_R[...]].add(likely_R)


@dataclass(frozen=True)
class LinearProbe:
    """A fitted map on the residual before this layer's attention, see `Fits.linear`."""

    experts: int

    def __call__(
        self,
        weights: tuple[jax.Array, jax.Array],
        before_TD: Float[Array, "T D"],
        after_TD: Float[Array, "T D"],
        mask_T: Bool[Array, " T"],
    ) -> Float32[Array, " E"]:
        """The sum of the tokens' probabilities, as they are estimated."""
        del after_TD
        w_DE, b_E = weights
        x_TD = before_TD.astype(jnp.float32)
        mean_T1 = jnp.mean(jnp.square(x_TD), axis=-1, keepdims=True)
        x_TD = x_TD * jax.lax.rsqrt(jnp.maximum(mean_T1, jnp.float32(1e-30)))
        likely_TE = x_TD @ w_DE + b_E
        return jnp.sum(jnp.where(mask_T[:, None], likely_TE, 0.0), axis=0)[: self.experts]
