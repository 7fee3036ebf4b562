"""What moves, counted: int32 rows of one layer on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
from jax import numpy as jnp

from moejax.exchange.budget import Budget
from moejax.exchange.plan import Plan
from sharding import collectives

__all__ = ["ExchangeCounters", "count", "over_devices"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExchangeCounters:
    """Rows of this device in one layer's forward, one way; combine moves the same rows back.

    A row is one (token, destination device). The backward's counts are equal: it runs the same
    plan the other way round. With two levels (`moejax.exchange.hierarchy`) a row between hosts is
    one (token, destination host), and what arrived is spread inside by rows of its own.

    rows_self: rows whose experts are on the device itself.
    rows_host: rows needed on another device of the same host; with two levels those which this
        device spreads in its host, of tokens from everywhere.
    rows_network: rows needed on another host.
    rows_padding: rows that left the device though nobody needed them (empty places in buckets,
        or tokens that a ring carries past devices without their experts); 0 in mode `remote`, whose
        kernel sends no others (XLA's all-to-all in its place does, and a dry run counts them).
    waves: how often the experts run for one chunk: waves, or those inside all waves between hosts.
    assignments: (token, expert) pairs routed from here, after drops.
    dropped: assignments dropped by a capacity; 0 unless one is asked for.
    """

    rows_self: jax.Array
    rows_host: jax.Array
    rows_network: jax.Array
    rows_padding: jax.Array
    waves: jax.Array
    assignments: jax.Array
    dropped: jax.Array


def count(
    plans: Sequence[Plan],
    budget: Budget,
    dropped: jax.Array,
    hosts: Sequence[int] | None = None,
) -> ExchangeCounters:
    """Counts this device's plans.

    Args:
        plans: of each chunk.
        budget: static sizes.
        dropped: int32 [].
        hosts: the host of each device along `expert`; None: all on one. With two levels the budget
            says which devices share one.
    """
    here, host, network, waves, moved = (
        _one_level(plans, budget, hosts) if budget.inside is None else _two_levels(plans, budget)
    )
    needed = host + network
    padding = len(plans) * moved - needed if budget.mode != "remote" else jnp.zeros_like(needed)
    return ExchangeCounters(
        rows_self=here,
        rows_host=host,
        rows_network=network,
        rows_padding=padding,
        waves=waves,
        assignments=jnp.sum(
            jnp.stack([plan.device_TK for plan in plans]) < budget.devices, dtype=jnp.int32
        ),
        dropped=dropped,
    )


def _one_level(
    plans: Sequence[Plan], budget: Budget, hosts: Sequence[int] | None
) -> tuple[jax.Array, ...]:
    """Rows for the device itself, its host, other hosts; waves, and rows moved for one chunk."""
    me = collectives.axis_index(budget.axis)
    host_G = jnp.asarray(list(hosts) if hosts is not None else [0] * budget.devices, jnp.int32)
    is_me_G = jnp.arange(budget.devices, dtype=jnp.int32) == me
    near_G = host_G == host_G[me]
    rows_G = jnp.sum(jnp.stack([plan.rows_G for plan in plans]), axis=0)
    waves = plans[0].num_waves
    here, host = _total(rows_G, is_me_G), _total(rows_G, near_G & ~is_me_G)
    return here, host, _total(rows_G, ~near_G), waves, waves * budget.moved_rows


def _two_levels(plans: Sequence[Plan], budget: Budget) -> tuple[jax.Array, ...]:
    """As `_one_level`; rows inside the host are those that this device spreads."""
    inner, insides = budget.innermost, [plan.inside for plan in plans if plan.inside is not None]
    rows_H = jnp.sum(jnp.stack([plan.rows_G for plan in plans]), axis=0)
    rows_L = jnp.sum(jnp.stack([inside.rows_L for inside in insides]), axis=0)
    away_H = jnp.arange(budget.devices, dtype=jnp.int32) != collectives.axis_index(budget.axis)
    away_L = jnp.arange(inner.devices, dtype=jnp.int32) != collectives.axis_index(inner.axis)
    waves_W = insides[0].waves_W
    between = plans[0].num_waves
    waves = _total(waves_W, jnp.arange(waves_W.size, dtype=jnp.int32) < between)
    here = jnp.sum(jnp.stack([inside.own for inside in insides]), dtype=jnp.int32)
    moved = between * budget.moved_rows + waves * inner.moved_rows
    return here, _total(rows_L, away_L), _total(rows_H, away_H), waves, moved


def _total(rows_G: jax.Array, mask_G: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask_G, rows_G, 0), dtype=jnp.int32)


def over_devices(counters: ExchangeCounters, axes: str | Sequence[str]) -> ExchangeCounters:
    """Counters of all devices together: rows add up, waves are the largest.

    Args:
        counters: of one device; arrays of any shape.
        axes: mesh axes that tokens are split over.
    """
    summed = collectives.psum_statistics(counters, axes)
    return replace(summed, waves=collectives.pmax_statistics(counters.waves, axes))
