"""The choice of experts where it is to know how far they are, and what that costs in scores.

Shape letters: T tokens of this device, E experts, K experts of a token, G devices along `expert`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from moejax.config import RouterConfig
from moejax.routing.choice import choose_experts, keep_best_groups, selection_scores
from moejax.routing.locality import Reach, log_scale, scaled_selection
from moejax.routing.two_stage import stay_near
from pallas_kernels.route.api import top_k

__all__ = ["Near", "choose_near", "mass_kept"]


@dataclass(frozen=True)
class Near:
    """Experts chosen by their scores and by how far they are.

    experts_TK: int32 [T, K], distinct within a token, by descending score.
    scores_TK: float32 [T, K], before `scaling_factor`.
    devices_TG: bool [T, G], the devices whose copies may be used; None: all.
    """

    experts_TK: Int32[Array, "T K"]
    scores_TK: Float32[Array, "T K"]
    devices_TG: Bool[Array, "T G"] | None


def choose_near(
    logits_TE: Float32[Array, "T E"],
    config: RouterConfig,
    reach: Reach,
    bias_E: Float32[Array, " E"] | None,
    *,
    log_scores_TE: Float32[Array, "T E"],
    probs_TE: Float32[Array, "T E"],
) -> Near:
    """Chooses: scaled scores, then groups, local experts, hosts, devices, then the K best.

    Args:
        logits_TE: float32 [T, E].
        config: of the router, without `forced_balance`.
        reach: where experts are.
        bias_E: float32 [E], added for choosing only; None for no bias.
        log_scores_TE, probs_TE: float32 [T, E], logarithms of the scores, up to a constant for
            each token, and the scores normalised.
    """
    select_TE = scaled_selection(logits_TE, config, reach.config, reach.distance_E, bias_E)
    select_TE = keep_best_groups(select_TE, config)
    select_TE, devices_TG = stay_near(select_TE, logits_TE, config, reach)
    renormalize = config.renormalize or config.score_function == "topk_softmax"
    values_TE = log_scores_TE if renormalize else probs_TE
    if config.score_function == "sigmoid" and not renormalize:
        values_TE = jax.nn.sigmoid(logits_TE)
    if reach.config.weights == "scaled" and reach.config.scales:
        scale_E = log_scale(reach.config, reach.distance_E)
        values_TE = values_TE + scale_E if renormalize else values_TE * jnp.exp(scale_E)
    ids_TK, scores_TK = top_k(select_TE, config.top_k, values_TE=values_TE, softmax=renormalize)
    return Near(ids_TK, scores_TK, devices_TG)


def mass_kept(
    logits_TE: Float32[Array, "T E"],
    probs_TE: Float32[Array, "T E"],
    experts_TK: Int32[Array, "T K"],
    config: RouterConfig,
    bias_E: Float32[Array, " E"] | None,
) -> Float32[Array, " T"]:
    """A token's plain probability on its experts over that on those of the plain choice.

    The plain choice has groups and bias, too, so what is lost is lost to locality. At most 1: a
    choice by a bias may lose probability that another gains.

    Args:
        logits_TE: float32 [T, E].
        probs_TE: float32 [T, E], normalised scores.
        experts_TK: int32 [T, K], those of `choose_near`.
        config: of the router.
        bias_E: float32 [E] or None.

    Returns:
        float32 [T], without gradient.
    """
    probs_TE = lax.stop_gradient(probs_TE)
    plain_TE = selection_scores(logits_TE, config, bias_E)
    _, best_TK = choose_experts(plain_TE, probs_TE, config, softmax=False)
    best_T = jnp.sum(best_TK, axis=-1)
    rows = jnp.arange(experts_TK.shape[0], dtype=jnp.int32)[:, None]
    kept_T = jnp.sum(probs_TE[rows, experts_TK], axis=-1)
    return jnp.where(best_T > kept_T, kept_T / jnp.where(best_T > 0, best_T, 1.0), 1.0)
