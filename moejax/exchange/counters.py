"""What moves, counted: int32 rows of one layer on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
from jax import numpy as jnp

from moejax.exchange.budget import Budget
from moejax.exchange.plan import Plan
from sharding import collectives
from sharding.mesh import EXPERT

__all__ = ["ExchangeCounters", "count", "over_devices"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExchangeCounters:
    """Rows of this device in one layer's forward, one way; combine moves the same rows back.

    A row is one (token, destination device). The backward's counts are equal: it runs the same
    plan the other way round.

    rows_self: rows whose experts are on the device itself.
    rows_host: rows needed on another device of the same host.
    rows_network: rows needed on another host.
    rows_padding: rows that left the device though nobody needed them (empty places in buckets,
        or tokens that a ring carries past devices without their experts).
    waves: number of waves.
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
    plan: Plan, budget: Budget, dropped: jax.Array, hosts: Sequence[int] | None = None
) -> ExchangeCounters:
    """Counts a plan.

    Args:
        plan: this device's plan.
        budget: static sizes.
        dropped: int32 [].
        hosts: the host of each device along `expert`; None: all on one.
    """
    me = collectives.axis_index(EXPERT)
    host_G = jnp.asarray(list(hosts) if hosts is not None else [0] * budget.devices, jnp.int32)
    is_me_G = jnp.arange(budget.devices, dtype=jnp.int32) == me
    near_G = host_G == host_G[me]

    def total(mask_G: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_G, plan.rows_G, 0), dtype=jnp.int32)

    host, network = total(near_G & ~is_me_G), total(~near_G)
    return ExchangeCounters(
        rows_self=total(is_me_G),
        rows_host=host,
        rows_network=network,
        rows_padding=plan.num_waves * budget.moved_rows - host - network,
        waves=plan.num_waves,
        assignments=jnp.sum(plan.device_TK < budget.devices, dtype=jnp.int32),
        dropped=dropped,
    )


def over_devices(counters: ExchangeCounters, axes: str | Sequence[str]) -> ExchangeCounters:
    """Counters of all devices together: rows add up, waves are the largest.

    Args:
        counters: of one device; arrays of any shape.
        axes: mesh axes that tokens are split over.
    """
    summed = collectives.psum_statistics(counters, axes)
    return replace(summed, waves=collectives.pmax_statistics(counters.waves, axes))
