"""Dispatch → experts → combine, in as many waves as the routing needs.

The first wave is straight-line code and keeps residuals like anything else. What did not fit goes
in further waves, a `while_loop` whose trip count depends on the routing; a loop like that has no
reverse mode, so all further waves share one custom VJP whose backward recomputes them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32

from moejax.exchange.budget import Budget
from moejax.exchange.overlap import ExpertFn, run_chunks
from moejax.exchange.plan import Plan

__all__ = ["run_waves"]


def run_waves(
    x_TD: Float[Array, "T D"],
    scores_TK: Float32[Array, "T K"],
    weights: Any,
    plans: Sequence[Plan],
    budget: Budget,
    experts: ExpertFn,
) -> Float32[Array, "T D"]:
    """The experts' weighted outputs for every token.

    Args:
        x_TD: tokens, in the dtype of the wire.
        scores_TK: float32.
        weights: pytree of this device's expert weights.
        plans: from `make_plans`.
        budget: static sizes.
        experts: what runs on the rows between the two exchanges.

    Returns:
        float32 [T, D].
    """
    plans = tuple(plans)
    y_TD = run_chunks(x_TD, scores_TK, weights, plans, 0, budget, experts)
    if budget.single_wave:
        return y_TD
    return _further(y_TD, x_TD, scores_TK, weights, plans, budget, experts)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _further(y_TD, x_TD, scores_TK, weights, plans, budget, experts):
    def body(carry):
        wave, y_TD = carry
        return wave + 1, y_TD + run_chunks(x_TD, scores_TK, weights, plans, wave, budget, experts)

    start = (jnp.ones((), jnp.int32), y_TD)
    return lax.while_loop(lambda carry: carry[0] < plans[0].num_waves, body, start)[1]


def _further_fwd(y_TD, x_TD, scores_TK, weights, plans, budget, experts):
    residuals = (x_TD, scores_TK, weights, plans)
    return _further(y_TD, *residuals, budget, experts), residuals


def _further_bwd(budget, experts, residuals, ct_TD):
    x_TD, scores_TK, weights, plans = residuals
    inputs = (x_TD, scores_TK, weights)

    def body(carry):
        wave, sums = carry
        one = partial(run_chunks, plans=plans, wave=wave, budget=budget, experts=experts)
        _, pull = jax.vjp(one, *inputs)
        return wave + 1, jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, pull(ct_TD))

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), inputs)
    start = (jnp.ones((), jnp.int32), zeros)
    sums = lax.while_loop(lambda carry: carry[0] < plans[0].num_waves, body, start)[1]
    grads = jax.tree.map(lambda s, a: s.astype(a.dtype), sums, inputs)
    return (ct_TD, *grads, None)


_further.defvjp(_further_fwd, _further_bwd)
