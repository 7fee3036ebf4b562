"""Which replica serves each assignment: the nearest, corrected so that no device is overloaded.

Runs in jit, inside the shard_map. Integers only, so that all devices agree and every run gives the
same. `choice_reference` is the same in numpy.

Shape letters: T tokens of this device, K choices, E experts, R most replicas of an expert, G
devices along `expert`, S slots of a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Int32

from moejax.placement.arrays import Placement
from pallas_kernels.balance.api import settle
from pallas_kernels.balance.reference import part_of
from sharding import collectives
from sharding.mesh import EXPERT

__all__ = ["LOAD_PERCENT", "ROUNDS", "place"]

LOAD_PERCENT = 105  # a device with more of the mean load gives some away, if it can
ROUNDS = 8  # in which that is settled; of random instances that have a solution, 98 % need 6
FEW = 32
"""Assignments of a slot, on average, below which loads stay as they are.

The experts of so few rows take as long as their weights take to be read (about 200 rows in bfloat16
at 600 TFLOP/s and 3 TB/s), so that there is nothing to gain, and what is done for it, with a sum
over all devices, is in the way of every decoding step.
"""


@dataclass(frozen=True)
class _Options:
    """What there is to choose from.

    expert_TK: int32, 0 for none.
    valid_TK: bool, whether there is an assignment.
    device_TKR: int32, the devices with a replica, −1 past their number and for those that the
        token may not use.
    count_TK: int32, replicas that it may use.
    movable_TK: bool, whether the load's correction may choose; with `devices_TG` not where there
        is one replica to use.
    host_G: int32, the host of each device, or None: all on one.
    me: int32 [], this device.
    """

    expert_TK: jax.Array
    valid_TK: jax.Array
    device_TKR: jax.Array
    count_TK: jax.Array
    movable_TK: jax.Array
    host_G: jax.Array | None
    me: jax.Array


def place(
    experts_TK: Int32[Array, "T K"],
    placement: Placement,
    slots_per_device: int,
    hosts: Sequence[int] | None = None,
    devices_TG: Bool[Array, "T G"] | None = None,
    *,
    few: int = FEW,
) -> Int32[Array, "T K"]:
    """Chooses a physical slot for every assignment.

    The replica on this device; else one on a device that the token goes to anyway; else one in a
    host that it goes to anyway; else where most of its other experts could join, dealt in turn
    among equals. Then devices above `LOAD_PERCENT` of the batch's mean load hand assignments to
    other replicas, as far as these can take them, first those that cost no further row.
    The batch is that of all devices along `expert`; sums over them are all that travels.
    With one replica of each expert (R = 1) this is a table look-up; of small batches (`few`) the
    loads do not matter.

    Args:
        experts_TK: int32 logical experts, distinct within a token, −1 for none.
        placement: one layer's placement.
        slots_per_device: S.
        hosts: the host of each device; None: all on one.
        devices_TG: bool, the devices that a token may use, with a replica of each of its experts;
            None: all. Loads are corrected as far as these allow.
        few: loads are left as they are where a slot has fewer assignments on average, T·K / S.

    Returns:
        int32 [T, K] physical slots, −1 for none.
    """
    num_experts, replicas = placement.replica_slots_ER.shape
    valid_TK = experts_TK >= 0
    expert_TK = jnp.clip(experts_TK, 0, num_experts - 1)
    slot_TKR = placement.replica_slots_ER[expert_TK]
    if replicas == 1:
        return jnp.where(valid_TK, slot_TKR[..., 0], -1)
    count_TK = placement.replica_count_E[expert_TK]
    real_TKR = jnp.arange(replicas, dtype=jnp.int32) < count_TK[..., None]
    device_TKR = jnp.where(real_TKR & valid_TK[..., None], slot_TKR // slots_per_device, -1)
    movable_TK = valid_TK
    if devices_TG is not None:
        rows = jnp.arange(experts_TK.shape[0], dtype=jnp.int32)[:, None, None]
        usable_TKR = (device_TKR >= 0) & devices_TG[rows, jnp.maximum(device_TKR, 0)]
        device_TKR = jnp.where(usable_TKR, device_TKR, -1)
        count_TK = jnp.sum(usable_TKR, axis=-1, dtype=jnp.int32)
        movable_TK = valid_TK & (count_TK > 1)
    options = _Options(
        expert_TK,
        valid_TK,
        device_TKR,
        count_TK,
        movable_TK,
        None if hosts is None else jnp.asarray(list(hosts), jnp.int32),
        collectives.axis_index(EXPERT),
    )
    devices = placement.slot_expert_P.shape[0] // slots_per_device
    if devices_TG is None:
        near_TK = _nearest(options, devices)
    else:  # those to use come first for it, as it counts turns among them
        order_TKR = jnp.argsort(device_TKR < 0, axis=-1, stable=True).astype(jnp.int32)
        first_TKR = jnp.take_along_axis(device_TKR, order_TKR, axis=-1)
        near_TK = _at(order_TKR, _nearest(replace(options, device_TKR=first_TKR), devices))
    pick_TK = near_TK
    if experts_TK.size >= few * slots_per_device:
        pick_TK = _corrected(near_TK, options, placement, slots_per_device)
    slots_TK = jnp.take_along_axis(slot_TKR, pick_TK[..., None], axis=-1)[..., 0]
    return jnp.where(valid_TK, slots_TK, -1)


def _nearest(options: _Options, devices: int) -> jax.Array:
    """The nearest replica of each assignment, as an index below R; int32 [T, K]."""
    device_TKR, me = options.device_TKR, options.me
    tokens, top_k, replicas = device_TKR.shape
    here_TKR = device_TKR == me
    here_TK = jnp.argmax(here_TKR, axis=-1).astype(jnp.int32)
    open_TK = options.valid_TK & (options.count_TK > 1) & ~here_TKR.any(-1)
    # Devices the token goes to in any case; −2 for those not known yet.
    goes_TK = jnp.where(options.valid_TK & ~open_TK, _at(device_TKR, here_TK), -2)
    joins_TKR = _joins(device_TKR, open_TK, devices)
    turn_T = jnp.arange(tokens, dtype=jnp.int32) + me
    # A list, not an array that is changed: every change would be a pass over memory.
    picks, goes = [], [goes_TK[:, k] for k in range(top_k)]
    for k in range(top_k):  # one after the other: what is decided draws the next
        device_TR = device_TKR[:, k]
        shared_TR = reduce(or_, [device_TR == goes_T[:, None] for goes_T in goes])
        score_TR = 2 * shared_TR.astype(jnp.int32)
        if options.host_G is not None:
            near_TR = _near(device_TR, jnp.stack(goes, axis=1), options.host_G, me)
            score_TR = score_TR + near_TR.astype(jnp.int32)
        score_TR = score_TR * (top_k * replicas + 1) + joins_TKR[:, k]
        turns = jnp.arange(replicas, dtype=jnp.int32) - turn_T[:, None]
        score_TR = (score_TR + 1) * replicas - 1 - turns % options.count_TK[:, k, None]
        score_TR = jnp.where(device_TR >= 0, score_TR, -1)
        best_T, at_T = _first_best(score_TR, device_TR)
        picks.append(jnp.where(open_TK[:, k], best_T, here_TK[:, k]))
        goes[k] = jnp.where(open_TK[:, k], at_T, goes[k])
    return jnp.stack(picks, axis=1)


def _joins(device_TKR: jax.Array, open_TK: jax.Array, devices: int) -> jax.Array:
    """How many of the token's other open replicas are on each one's device; int32 [T, K, R]."""
    on_TKRG = device_TKR[..., None] == jnp.arange(devices, dtype=jnp.int32)
    open_TKRG = on_TKRG & open_TK[:, :, None, None]
    own_TKG = jnp.sum(open_TKRG, axis=2, dtype=jnp.int32)
    others_TKG = jnp.sum(own_TKG, axis=1, keepdims=True, dtype=jnp.int32) - own_TKG
    return jnp.sum(jnp.where(on_TKRG, others_TKG[:, :, None], 0), axis=-1, dtype=jnp.int32)


def _first_best(score_TR: jax.Array, device_TR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first of the best replicas, and its device; int32 [T] each. R is small."""
    most_T, best_T = score_TR[:, 0], jnp.zeros_like(score_TR[:, 0])
    at_T = device_TR[:, 0]
    for r in range(1, score_TR.shape[1]):
        better_T = score_TR[:, r] > most_T
        most_T = jnp.where(better_T, score_TR[:, r], most_T)
        best_T = jnp.where(better_T, jnp.int32(r), best_T)
        at_T = jnp.where(better_T, device_TR[:, r], at_T)
    return best_T, at_T


