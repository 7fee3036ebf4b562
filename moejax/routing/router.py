"""The router: scores of the experts, the K chosen ones, and what balances them.

Shape letters: T tokens of this device, D model width, E experts, K experts of a token.

Everything is float32, the product included: the choice compares scores that may lie closer
together than bfloat16 can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.scipy.special import entr
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32

from moejax.config import RouterConfig
from moejax.routing.bias import RouterBias
from moejax.routing.choice import choose_experts, deal_experts, selection_scores
from moejax.routing.locality import Reach
from moejax.routing.losses import RouterLosses, router_losses
from moejax.routing.merged import RouterTable, initial_table, redirect
from moejax.routing.near import choose_near, mass_kept
from pallas_kernels.route.router_product import router_product
from sharding.mesh import TOKEN_AXES

__all__ = ["Router", "Routing", "route"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Where the tokens of this device go.

    scores_TK: float32 [T, K], weights of the chosen experts; differentiable. 0 for masked tokens.
    experts_TK: int32 [T, K], logical experts, distinct within a token, by descending selection
        score (as dealt under `forced_balance`). All −1 for masked tokens; of merged experts, −1
        for an output of the router whose expert the token has already.
    losses: this device's share of the auxiliary losses.
    counts_E: int32 [E], assignments to each expert from this device.
    entropy_sum: float32 [], nats, entropy of the normalised scores summed over this device's
        tokens; no gradient.
    num_tokens: int32 [], unmasked tokens of this device.
    kept: float32 [], score mass kept, see `mass_kept`, summed over this device's tokens; no
        gradient. None where routing does not look at distances.
    devices_TG: bool [T, G], the devices whose copies may serve a token; None: all.
    """

    scores_TK: Float32[Array, "T K"]
    experts_TK: Int32[Array, "T K"]
    losses: RouterLosses
    counts_E: Int32[Array, " E"]
    entropy_sum: Float32[Array, ""]
    num_tokens: Int32[Array, ""]
    kept: Float32[Array, ""] | None = None
    devices_TG: Bool[Array, "T G"] | None = None


def route(
    logits_TE: Float32[Array, "T E"],
    config: RouterConfig,
    *,
    bias_E: Float32[Array, " E"] | None = None,
    token_mask_T: Bool[Array, " T"] | None = None,
    axes: Sequence[str] = TOKEN_AXES,
    reach: Reach | None = None,
) -> Routing:
    """Chooses experts for tokens whose logits are known.

    Args:
        logits_TE: float32 [T, E].
        config: the router's configuration; of merged experts, `of_outputs`.
        bias_E: float32 [E], added for choosing only; it gets no gradient.
        token_mask_T: bool [T], False for padding: such tokens go nowhere and count nowhere.
        axes: mesh axes that tokens are split over; () outside of a shard_map.
        reach: where the experts are, for a choice by distance, too; None: by scores alone.

    Returns:
        The routing. Its gradient flows to `logits_TE` through the scores and the losses, not
        through the choice.
    """
    num_tokens = logits_TE.shape[0]
    if token_mask_T is not None:
        # Padding may hold anything, also NaN, which a mask applied later would not stop.
        logits_TE = jnp.where(token_mask_T[:, None], logits_TE, 0.0)
    # Up to a constant for each token these are the logarithms of the scores, so that one softmax
    # normalises any score function over any set of experts, with nothing to divide by.
    sigmoid = config.score_function == "sigmoid"
    log_scores_TE = jax.nn.log_sigmoid(logits_TE) if sigmoid else logits_TE
    probs_TE = jax.nn.softmax(log_scores_TE, axis=-1)

    renormalize = config.renormalize or config.score_function == "topk_softmax"
    # What is normalised over the chosen is their logarithms; sigmoids commute with the choice.
    values_TE = log_scores_TE if renormalize else logits_TE if sigmoid else probs_TE
    near = kept = None
    if reach is not None:
        near = choose_near(
            logits_TE, config, reach, bias_E, log_scores_TE=log_scores_TE, probs_TE=probs_TE
        )
        experts_TK, scores_TK = near.experts_TK, near.scores_TK
        kept_T = mass_kept(logits_TE, probs_TE, experts_TK, config, bias_E)
        if token_mask_T is not None:
            kept_T = jnp.where(token_mask_T, kept_T, 0.0)
        kept = jnp.sum(kept_T)
    elif config.forced_balance:
        experts_TK = deal_experts(num_tokens, config, axes)
        scores_TK = _of_chosen(values_TE, experts_TK)
        if renormalize:
            scores_TK = jax.nn.softmax(scores_TK, axis=-1)
    else:
        select_TE = selection_scores(logits_TE, config, bias_E)
        experts_TK, scores_TK = choose_experts(select_TE, values_TE, config, softmax=renormalize)
    if sigmoid and not renormalize and near is None:
        scores_TK = jax.nn.sigmoid(scores_TK)
    scores_TK = scores_TK * config.scaling_factor

    entropy_T = lax.stop_gradient(jnp.sum(entr(probs_TE), axis=-1))
    counted = jnp.int32(num_tokens)
    if token_mask_T is not None:
        scores_TK = jnp.where(token_mask_T[:, None], scores_TK, 0.0)
        experts_TK = jnp.where(token_mask_T[:, None], experts_TK, -1)
        entropy_T = jnp.where(token_mask_T, entropy_T, 0.0)
        counted = jnp.sum(token_mask_T, dtype=jnp.int32)

    counts_E = _count(experts_TK, config.num_experts)
    return Routing(
        scores_TK=scores_TK,
        experts_TK=experts_TK,
        losses=router_losses(logits_TE, probs_TE, counts_E, token_mask_T, config, axes),
        counts_E=counts_E,
        entropy_sum=jnp.sum(entropy_T),
        num_tokens=counted,
        kept=kept,
        devices_TG=None if near is None else near.devices_TG,
    )


