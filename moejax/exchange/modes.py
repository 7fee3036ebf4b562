"""The ways rows travel: `local`, `all_to_all` in buckets, a `ring`, and `remote` writes of rows.

Each has `dispatch` (tokens → rows on the experts' devices) and `combine` (rows → tokens, summed in
float32). Both are differentiable inside the shard_map; neither sends a row to a device twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from moejax.exchange.budget import Budget
from moejax.exchange.plan import Plan, select_wave
from moejax.exchange.remote import (
    Routes,
    collect_rows,
    make_pushed_rows,
    make_routes,
    spread_rows,
)
from moejax.exchange.wire import exchange_rows, gather_assignments, gather_tokens, return_rows
from pallas_kernels.fused_experts.remote import PushedRows
from pallas_kernels.row_map import RowMap, gather_rows, sum_rows
from sharding import collectives

__all__ = ["Rows", "combine", "dispatch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What a device computes in one wave.

    x_RD: activations of the rows that arrived; rows without an assignment hold anything, maybe nan.
    scores_RJ: float32 weights of a row's assignments.
    ids_RJ: int32 local slots, from 0 to S − 1; others for none.
    home: what the way back needs on the source: bucket rows of its tokens; None where rows are
        tokens.
    routes: which rows travel, where each is written to its place by itself; None elsewhere. Outputs
        of rows without an assignment are then never read, and their cotangents hold anything. With
        `PushedRows` the tokens [T, D] are still at home, and what the experts give are their sums.
    waves_inside: int32 [], waves in which the rows travel on inside a host; None where they do not.
    """

    x_RD: Float[Array, "R D"]
    scores_RJ: Float32[Array, "R J"]
    ids_RJ: Int32[Array, "R J"]
    home: RowMap | None
    routes: Routes | PushedRows | None = None
    waves_inside: Int32[Array, ""] | None = None


def dispatch(
    x_TD: Float[Array, "T D"],
    scores_TK: Float32[Array, "T K"],
    plan: Plan,
    wave: Int32[Array, ""] | int,
    budget: Budget,
) -> Rows:
    """Sends the tokens of one wave to the devices of their experts.

    Args:
        x_TD: this device's tokens, in the dtype of the wire.
        scores_TK: float32.
        plan: this device's plan.
        wave: int32 [].
        budget: static sizes and the mode.
    """
    match budget.mode:
        case "local":
            return Rows(x_TD, scores_TK, plan.slot_TK, None)
        case "ring":
            return _ring_dispatch(x_TD, scores_TK, plan, wave, budget)
        case "remote":
            return _remote_dispatch(x_TD, scores_TK, plan, wave, budget)
        case "all_to_all":
            return _bucket_dispatch(x_TD, scores_TK, plan, wave, budget)
    raise NotImplementedError(f"exchange mode {budget.mode!r}")


def combine(y_RD: Float[Array, "R D"], rows: Rows, budget: Budget) -> Float32[Array, "T D"]:
    """Brings the experts' outputs home.

    Args:
        y_RD: one summed output for each row received, in the dtype of the wire; with `PushedRows`
            they are home already, float32 [T, D].
        rows: what `dispatch` returned.
        budget: static sizes and the mode.

    Returns:
        float32 [T, D]; zero for tokens that did not travel in this wave.
    """
    if budget.mode == "local":
        return y_RD.astype(jnp.float32)
    if isinstance(rows.routes, PushedRows):
        return y_RD
    if rows.routes is not None:
        return collect_rows(y_RD, rows.routes, _whole_axis(budget), budget.wire)
    back_MD = return_rows(y_RD, budget.axis, budget.wire)
    if rows.home is None:
        # One after the other: a reduction may take any order.
        first_TD, *others = jnp.split(back_MD.astype(jnp.float32), budget.devices)
        return sum(others, start=first_TD)
    return sum_rows(back_MD, None, rows.home)


def _bucket_dispatch(x_TD, scores_TK, plan, wave, budget) -> Rows:
    chosen = select_wave(plan, wave, budget)
    rows_MD = gather_rows(x_TD, chosen.rows)
    scores_M = gather_rows(scores_TK.reshape(-1, 1), chosen.assignments)
    scores_MJ = scores_M.reshape(chosen.ids_MJ.shape)
    received = exchange_rows(rows_MD, scores_MJ, chosen.ids_MJ, budget.axis, budget.wire)
    return Rows(*received, home=chosen.rows, waves_inside=_waves_inside(plan, wave))


def _ring_dispatch(x_TD, scores_TK, plan, wave, budget) -> Rows:
    """All-gathers tokens; each device then picks the assignments that are its own."""
    _, scores_RK, ids_RK = _all_assignments(scores_TK, plan, wave, budget)
    x_RD = gather_tokens(x_TD, budget.axis, budget.wire)
    return Rows(x_RD, scores_RK, ids_RK, home=None, waves_inside=_waves_inside(plan, wave))


def _remote_dispatch(x_TD, scores_TK, plan, wave, budget) -> Rows:
    """As a ring; only rows with an assignment are written."""
    axis = _whole_axis(budget)
    target_TK, scores_RK, ids_RK = _all_assignments(scores_TK, plan, wave, budget)
    if budget.fused:
        pushed = make_pushed_rows(target_TK, ids_RK, budget)
        return Rows(x_TD, scores_RK, ids_RK, home=None, routes=pushed)
    routes = make_routes(target_TK, ids_RK, budget.slots, axis)
    x_RD = spread_rows(x_TD, routes, axis, budget.wire)
    # So that gradients of scores that nobody uses are selected: they may stem from anything.
    scores_RK = jnp.where(ids_RK < budget.slots, scores_RK, 0.0)
    return Rows(x_RD, scores_RK, ids_RK, home=None, routes=routes)


def _all_assignments(scores_TK, plan, wave, budget) -> tuple[jax.Array, ...]:
    """Physical slots of this device's assignments that travel, −1 for none.

    And of all devices' assignments the scores, and the slots here; S for none.
    """
    travels_TK = (plan.device_TK < budget.devices) & (plan.wave_TK == wave)
    target_TK = jnp.where(travels_TK, plan.device_TK * budget.slots + plan.slot_TK, -1)
    target_RK, scores_RK = gather_assignments(target_TK, scores_TK, budget.axis)
    mine_RK = target_RK - collectives.axis_index(budget.axis) * budget.slots
    ids_RK = jnp.where((target_RK >= 0) & (mine_RK >= 0), mine_RK, budget.slots)
    return target_TK, scores_RK, jnp.minimum(ids_RK, budget.slots)


def _whole_axis(budget: Budget) -> str:
    assert isinstance(budget.axis, str)  # `budget.choose` refuses groups
    return budget.axis


def _waves_inside(plan: Plan, wave: jax.Array | int) -> jax.Array | None:
    return None if plan.inside is None else plan.inside.waves_W[wave]
