"""Optional capacity: an expert keeps a bounded number of assignments and drops the rest.

Lossy, off by default, counted. Each source keeps a share of an over-full expert proportional to
what it sends, and within a source the highest scores stay, so that no source device and no
position in the batch is favoured (the rule that keeps the first to come favours low ranks).
"""

from __future__ import annotations

import math

import jax
from jax import lax
from jax import numpy as jnp

from sharding import collectives
from sharding.mesh import EXPERT

__all__ = ["drop_over_capacity", "expert_capacity"]


def expert_capacity(factor: float, tokens: int, top_k: int, num_experts: int, devices: int) -> int:
    """Assignments an expert keeps from the tokens of all its sources.

    Args:
        factor: multiple of the even share (arXiv 2101.03961 §2.2).
        tokens: T, tokens of one device.
        top_k: K.
        num_experts: E.
        devices: G, sources of an expert.
    """
    return max(1, math.ceil(factor * tokens * devices * top_k / num_experts))


def _shares(counts_GE: jax.Array, capacity: int) -> jax.Array:
    """Splits each expert's capacity over the sources in proportion, to within one; int32 [G, E].

    Cumulated shares are rounded, so that they add up to the capacity; who gains by rounding
    rotates with the expert.
    """
    devices, num_experts = counts_GE.shape
    order_GE = (
        jnp.arange(devices, dtype=jnp.int32)[:, None]
        + jnp.arange(num_experts, dtype=jnp.int32)[None, :]
    ) % devices
    rotated_GE = jnp.take_along_axis(counts_GE, order_GE, axis=0)
    total_E = jnp.sum(counts_GE, axis=0)
    kept_E = jnp.minimum(total_E, capacity)
    upto_GE = _floor_ratio(jnp.cumsum(rotated_GE, axis=0), kept_E, jnp.maximum(total_E, 1))
    share_GE = jnp.diff(upto_GE, axis=0, prepend=jnp.zeros((1, num_experts), jnp.int32))
    inverse_GE = jnp.argsort(order_GE, axis=0)
    return jnp.take_along_axis(share_GE, inverse_GE, axis=0)


def _floor_ratio(part: jax.Array, kept: jax.Array, total: jax.Array) -> jax.Array:
    """floor(part · kept / total), exact for part, kept ≤ total, though the product may overflow.

    Float32 comes within a few of it; what is left over is small, so int32 that wraps around holds
    it exactly.
    """
    wide = part.astype(jnp.float32) * (kept.astype(jnp.float32) / total.astype(jnp.float32))
    guess = jnp.floor(wide).astype(jnp.int32)
    return guess + (part * kept - guess * total) // total


def drop_over_capacity(
    experts_TK: jax.Array, scores_TK: jax.Array, num_experts: int, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Removes assignments that their expert has no room for.

    Args:
        experts_TK: int32 logical experts; −1 for none.
        scores_TK: float32.
        num_experts: E.
        capacity: assignments an expert keeps from all sources along `expert`.

    Returns:
        experts with −1 where dropped, and the number dropped here, int32 [].
    """
    shape = experts_TK.shape
    expert_A = jnp.where(experts_TK >= 0, experts_TK, num_experts).reshape(-1)
    counts_E = jnp.zeros((num_experts,), jnp.int32).at[expert_A].add(1, mode="drop")
    counts_GE = collectives.all_gather(counts_E[None], EXPERT)
    share_E = _shares(counts_GE, capacity)[collectives.axis_index(EXPERT)]

    index_A = jnp.arange(expert_A.size, dtype=jnp.int32)
    score_A = lax.stop_gradient(scores_TK).reshape(-1)
    sorted_expert, _, sorted_index = lax.sort((expert_A, -score_A, index_A), num_keys=2)
    start_E = jnp.cumsum(counts_E) - counts_E
    room_A = jnp.append(share_E, 0)[sorted_expert]
    rank_A = index_A - jnp.append(start_E, 0)[sorted_expert]
    keep_A = jnp.zeros_like(expert_A, bool).at[sorted_index].set(rank_A < room_A)
    keep_TK = keep_A.reshape(shape)
    dropped = jnp.sum((experts_TK >= 0) & ~keep_TK, dtype=jnp.int32)
    return jnp.where(keep_TK, experts_TK, -1), dropped