def _near(device_TR: jax.Array, goes_TK: jax.Array, host_G: jax.Array, me: jax.Array) -> jax.Array:
    """Whether a device is in a host that the token is in or goes to; bool [T, R]."""
    host_TR = host_G[device_TR]
    host_TK = jnp.where(goes_TK >= 0, host_G[goes_TK], -1)
    return (host_TR == host_G[me]) | (host_TR[:, :, None] == host_TK[:, None, :]).any(-1)


def _corrected(
    pick_TK: jax.Array, options: _Options, placement: Placement, slots_per_device: int
) -> jax.Array:
    """Other replicas for some assignments, so that device loads keep to the limit."""
    slots_ER = placement.replica_slots_ER
    num_experts, replicas = slots_ER.shape
    devices = placement.slot_expert_P.shape[0] // slots_per_device
    expert_TK, me = options.expert_TK, options.me
    count_ER = jnp.zeros((num_experts, replicas), jnp.int32)
    count_ER = count_ER.at[expert_TK, pick_TK].add(options.movable_TK.astype(jnp.int32))
    total_ER = collectives.psum_statistics(count_ER, EXPERT)
    real_ER = jnp.arange(replicas, dtype=jnp.int32) < placement.replica_count_E[:, None]
    fixed_G = None
    limited = options.movable_TK is not options.valid_TK
    if limited:
        stays_TK = options.valid_TK & ~options.movable_TK
        at_TK = jnp.where(stays_TK, _at(options.device_TKR, pick_TK), devices)
        fixed_G = jnp.zeros(devices, jnp.int32).at[at_TK].add(1, mode="drop")
        fixed_G = collectives.psum_statistics(fixed_G, EXPERT)
    target_ER = settle(
        total_ER,
        slots_ER // slots_per_device,
        real_ER,
        devices,
        fixed_G,
        percent=LOAD_PERCENT,
        rounds=ROUNDS,
    )

    # This device's part of what each replica gives away, and of what each one is given. Shares are
    # rounded up on some devices and down on others, so that the parts sum to about the whole.
    gives_ER = jnp.maximum(total_ER - target_ER, 0)
    takes_ER = jnp.maximum(target_ER - total_ER, 0)
    spread_E1 = me + 3 * jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    spread_ER = spread_E1 + 5 * jnp.arange(replicas, dtype=jnp.int32)
    quota_ER = part_of(count_ER, gives_ER, total_ER, spread_ER % devices, devices)
    quota_ER = jnp.where(gives_ER > 0, jnp.minimum(quota_ER, count_ER), 0)
    pool_E1 = jnp.sum(quota_ER, axis=1, keepdims=True, dtype=jnp.int32)
    upto_ER = jnp.cumsum(takes_ER, axis=1, dtype=jnp.int32)
    all_E1 = upto_ER[:, -1:]
    edge_ER = part_of(pool_E1, upto_ER, all_E1, (spread_E1 + 2) % devices, devices)
    edge_ER = jnp.where(upto_ER == all_E1, pool_E1, jnp.minimum(edge_ER, pool_E1))

    order_A, group_A = _cheapest_first(pick_TK, takes_ER, options)
    start = jnp.cumsum(count_ER.reshape(-1), dtype=jnp.int32) - count_ER.reshape(-1)
    before_ER = jnp.cumsum(quota_ER, axis=1, dtype=jnp.int32) - quota_ER
    rank_A = jnp.arange(order_A.shape[0], dtype=jnp.int32) - start[group_A]
    place_A = before_ER.reshape(-1)[group_A] + rank_A
    edge_AR = edge_ER[group_A // replicas]
    to_A = jnp.sum(place_A[:, None] >= edge_AR, axis=-1, dtype=jnp.int32)
    moves_A = rank_A < quota_ER.reshape(-1)[group_A]
    if limited:  # a replica that wants more may be one that this token may not use
        usable_AR = (options.device_TKR >= 0).reshape(-1, replicas)[order_A]
        target_A = jnp.minimum(to_A, replicas - 1)
        moves_A = moves_A & jnp.take_along_axis(usable_AR, target_A[:, None], axis=1)[:, 0]
    pick_A = jnp.where(moves_A, to_A, group_A % replicas)
    if limited:  # those that stay are in no order of replicas
        pick_A = jnp.where(
            options.movable_TK.reshape(-1)[order_A], pick_A, pick_TK.reshape(-1)[order_A]
        )
    flat = pick_TK.reshape(-1).at[order_A].set(pick_A, unique_indices=True)
    return jnp.where(options.valid_TK, flat.reshape(pick_TK.shape), 0)


def _cheapest_first(
    pick_TK: jax.Array, takes_ER: jax.Array, options: _Options
) -> tuple[jax.Array, jax.Array]:
    """Assignments by replica, within each first those that another replica costs least.

    Returns:
        int32 [T·K] indices of assignments, those that are none last, and int32 [T·K] the replica,
        e · R + r, of each in that order.
    """
    device_TKR = options.device_TKR
    replicas = device_TKR.shape[-1]
    at_TK = jnp.where(options.valid_TK, _at(device_TKR, pick_TK), -2)
    shared = device_TKR[:, :, :, None] == at_TK[:, None, None, :]
    other_KK = ~jnp.eye(at_TK.shape[1], dtype=bool)[:, None, :]
    # Whether a replica's device needs a row for this assignment alone.
    alone_TKR = ~((shared & other_KK).any(-1) | (device_TKR == options.me))
    now_TK = _at(alone_TKR, pick_TK).astype(jnp.int32)
    wanted_TKR = takes_ER[options.expert_TK] > 0
    if options.movable_TK is not options.valid_TK:
        wanted_TKR = wanted_TKR & (device_TKR >= 0)
    then_TK = jnp.min(jnp.where(wanted_TKR, alone_TKR.astype(jnp.int32), 2), axis=-1)
    group_TK = options.expert_TK * replicas + pick_TK
    key_TK = group_TK * 4 + then_TK - now_TK + 1
    if options.movable_TK is not options.valid_TK:  # those that no replica can take come last
        key_TK = jnp.where(wanted_TKR.any(-1), key_TK, group_TK * 4 + 3)
    most = jnp.iinfo(jnp.int32).max
    key_A = jnp.where(options.movable_TK, key_TK, most).reshape(-1)
    order_A = jnp.argsort(key_A, stable=True).astype(jnp.int32)
    last = takes_ER.size - 1
    return order_A, jnp.minimum(key_A[order_A] // 4, last)


def _at(x_TKR: jax.Array, pick_TK: jax.Array) -> jax.Array:
    """Entries at an index of the last dimension."""
    return jnp.take_along_axis(x_TKR, pick_TK[..., None], axis=-1)[..., 0]
