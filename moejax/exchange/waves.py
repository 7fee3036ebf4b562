"""Dispatch → experts → combine, in as many waves as the routing needs.

The first wave is straight-line code and keeps residuals like anything else. What did not fit goes
in further waves, a `while_loop` whose trip count depends on the routing; a loop like that has no
reverse mode, so all further waves share one custom VJP whose backward recomputes them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32

from moejax.exchange.budget import Budget
from moejax.exchange.modes import Rows, combine, dispatch
from moejax.exchange.plan import Plan

__all__ = ["run_waves"]

ExpertFn = Callable[[Rows, Any], jax.Array]
"""(rows received, weights of this device's slots) → one summed output per row [R, D]."""


def run_waves(
    x_TD: Float[Array, "T D"],
    scores_TK: Float32[Array, "T K"],
    weights: Any,
    plan: Plan,
    budget: Budget,
    experts: ExpertFn,
) -> Float32[Array, "T D"]:
    """The experts' weighted outputs for every token.

    Args:
        x_TD: tokens, in the dtype of the wire.
        scores_TK: float32.
        weights: pytree of this device's expert weights.
        plan: from `make_plan`.
        budget: static sizes.
        experts: what runs on the rows between the two exchanges.

    Returns:
        float32 [T, D].
    """
    y_TD = _wave(x_TD, scores_TK, weights, plan, 0, budget, experts)
    if budget.single_wave:
        return y_TD
    return y_TD + _further(x_TD, scores_TK, weights, plan, budget, experts)


def _wave(x_TD, scores_TK, weights, plan, wave, budget, experts) -> jax.Array:
    rows = dispatch(x_TD, scores_TK, plan, wave, budget)
    return combine(experts(rows, weights), rows, budget)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _further(x_TD, scores_TK, weights, plan, budget, experts):
    def body(carry):
        wave, y_TD = carry
        return wave + 1, y_TD + _wave(x_TD, scores_TK, weights, plan, wave, budget, experts)

    start = (jnp.ones((), jnp.int32), jnp.zeros(x_TD.shape, jnp.float32))
    return lax.while_loop(lambda carry: carry[0] < plan.num_waves, body, start)[1]


def _further_fwd(x_TD, scores_TK, weights, plan, budget, experts):
    residuals = (x_TD, scores_TK, weights, plan)
    return _further(x_TD, scores_TK, weights, plan, budget, experts), residuals


def _further_bwd(budget, experts, residuals, ct_TD):
    x_TD, scores_TK, weights, plan = residuals
    inputs = (x_TD, scores_TK, weights)

    def body(carry):
        wave, sums = carry
        _, pull = jax.vjp(lambda x, s, w: _wave(x, s, w, plan, wave, budget, experts), *inputs)
        return wave + 1, jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, pull(ct_TD))

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), inputs)
    start = (jnp.ones((), jnp.int32), zeros)
    sums = lax.while_loop(lambda carry: carry[0] < plan.num_waves, body, start)[1]
    grads = jax.tree.map(lambda s, a: s.astype(a.dtype), sums, inputs)
    return (*grads, None)


_further.defvjp(_further_fwd, _further_bwd)
