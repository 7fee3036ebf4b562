"""Who sends what: from every assignment's slot to bucket rows and waves.

A token travels once to each device that holds one of its experts. Rows of a (source, device) pair
are ordered by token. A row's wave is

    (rows before it) // C  +  (assignments before it) // quota,

both counted within its pair: it never decreases along the pair, and within a wave both terms are
constant, so a wave holds at most C rows and quota + J − 1 assignments of a pair whatever the
routing. Where C rows cannot exceed the quota the second term is left out: both would grow at the
same row, and the wave between would be empty. Every source computes this alone; the devices only
agree on the number of waves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import jax
from jax import numpy as jnp

from moejax.exchange.budget import Budget
from pallas_kernels.row_map import RowMap
from sharding.collectives import pmax_statistics
from sharding.mesh import TOKEN_AXES

__all__ = ["Plan", "Wave", "make_plans", "rank_in_row", "select_wave"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """A source device's view of the exchange of one chunk of its tokens.

    device_TK: int32, destination of each assignment; G for none.
    slot_TK: int32, slot within that device; for none S, or −1 where there is one device.
    first_TK: bool, the assignment that carries the row of its (token, device).
    rank_TK: int32, index of the assignment within its row.
    position_TK: int32, position of its row within the (source, device) pair.
    wave_TK: int32.
    rows_G: int32, rows for each device, all waves.
    num_waves: int32 [], equal on all devices and in all chunks.
    inside: of an exchange between hosts: what becomes of its rows.
    """

    device_TK: jax.Array
    slot_TK: jax.Array
    first_TK: jax.Array
    rank_TK: jax.Array
    position_TK: jax.Array
    wave_TK: jax.Array
    rows_G: jax.Array
    num_waves: jax.Array
    inside: Inside | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inside:
    """How this device spreads the rows of other hosts, and its own, inside its host.

    rows_L: int32, rows for each device of the host, from all sources, all waves.
    own: int32 [], how many rows of this device's tokens are for itself.
    waves_W: int32, waves inside for each wave between hosts, as long as there can be any; equal on
        all devices and in all chunks.
    """

    rows_L: jax.Array
    own: jax.Array
    waves_W: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Wave:
    """What one wave of a source sends.

    rows: tokens [T] with K copies ↔ the G·C bucket rows.
    assignments: assignments [T·K] ↔ the G·C·J places for them in those rows.
    ids_MJ: int32 [G·C, J], local slot of each place; S for none.
    """

    rows: RowMap
    assignments: RowMap
    ids_MJ: jax.Array


def make_plans(slots_TK: jax.Array, budget: Budget, axes=TOKEN_AXES) -> tuple[Plan, ...]:
    """Plans the exchange of one layer.

    Args:
        slots_TK: int32 physical slots, distinct within a token, −1 for none.
        budget: static sizes of a chunk.
        axes: mesh axes over which devices agree on the number of waves.

    Returns:
        a plan of each chunk of tokens; all have as many waves as the one that needs most.
    """
    slots_NTK = slots_TK.reshape(budget.chunks, -1, slots_TK.shape[1])
    plans = jax.vmap(partial(_plan_alone, budget=budget))(slots_NTK)
    if budget.single_wave:
        num_waves = jnp.ones((), jnp.int32)
    else:
        num_waves = pmax_statistics(jnp.max(plans.num_waves), axes)
    return tuple(
        replace(jax.tree.map(itemgetter(i), plans), num_waves=num_waves)
        for i in range(budget.chunks)
    )


def rank_in_row(device_TK: jax.Array, valid_TK: jax.Array) -> jax.Array:
    """How many of a token's assignments before this one go to the same device; 0 for none."""
    top_k = device_TK.shape[1]
    same_TKK = (device_TK[:, :, None] == device_TK[:, None, :]) & valid_TK[:, :, None]
    earlier_KK = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    return jnp.sum(same_TKK & earlier_KK, axis=-1, dtype=jnp.int32)


def _plan_alone(slots_TK: jax.Array, budget: Budget) -> Plan:
    """A chunk's plan, with the number of waves that this device needs for it."""
    devices, slots = budget.devices, budget.slots
    valid_TK = slots_TK >= 0
    device_TK = jnp.where(valid_TK, slots_TK // slots, devices)
    slot_TK = slots_TK  # of the only device; otherwise:
    if devices > 1:
        slot_TK = jnp.where(valid_TK, slots_TK % slots, slots)

    rank_TK = rank_in_row(device_TK, valid_TK)
    first_TK = valid_TK & (rank_TK == 0)

    assigned_TG = jnp.sum(jax.nn.one_hot(device_TK, devices, dtype=jnp.int32), axis=1)
    goes_TG = (assigned_TG > 0).astype(jnp.int32)
    position_TG = jnp.cumsum(goes_TG, axis=0) - goes_TG
    before_TG = jnp.cumsum(assigned_TG, axis=0) - assigned_TG
    wave_TG = position_TG // budget.rows
    if budget.quota < budget.rows * budget.copies:  # else full buckets stay within the quota
        wave_TG = wave_TG + before_TG // budget.quota

    safe_TK = jnp.minimum(device_TK, devices - 1)
    position_TK = jnp.take_along_axis(position_TG, safe_TK, axis=1)
    wave_TK = jnp.where(valid_TK, jnp.take_along_axis(wave_TG, safe_TK, axis=1), 0)
    num_waves = jnp.max(wave_TK, initial=0) + 1
    rows_G = jnp.sum(goes_TG, axis=0, dtype=jnp.int32)
    return Plan(device_TK, slot_TK, first_TK, rank_TK, position_TK, wave_TK, rows_G, num_waves)


def _row_in_bucket(plan: Plan, wave: jax.Array | int, budget: Budget) -> tuple:
    """Whether an assignment travels in this wave, and its row's place in the bucket."""
    valid_TK = plan.device_TK < budget.devices
    first_G = jnp.zeros((budget.devices,), jnp.int32)
    if not budget.single_wave:
        earlier_TK = plan.first_TK & (plan.wave_TK < wave)
        first_G = first_G.at[plan.device_TK].add(earlier_TK.astype(jnp.int32), mode="drop")
    place_TK = plan.position_TK - first_G[jnp.minimum(plan.device_TK, budget.devices - 1)]
    return valid_TK & (plan.wave_TK == wave), place_TK


def select_wave(plan: Plan, wave: jax.Array | int, budget: Budget) -> Wave:
    """The bucket rows of one wave.

    Args:
        plan: the source's plan.
        wave: int32 [], 0 ≤ wave < num_waves.
        budget: static sizes.
    """
    num_rows, copies = budget.received_rows, budget.copies
    travels_TK, place_TK = _row_in_bucket(plan, wave, budget)
    row_TK = jnp.where(travels_TK, plan.device_TK * budget.rows + place_TK, num_rows)
    rows = RowMap.from_rows(jnp.where(plan.first_TK, row_TK, num_rows), num_rows)
    spot_TK = jnp.where(travels_TK, row_TK * copies + plan.rank_TK, num_rows * copies)
    assignments = RowMap.from_rows(spot_TK.reshape(-1, 1), num_rows * copies)
    ids = plan.slot_TK.reshape(-1).at[assignments.copy_M].get(mode="fill", fill_value=budget.slots)
    return Wave(rows, assignments, ids.reshape(num_rows, copies))
