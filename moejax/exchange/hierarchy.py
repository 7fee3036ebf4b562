"""Between hosts and inside them: a row crosses once to each host and is spread there.

An exchange of two levels, each an ordinary one. The outer one runs between the devices that have
the same place in their hosts, and its slots are those of a whole host. What stands for its experts
is the inner one: the rows that arrived are the tokens of an exchange between the devices of the
host, around the real experts. So outputs are summed inside the host before one row goes home, and
every wave of the outer exchange has waves of the inner one. How many is agreed upon beforehand from
counts that travel once, so that nothing waits for an agreement between the two levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax import numpy as jnp

from moejax.exchange.budget import Budget
from moejax.exchange.modes import Rows
from moejax.exchange.overlap import ExpertFn
from moejax.exchange.plan import Inside, Plan, rank_in_row
from moejax.exchange.plan import make_plans as plans_of_one_level
from moejax.exchange.waves import run_waves
from sharding import collectives
from sharding.mesh import TOKEN_AXES

__all__ = ["inside_hosts", "make_plans"]


def make_plans(slots_TK: jax.Array, budget: Budget, axes=TOKEN_AXES) -> tuple[Plan, ...]:
    """Plans the exchange of one layer, of both levels if there are two.

    Args:
        slots_TK: int32 physical slots, distinct within a token, −1 for none.
        budget: static sizes of a chunk.
        axes: mesh axes over which devices agree on the numbers of waves.

    Returns:
        a plan of each chunk of tokens; all have as many waves as the one that needs most.
    """
    plans = plans_of_one_level(slots_TK, budget, axes)
    if budget.inside is None:
        return plans
    chunks = jnp.split(slots_TK, budget.chunks)
    counts = [_arrivals(*pair, budget) for pair in zip(chunks, plans, strict=True)]
    waves_W = _waves_inside(counts, budget.inside, axes)
    host = collectives.axis_index(budget.axis)
    place = collectives.axis_index(budget.inside.axis)

    def inside(rows_HWL: jax.Array) -> Inside:
        rows_HL = jnp.sum(rows_HWL, axis=1, dtype=jnp.int32)
        return Inside(jnp.sum(rows_HL, axis=0, dtype=jnp.int32), rows_HL[host, place], waves_W)

    return tuple(
        replace(plan, inside=inside(rows)) for plan, (rows, _) in zip(plans, counts, strict=True)
    )


def inside_hosts(experts: ExpertFn, budget: Budget) -> ExpertFn:
    """What stands for the experts in an exchange: themselves, or with two levels the inner one.

    Args:
        experts: what runs on the rows of `budget.innermost`.
        budget: static sizes of the exchange.
    """
    inner = budget.inside
    if inner is None:
        return experts

    def spread(rows: Rows, weights: Any) -> jax.Array:
        there_RJ = (rows.ids_RJ >= 0) & (rows.ids_RJ < budget.slots)
        # All devices know the number of waves already: nothing is left to agree upon.
        (plan,) = plans_of_one_level(jnp.where(there_RJ, rows.ids_RJ, -1), inner, axes=())
        assert rows.waves_inside is not None
        plan = replace(plan, num_waves=rows.waves_inside)
        y_RD = run_waves(rows.x_RD, rows.scores_RJ, weights, (plan,), inner, experts)
        return y_RD.astype(rows.x_RD.dtype)

    return spread


def _arrivals(slots_TK: jax.Array, plan: Plan, budget: Budget) -> tuple[jax.Array, jax.Array]:
    """Rows and assignments that arrive here in each wave, for the host's devices: [H, W, L] each.

    H hosts from which they come, W the most waves there can be, L devices of a host.
    """
    hosts, inner, most = budget.devices, budget.innermost, budget.most_waves
    valid_TK = slots_TK >= 0
    device_TK = jnp.where(valid_TK, slots_TK // inner.slots, hosts * inner.devices)
    first_TK = valid_TK & (rank_in_row(device_TK, valid_TK) == 0)

    def table(counted_TK: jax.Array) -> jax.Array:
        zeros_WG = jnp.zeros((most, hosts * inner.devices), jnp.int32)
        where = (plan.wave_TK, device_TK)
        return zeros_WG.at[where].add(counted_TK.astype(jnp.int32), mode="drop")

    sent_2WG = jnp.stack([table(first_TK), table(valid_TK)])
    sent_H2WL = jnp.moveaxis(sent_2WG.reshape(2, most, hosts, inner.devices), 2, 0)
    rows_HWL, assignments_HWL = jnp.moveaxis(collectives.all_to_all(sent_H2WL, budget.axis), 1, 0)
    return rows_HWL, assignments_HWL


def _waves_inside(counts: Sequence[tuple[jax.Array, jax.Array]], inner: Budget, axes) -> jax.Array:
    """How many waves inside each wave between hosts needs, on any device; int32 [W]."""
    if inner.single_wave:
        return jnp.ones(counts[0][0].shape[1], jnp.int32)
    needed_NW = []
    for rows_HWL, assignments_HWL in counts:
        # As many as the last row to a device may need by the rule of `plan`: all others of its pair
        # are before it, and all assignments but one of its own.
        last_WL = jnp.maximum(jnp.sum(rows_HWL, axis=0, dtype=jnp.int32) - 1, 0) // inner.rows
        if inner.quota < inner.rows * inner.copies:
            before_WL = jnp.sum(assignments_HWL, axis=0, dtype=jnp.int32) - 1
            last_WL = last_WL + jnp.maximum(before_WL, 0) // inner.quota
        needed_NW.append(jnp.max(last_WL, axis=1) + 1)
    return collectives.pmax_statistics(jnp.max(jnp.stack(needed_NW), axis=0), axes)
