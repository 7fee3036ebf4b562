"""Where experts live: logical experts → physical slots, as plain arrays.

A device along `expert` has S slots; slot p belongs to device p // S. Model code, optimizer state
and checkpoints know logical experts only. The *home* of an expert is a static, contiguous and even
assignment in which masters and moments are stored; a placement says where copies are computed.
Only S and the largest number of replicas R are shapes: another placement recompiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax import numpy as jnp

from moejax.errors import UserError
from sharding import collectives
from sharding.mesh import EXPERT

__all__ = [
    "Placement",
    "contiguous",
    "from_slots",
    "gather_bank",
    "home_slots",
    "host_arrays",
    "num_slots",
    "slots_at_home",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Placement:
    """Where the copies of one layer's experts live (stacked [L, …] for scanned layers).

    slot_expert_P: int32 [G·S], the logical expert in each physical slot; −1 for an empty slot.
    replica_slots_ER: int32 [E, R], the slots that hold an expert; entries past its count repeat
        its first slot.
    replica_count_E: int32 [E], how many of them are real, at least 1.
    """

    slot_expert_P: jax.Array
    replica_slots_ER: jax.Array
    replica_count_E: jax.Array


def num_slots(num_experts: int, devices: int) -> int:
    """Slots a device needs at home: ceil(E / G).

    Raises:
        UserError: there are fewer experts than devices.
    """
    if num_experts < devices:
        raise UserError(
            f"num_experts={num_experts} on expert={devices} devices: every device needs at least "
            "one expert; shrink the mesh's expert axis"
        )
    return -(-num_experts // devices)


def home_slots(num_experts: int, devices: int) -> np.ndarray:
    """The home slot of every logical expert: contiguous, sizes differing by at most one.

    Returns:
        int32 [E] indices into G·S slots. The identity when G divides E.
    """
    slots = num_slots(num_experts, devices)
    per_device = np.full(devices, num_experts // devices)
    per_device[: num_experts % devices] += 1
    device = np.repeat(np.arange(devices), per_device)
    first = np.concatenate([[0], np.cumsum(per_device)[:-1]])
    return (device * slots + np.arange(num_experts) - first[device]).astype(np.int32)


def from_slots(
    slot_expert: np.ndarray, num_experts: int, max_replicas: int | None = None
) -> Placement:
    """A placement from the content of each slot.

    Args:
        slot_expert, num_experts, max_replicas: see `host_arrays`.

    Raises:
        UserError: see there.
    """
    return Placement(*map(jnp.asarray, host_arrays(slot_expert, num_experts, max_replicas)))


def host_arrays(
    slot_expert: np.ndarray, num_experts: int, max_replicas: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of a `Placement` in host memory, in the order of its fields.

    Args:
        slot_expert: int [G·S], logical expert or −1.
        num_experts: E.
        max_replicas: R; None takes the largest number of replicas present.

    Raises:
        UserError: a slot holds no expert there is, an expert has no slot, or one has more replicas
            than `max_replicas`.
    """
    slot_expert = np.asarray(slot_expert, np.int32)
    strange = slot_expert[(slot_expert < -1) | (slot_expert >= num_experts)]
    if strange.size:
        raise UserError(
            f"placement: a slot holds expert {int(strange[0])}: must lie between 0 and "
            f"{num_experts - 1}, or be -1 for an empty slot"
        )
    holders = [np.flatnonzero(slot_expert == e) for e in range(num_experts)]
    counts = np.array([len(h) for h in holders], np.int32)
    if counts.min() < 1:
        raise UserError(
            f"placement: expert {int(counts.argmin())} has no slot; give each at least one"
        )
    width = int(counts.max()) if max_replicas is None else max_replicas
    if counts.max() > width:
        raise UserError(
            f"placement: expert {int(counts.argmax())} has {int(counts.max())} replicas, more than "
            f"the {width} fixed at start; raise max_replicas"
        )
    table = np.stack([np.concatenate([h, np.full(width - len(h), h[0])]) for h in holders])
    return slot_expert, table.astype(np.int32), counts


def contiguous(num_experts: int, devices: int) -> Placement:
    """The home assignment as a placement: every expert once."""
    return from_slots(slots_at_home(num_experts, devices), num_experts)


def slots_at_home(num_experts: int, devices: int, slots: int | None = None) -> np.ndarray:
    """The expert in each slot where all are at home: int32 [G·S], −1 for empty slots.

    Args:
        num_experts: E.
        devices: G.
        slots: S, the first ones of a device are filled; None: as many as home needs.

    Raises:
        UserError: there are fewer experts than devices.
    """
    rows = num_slots(num_experts, devices)
    content_GS = np.full((devices, rows if slots is None else slots), -1, np.int32)
    home_E = home_slots(num_experts, devices)
    content_GS[home_E // rows, home_E % rows] = np.arange(num_experts, dtype=np.int32)
    return content_GS.reshape(-1)


def gather_bank(bank: jax.Array, placement: Placement, num_experts: int) -> jax.Array:
    """This device's slots filled from the experts' homes; the transpose sums replicas home.

    Gathers the whole bank on every device, G times its part in memory and on the wire: the
    reference that tests compare `moejax.placement.fetch` with.

    Args:
        bank: [S_home, ...], this device's part of the home bank.
        placement: one layer's placement.
        num_experts: E.

    Returns:
        [S, ...], the weights of this device's physical slots; arbitrary in empty slots, to which
        no row is ever sent.
    """
    devices = collectives.axis_size(EXPERT)
    home_E = jnp.asarray(home_slots(num_experts, devices))
    slots = placement.slot_expert_P.shape[0] // devices
    mine_S = jax.lax.dynamic_slice_in_dim(
        placement.slot_expert_P, collectives.axis_index(EXPERT) * slots, slots
    )
    everything = collectives.all_gather(bank, EXPERT)
    return everything[home_E[jnp.clip(mine_S, 0, num_experts - 1)]]
