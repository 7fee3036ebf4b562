"""One wave in chunks of tokens: while a chunk is computed, the next one travels.

The chunks are written one after another as straight-line code,

    dispatch 0 │ dispatch 1, experts 0, combine 0 │ dispatch 2, experts 1, combine 1 │ …

where no chunk's experts wait for another chunk's, so that a compiler with asynchronous collectives
may run both at once. The rows of chunk i + 1 leave when those of chunk i are there: the links take
one after the other anyway, and collectives that wait for each other are not merged into one. So it
is on the way home. The backward is the same turned around, from the last chunk to the first.

XLA:GPU needs to be told what the experts cost to lay transfers around them: `sharding.schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from moejax.exchange.budget import Budget
from moejax.exchange.modes import Rows, combine, dispatch
from moejax.exchange.plan import Plan

__all__ = ["ExpertFn", "run_chunks"]

ExpertFn = Callable[[Rows, Any], jax.Array]
"""(rows received, weights of this device's slots) → one summed output per row [R, D];
of `PushedRows`, which the experts send themselves, the sums at home [T, D]."""


def run_chunks(
    x_TD: jax.Array,
    scores_TK: jax.Array,
    weights: Any,
    plans: Sequence[Plan],
    wave: jax.Array | int,
    budget: Budget,
    experts: ExpertFn,
) -> jax.Array:
    """The experts' weighted outputs for what travels in one wave.

    Args:
        x_TD: tokens of all chunks, in the dtype of the wire.
        scores_TK: float32.
        weights: pytree of this device's expert weights.
        plans: of each chunk.
        wave: int32 [].
        budget: static sizes of a chunk.
        experts: what runs on the rows between the two exchanges.

    Returns:
        float32 [T, D]; zero for tokens that do not travel in this wave.
    """
    chunks = len(plans)
    if chunks == 1:
        rows = dispatch(x_TD, scores_TK, plans[0], wave, budget)
        return combine(experts(rows, weights), rows, budget)
    pieces = list(zip(jnp.split(x_TD, chunks), jnp.split(scores_TK, chunks), strict=True))
    copies = _share(weights, chunks)
    rows = dispatch(*pieces[0], plans[0], wave, budget)
    outputs: list[jax.Array] = []
    for i in range(chunks):
        here = rows
        if i + 1 < chunks:
            x_TD, scores_TK = pieces[i + 1]
            x_TD, x_RD = lax.optimization_barrier((x_TD, rows.x_RD))
            here = replace(rows, x_RD=x_RD)
            rows = dispatch(x_TD, scores_TK, plans[i + 1], wave, budget)
        y_RD = experts(here, copies[i])
        if i:
            y_RD, outputs[-1] = lax.optimization_barrier((y_RD, outputs[-1]))
        outputs.append(combine(y_RD, here, budget))
    return jnp.concatenate(outputs)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _share(weights: Any, users: int) -> tuple[Any, ...]:
    """The same weights for several users, whose gradients are added up in float32."""
    return (weights,) * users


def _share_fwd(weights, users):
    return _share(weights, users), None


def _share_bwd(users, _, cts):
    del users

    def total(*terms):
        if terms[0].dtype == jax.dtypes.float0:
            return terms[0]
        return sum(t.astype(jnp.float32) for t in terms).astype(terms[0].dtype)

    return (jax.tree.map(total, *cts),)


_share.defvjp(_share_fwd, _share_bwd)
