"""Copies of experts made from their homes, and their gradients summed home.

Masters and moments stay at a static home (`home_slots`), so neither the optimizer nor a checkpoint
knows where experts are computed. A placement's slots are filled from there in every step, by the
waves of `moejax.placement.moves`; the transpose runs the same waves the other way.

The copies are values like others for the backward: with `remat="none"` those of every layer are
kept (S experts in the compute dtype), otherwise a layer's are fetched once more when it is
recomputed, so that only one layer's are there at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from moejax.placement.arrays import Placement, home_slots
from moejax.placement.moves import Moves, bucket_size, carry_home, carry_out, make_moves
from sharding import collectives
from sharding.mesh import EXPERT

__all__ = ["FetchTraffic", "fetch", "fetch_moves", "fetch_traffic"]


def fetch(banks: Any, placement: Placement, num_experts: int) -> Any:
    """This device's slots filled from the experts' homes; inside the shard_map.

    The gradient of a home expert is the float32 sum over its replicas, rounded once, in an order
    that the placement fixes. Integers (8-bit weights) get none.

    Args:
        banks: pytree of [S_home, …], this device's part of home banks.
        placement: one layer's placement.
        num_experts: E.

    Returns:
        pytree of [S, …]; empty slots are zero.
    """
    rows = {bank.shape[0] for bank in jax.tree.leaves(banks)}
    moves = fetch_moves(placement.slot_expert_P, num_experts)
    assert rows == {moves.rows}, f"home banks of {rows} rows where {moves.rows} lie at home"
    return _fetch(banks, moves)


def fetch_moves(slot_expert_P: jax.Array, num_experts: int) -> Moves:
    """How slots are filled from home, inside the shard_map.

    Args:
        slot_expert_P: int32 [G·S], −1 for an empty slot.
        num_experts: E.
    """
    devices = collectives.axis_size(EXPERT)
    home_E = jnp.asarray(home_slots(num_experts, devices))
    home_P = jnp.take(home_E, slot_expert_P, mode="clip")
    rows = -(-num_experts // devices)
    return make_moves(jnp.where(slot_expert_P >= 0, home_P, -1), rows)


@jax.custom_vjp
def _fetch(banks: Any, moves: Moves) -> Any:
    return carry_out(banks, moves)


def _fetch_fwd(banks: Any, moves: Moves) -> Any:
    return carry_out(banks, moves), moves


def _fetch_bwd(moves: Moves, cts: Any) -> Any:
    leaves, tree = jax.tree.flatten(cts)
    floats = [i for i, ct in enumerate(leaves) if jnp.issubdtype(ct.dtype, jnp.floating)]
    home = dict(zip(floats, carry_home([leaves[i] for i in floats], moves), strict=True))
    return jax.tree.unflatten(tree, [home.get(i) for i in range(len(leaves))]), None


_fetch.defvjp(_fetch_fwd, _fetch_bwd)


@dataclass(frozen=True)
class FetchTraffic:
    """What one fetch of a layer moves between devices, all of them together.

    sent: experts that a device needs and has not at home.
    waves: of the exchange.
    on_wire: experts that its buckets hold, padding included; as many in the backward.
    """

    sent: int
    waves: int
    on_wire: int


def fetch_traffic(slot_expert: np.ndarray, devices: int) -> FetchTraffic:
    """Counts what `fetch` moves for one layer's placement; a device sends `on_wire` / G.

    Args:
        slot_expert: int [G·S], −1 for an empty slot; every expert has a slot.
        devices: G.
    """
    slot_expert = np.asarray(slot_expert)
    num_experts, slots = int(slot_expert.max()) + 1, len(slot_expert) // devices
    home_E = home_slots(num_experts, devices) // -(-num_experts // devices)
    filled = np.flatnonzero(slot_expert >= 0)
    pairs = np.zeros((devices, devices), np.int64)  # [source, destination]
    np.add.at(pairs, (home_E[slot_expert[filled]], filled // slots), 1)
    np.fill_diagonal(pairs, 0)
    bucket = bucket_size(slots, devices)
    waves = -(-int(pairs.max()) // bucket)
    return FetchTraffic(int(pairs.sum()), waves, waves * bucket * devices * (devices - 1))
