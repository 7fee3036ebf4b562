"""A router that chooses groups of experts, made of one that chooses experts.

Shape letters as in `moejax.compress.experts`; G groups of M members each.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Float32, Float64, Int
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax

from moejax.compress.experts import LayerRouter, Sample
from moejax.config import RouterConfig
from moejax.errors import UserError
from moejax.routing.router import route

__all__ = ["GroupRouter", "group_router", "rerouted"]

GroupRouter = Literal["mean", "fit"]

_STEPS = 200  # of the fit; 60 to 150 are needed
_RIDGE = 1.0  # tokens that the start counts for


def group_router(
    router: LayerRouter,
    groups_GM: Int[np.ndarray, "G M"],
    sample: Sample,
    config: RouterConfig,
    how: GroupRouter = "fit",
) -> LayerRouter:
    """A router with a column for each group.

    `mean` takes the mean of the members' columns and biases. `fit` begins there and minimises, by
    L-BFGS on the sample, the cross entropy of what the router says of the groups with the sums of
    their members' probabilities; of sigmoids, which stand each for itself, with the means. Fitted
    to the scores of those members alone that a token had chosen, the packaged model lost more.

    Selection biases are added to what is compared: to probabilities, of which a group has the sum,
    the sum of its members'; to sigmoids and logits the mean.

    Args:
        router: of the experts.
        groups_GM: every expert once.
        sample: tokens with the experts that they chose.
        config: of the router before.
        how: what the columns are.

    Raises:
        UserError: `how` is none of these.
    """
    if how not in get_args(GroupRouter):
        raise UserError(f"how={how!r}: choose one of {', '.join(get_args(GroupRouter))}")
    bias_E = router.selection_bias_E
    if bias_E is not None:
        bias_GM = bias_E[groups_GM]
        bias_E = bias_GM.sum(1) if config.score_function == "softmax" else bias_GM.mean(1)
        bias_E = bias_E.astype(np.float32)
    start = LayerRouter(
        router.w_DE[:, groups_GM].mean(2),
        None if router.b_E is None else router.b_E[groups_GM].mean(1),
        bias_E,
    )
    if how == "mean":
        return start
    sigmoid = config.score_function == "sigmoid"
    if sigmoid:
        target_TG = expit(_logits(router, sample))[:, groups_GM].mean(2)
    else:
        target_TG = softmax(_logits(router, sample), axis=1)[:, groups_GM].sum(2)
    return _fitted(start, sample.x_TD, target_TG.astype(np.float32), sigmoid)


def _logits(router: LayerRouter, sample: Sample) -> Float32[np.ndarray, "T E"]:
    logits_TE = sample.x_TD @ router.w_DE
    return logits_TE if router.b_E is None else logits_TE + router.b_E


def _fitted(
    start: LayerRouter,
    x_TD: Float32[np.ndarray, "T D"],
    target_TG: Float32[np.ndarray, "T G"],
    sigmoid: bool,
) -> LayerRouter:
    """The columns of least cross entropy, held to the start by about a token's weight."""
    T, D = x_TD.shape
    biased = start.b_E is not None
    if biased:
        x_TD = np.concatenate([x_TD, np.ones((T, 1), np.float32)], 1)
    begin_FG = start.w_DE if start.b_E is None else np.concatenate([start.w_DE, start.b_E[None]])
    begin_FG = begin_FG.astype(np.float64)
    weight_F1 = _RIDGE * np.square(x_TD).mean(0, dtype=np.float64)[:, None]

    def cost(flat: Float64[np.ndarray, " F*G"]) -> tuple[float, Float64[np.ndarray, " F*G"]]:
        w_FG = flat.reshape(begin_FG.shape)
        logits_TG = x_TD @ w_FG.astype(np.float32)
        if sigmoid:
            # −q·log σ(l) − (1 − q)·log σ(−l) is softplus(l) − q·l.
            loss = np.logaddexp(0, logits_TG).sum(dtype=np.float64)
            loss -= (target_TG * logits_TG).sum(dtype=np.float64)
            slope_TG = expit(logits_TG)
        else:
            log_TG = log_softmax(logits_TG, axis=1)
            loss = -(target_TG * log_TG).sum(dtype=np.float64)
            slope_TG = np.exp(log_TG) * target_TG.sum(1, keepdims=True)
        slope_TG -= target_TG
        away_FG = w_FG - begin_FG
        loss += 0.5 * (weight_F1 * away_FG**2).sum()
        gradient_FG = x_TD.T @ slope_TG + weight_F1 * away_FG
        return float(loss) / T, gradient_FG.ravel() / T

    found = minimize(
        cost, begin_FG.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}
    )
    w_FG = found.x.reshape(begin_FG.shape).astype(np.float32)
    return LayerRouter(w_FG[:D], w_FG[D] if biased else None, start.selection_bias_E)


def rerouted(router: LayerRouter, x_TD: Float32[np.ndarray, "T D"], config: RouterConfig) -> Sample:
    """The tokens with what they choose by a router.

    Args:
        router: with a column for each of `config.num_experts`.
        x_TD: tokens.
        config: of that router.
    """
    logits_TE = x_TD @ router.w_DE
    if router.b_E is not None:
        logits_TE = logits_TE + router.b_E
    routing = _route(config)(logits_TE, router.selection_bias_E)
    return Sample(x_TD, *(np.asarray(array) for array in jax.device_get(routing)))


@cache
def _route(config: RouterConfig) -> Any:
    """Logits and selection biases to experts and scores, compiled."""

    @jax.jit
    def run(logits_TE: Any, bias_E: Any) -> Any:
        routing = route(logits_TE, config, bias_E=bias_E, axes=())
        return routing.experts_TK, routing.scores_TK

    return run
