"""A layer's slots on the device: arrays [S, …], in which one expert after the other is put.

Where each expert is lies on the device as well and changes there: a table that is sent would come
behind the experts whose transfer has begun, and sending takes the host longer than a program.

Shape letters: S slots, E experts.
"""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.offload.parts import BankLayout
from moejax.offload.store import Expert

__all__ = ["DeviceSlots", "insert"]


def _insert(
    bank: Expert, slot_E: jax.Array, slot: jax.Array, number: jax.Array, expert: Expert
) -> tuple[Expert, jax.Array]:
    pairs = zip(bank, expert, strict=True)
    bank = tuple(lax.dynamic_update_index_in_dim(b, e, slot, 0) for b, e in pairs)
    slot_E = jnp.where(slot_E == slot, jnp.int32(-1), slot_E)
    return bank, lax.dynamic_update_index_in_dim(slot_E, slot, number, 0)


@jax.jit
def _get(bank: Expert, slot: jax.Array) -> Expert:
    return tuple(lax.dynamic_index_in_dim(b, slot, 0, keepdims=False) for b in bank)


insert = jax.jit(_insert, donate_argnums=0)
"""Puts an expert into a slot of a bank, in place, and notes it in the table [E].

Which slot, and which expert, is data, so nothing recompiles.
"""


@cache
def _number(number: int, sharding: NamedSharding) -> jax.Array:
    """A number on the device, where it stays: were it sent, it would wait for experts."""
    return jax.device_put(np.int32(number), sharding)


class DeviceSlots:
    """The slots of one layer.

    Args:
        layout: of the layer's experts.
        slots: S.
        mesh: of the one device.

    Attributes:
        arrays: [S, …] each, zero at first, in the order of `BankLayout.names`.
        slot_E: int32 [E], where each expert is; −1 for absent.
    """

    def __init__(self, layout: BankLayout, slots: int, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, P())
        self.arrays: Expert = tuple(
            jnp.zeros((slots, *s.shape), s.dtype, device=self._sharding) for s in layout.shapes
        )
        self.slot_E = jnp.full(layout.experts, -1, jnp.int32, device=self._sharding)
        for number in range(max(slots, layout.experts)):
            _number(number, self._sharding)

    def put(self, slot: int, number: int, expert: Expert) -> None:
        """Puts the expert of this number, which is on the device, into a slot."""
        where = _number(slot, self._sharding), _number(number, self._sharding)
        self.arrays, self.slot_E = insert(self.arrays, self.slot_E, *where, expert)

    def get(self, slot: int) -> Expert:
        """A copy of the expert in a slot."""
        return _get(self.arrays, _number(slot, self._sharding))