def _of_chosen(values_TE: jax.Array, experts_TK: jax.Array) -> jax.Array:
    """The chosen experts' values, [T, K].

    Experts are distinct within a token; saying so lets the backward scatter without ordering its
    additions, which keeps it both fast and deterministic on a GPU.
    """
    rows = jnp.arange(values_TE.shape[0], dtype=jnp.int32)[:, None]
    return values_TE.at[rows, experts_TK].get(unique_indices=True, mode="promise_in_bounds")


def _count(experts_TK: jax.Array, num_experts: int) -> jax.Array:
    """Assignments of each expert, int32 [E]; ids of −1 are left out."""
    # An index of -1 would wrap around; one beyond the end is dropped.
    ids = jnp.where(experts_TK < 0, num_experts, experts_TK).reshape(-1)
    return jnp.zeros(num_experts, jnp.int32).at[ids].add(1, mode="drop")


def _kept_float32(variable: type[nnx.Variable], value: jax.Array) -> Any:
    """A replicated variable that keeps its dtype when other weights become the compute dtype."""
    return variable(value, spec=PartitionSpec(), float32=True)


class Router(nnx.Module):
    """A linear router.

    Attributes:
        w_DE: float32 [D, E], drawn from a normal distribution of standard deviation 1/√D.
        b_E: float32 [E] bias of the logits, or None (`config.bias`).
        selection_bias_E: `RouterBias` [E] that only the choice sees, or None
            (`config.selection_bias`); `update_bias` moves it.
        table_R: `RouterTable` [R], the expert that each output became, or None
            (`config.merged_from`); the other variables are of outputs then, R in place of E.

    All carry the metadata `spec` (replicated) and `float32=True`: they stay float32 when the other
    weights are cast to the compute dtype.
    """

    def __init__(self, d_model: int, config: RouterConfig, *, rngs: nnx.Rngs):
        """Makes a router.

        Args:
            d_model: width D of a token.
            config: the router's configuration.
            rngs: the stream `params` draws the weight.
        """
        self.config = config
        outputs = config.num_outputs
        w_DE = jax.random.normal(rngs.params(), (d_model, outputs), jnp.float32)
        self.w_DE = _kept_float32(nnx.Param, w_DE / math.sqrt(d_model))
        zeros = partial(jnp.zeros, outputs, jnp.float32)  # an array each: buffers are donated
        self.b_E = _kept_float32(nnx.Param, zeros()) if config.bias else None
        self.selection_bias_E = (
            _kept_float32(RouterBias, zeros()) if config.selection_bias else None
        )
        self.table_R = (
            None
            if config.merged_from is None
            else _kept_float32(RouterTable, initial_table(outputs, config.num_experts))
        )

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        *,
        token_mask_T: Bool[Array, " T"] | None = None,
        axes: Sequence[str] = TOKEN_AXES,
        reach: Reach | None = None,
        bonus_E: Float32[Array, " E"] | None = None,
    ) -> Routing:
        """Routes tokens.

        Args:
            x_TD: [T, D], float32 or bfloat16.
            token_mask_T: bool [T], False for padding; None counts all tokens.
            axes: mesh axes that tokens are split over; () outside of a shard_map.
            reach: where the experts are, for a choice by distance, too; None: by scores alone.
            bonus_E: float32 [E], added for choosing only, to what each expert's selection score is;
                without a gradient. Lossy: None chooses as the model learned.

        Returns:
            The routing of this device's tokens.
        """
        if token_mask_T is not None:
            # Also of the weight's gradient: what padding holds times a cotangent of 0 may be NaN.
            x_TD = jnp.where(token_mask_T[:, None], x_TD, jnp.zeros((), x_TD.dtype))
        logits_TE = self.logits(x_TD)
        bias_E = None if self.selection_bias_E is None else self.selection_bias_E[...]
        if bonus_E is not None:
            bonus_R = bonus_E if self.table_R is None else bonus_E[self.table_R[...]]
            bias_E = bonus_R if bias_E is None else bias_E + bonus_R
        routing = route(
            logits_TE,
            self.config.of_outputs,
            bias_E=bias_E,
            token_mask_T=token_mask_T,
            axes=axes,
            reach=reach,
        )
        if self.table_R is None:
            return routing
        experts_TK, scores_TK = redirect(routing.experts_TK, routing.scores_TK, self.table_R[...])
        counts_E = _count(experts_TK, self.config.num_experts)
        return replace(routing, experts_TK=experts_TK, scores_TK=scores_TK, counts_E=counts_E)

    def logits(self, x_TD: Float[Array, "T D"]) -> Float32[Array, "T E"]:
        """The outputs for tokens, float32; of merged experts [T, R]."""
        logits_TE = router_product(x_TD, self.w_DE[...])
        return logits_TE if self.b_E is None else logits_TE + self.b_E[...]
