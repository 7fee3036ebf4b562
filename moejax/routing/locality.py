"""Where experts are, seen from a device, and scores scaled by how far they are.

A remote expert is chosen if its probability times 1 − penalty is still among the best. Runs inside
the shard_map; integers and constants, so no gradient flows through any of it.

Shape letters: T tokens of this device, E experts, K experts of a token, G devices along `expert`,
S slots of a device, U devices or hosts, W slots of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float32, Int32

from moejax.config import RouterConfig
from moejax.errors import UserError
from moejax.locality_config import LocalityConfig
from moejax.placement.arrays import Placement, home_slots, slots_at_home
from moejax.routing.choice import only_order_counts, selection_scores
from sharding import collectives
from sharding.mesh import EXPERT

__all__ = [
    "Reach",
    "check_room",
    "device_distances",
    "distances",
    "log_scale",
    "reach_of",
    "scaled_selection",
]


@dataclass(frozen=True)
class Reach:
    """Where one layer's experts are, seen from this device.

    config: what routing makes of it.
    distance_E: int32 [E] of the nearest copy: 0 on this device, 1 on its host, 2 elsewhere.
    distance_G: int32 [G], of the devices.
    slot_expert_P: int32 [G·S], the expert in each slot, −1 for none; NumPy where it is static.
    host_G: the host of each device, numbered from 0.
    """

    config: LocalityConfig
    distance_E: jax.Array
    distance_G: jax.Array
    slot_expert_P: jax.Array | np.ndarray
    host_G: tuple[int, ...]


def reach_of(
    config: LocalityConfig,
    top_k: int,
    placement: Placement | None,
    num_experts: int,
    devices: int,
    hosts: Sequence[int] | None,
) -> Reach:
    """What routing needs to know of a placement, inside the shard_map.

    Args:
        config: with `active`.
        top_k: K.
        placement: one layer's; None: at home.
        num_experts: E.
        devices: G.
        hosts: the host of each device; None: all on one.

    Raises:
        UserError: K experts have no room on as many devices or hosts as a token may use.
    """
    host_G = _numbered(hosts, devices)
    slots_P = slots_at_home(num_experts, devices) if placement is None else placement.slot_expert_P
    check_room(config, top_k, slots_P, host_G)
    return Reach(
        config,
        distances(placement, num_experts, devices, hosts),
        device_distances(devices, hosts),
        slots_P,
        host_G,
    )


def _numbered(hosts: Sequence[int] | None, devices: int) -> tuple[int, ...]:
    if hosts is None:
        return (0,) * devices
    return tuple(np.unique(np.asarray(hosts), return_inverse=True)[1].tolist())


def check_room(
    config: LocalityConfig, top_k: int, slots_P: jax.Array | np.ndarray, hosts: Sequence[int]
) -> None:
    """Refuses limits whose devices or hosts have too few slots, as far as shapes tell.

    Args:
        config: its limits are read.
        top_k: K.
        slots_P: int32 [G·S], −1 for a slot that stays empty; of an array of JAX only the shape
            counts.
        hosts: the host of each device, numbered from 0.

    Raises:
        UserError: K experts have no room on as many devices or hosts as a token may use.
    """
    _check_room("max_devices", config.max_devices, range(len(hosts)), slots_P, top_k)
    _check_room("max_hosts", config.max_hosts, hosts, slots_P, top_k)


def _check_room(
    name: str,
    limit: int | None,
    unit_G: Sequence[int],
    slots_P: jax.Array | np.ndarray,
    top_k: int,
) -> None:
    if limit is None:
        return
    # Of a placement that changes while it runs only the number of slots is known.
    filled_P = slots_P >= 0 if isinstance(slots_P, np.ndarray) else np.ones(slots_P.shape, bool)
    room_G = filled_P.reshape(len(unit_G), -1).sum(1)
    room_U = np.bincount(np.asarray(unit_G), weights=room_G).astype(int)
    room = int(np.sort(room_U)[::-1][:limit].sum())
    if room < top_k:
        raise UserError(
            f"{name}={limit} with top_k={top_k}: {limit} of the mesh hold at most {room} experts; "
            f"raise {name}, or use fewer devices along expert"
        )


def device_distances(devices: int, hosts: Sequence[int] | None) -> Int32[Array, " G"]:
    """How far each device along `expert` is: 0 this one, 1 on the same host, 2 on another."""
    me = collectives.axis_index(EXPERT)
    host_G = jnp.asarray(_numbered(hosts, devices), jnp.int32)
    away_G = 1 + (host_G != host_G[me]).astype(jnp.int32)
    return jnp.where(jnp.arange(devices, dtype=jnp.int32) == me, 0, away_G)


def distances(
    placement: Placement | None,
    num_experts: int,
    devices: int,
    hosts: Sequence[int] | None = None,
) -> Int32[Array, " E"]:
    """How far the nearest copy of each expert is, inside the shard_map.

    Args:
        placement: one layer's; None: at home.
        num_experts: E.
        devices: G.
        hosts: the host of each device along `expert`; None: all on one.

    Returns:
        int32 [E]: 0 on this device, 1 on another of its host, 2 on another host.
    """
    distance_G = device_distances(devices, hosts)
    if placement is None:
        slots = slots_at_home(num_experts, devices).size // devices
        return distance_G[home_slots(num_experts, devices) // slots]
    slots = placement.slot_expert_P.shape[0] // devices
    # Entries past an expert's copies repeat its first one.
    return jnp.min(distance_G[placement.replica_slots_ER // slots], axis=1)


def log_scale(config: LocalityConfig, distance_E: Int32[Array, " E"]) -> Float32[Array, " E"]:
    """Logarithm of what the experts' probabilities are scaled by; float32 [E]."""
    table = np.log1p(-np.asarray(config.penalties, np.float64)).astype(np.float32)
    return jnp.asarray(table)[distance_E]


def scaled_selection(
    logits_TE: Float32[Array, "T E"],
    config: RouterConfig,
    locality: LocalityConfig,
    distance_E: Int32[Array, " E"],
    bias_E: Float32[Array, " E"] | None = None,
) -> Float32[Array, "T E"]:
    """What the choice compares, probabilities scaled by distance, then the selection bias.

    Where nothing but the order counts, and for `topk_softmax` always, these are logarithms, in
    which nothing underflows.

    Args:
        logits_TE: float32 [T, E].
        config: of the router.
        locality: penalties and limits.
        distance_E: int32 [E].
        bias_E: float32 [E], or None for no bias.

    Returns:
        float32 [T, E], without gradient; with nothing to scale or to sum, `selection_scores`.
    """
    sums = locality.limits and any(
        limit is not None and config.top_k > limit
        for limit in (locality.max_devices, locality.max_hosts)
    )
    if not locality.scales:
        return selection_scores(logits_TE, config, bias_E, sums=sums)
    scale_E = log_scale(locality, distance_E)
    logarithms = config.score_function == "topk_softmax"
    if not logarithms and not only_order_counts(config, bias_E, sums=sums):
        select_TE = selection_scores(logits_TE, config, None, sums=True) * jnp.exp(scale_E)
    elif config.score_function == "sigmoid":
        select_TE = jax.nn.log_sigmoid(logits_TE) + scale_E
    else:
        select_TE = logits_TE + scale_E
    if bias_E is not None:
        select_TE = select_TE + bias_E
    return lax.stop_gradient(select_TE)
