"""A layer's slots on the device: arrays [S, …], in which one expert after the other is put."""

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


def _insert(bank: Expert, slot: jax.Array, expert: Expert) -> Expert:
    pairs = zip(bank, expert, strict=True)
    return tuple(lax.dynamic_update_index_in_dim(b, e, slot, 0) for b, e in pairs)


@jax.jit
def _get(bank: Expert, slot: jax.Array) -> Expert:
    return tuple(lax.dynamic_index_in_dim(b, slot, 0, keepdims=False) for b in bank)


insert = jax.jit(_insert, donate_argnums=0)
"""Puts an expert into a slot of a bank, in place: which slot is data, so nothing recompiles."""


@cache
def _number(slot: int, sharding: NamedSharding) -> jax.Array:
    """A slot's number on the device, where it stays: were it sent, it would wait for experts."""
    return jax.device_put(np.int32(slot), sharding)


class DeviceSlots:
    """The slots of one layer.

    Args:
        layout: of the layer's experts.
        slots: S.
        mesh: of the one device.

    Attributes:
        arrays: [S, …] each, zero at first, in the order of `BankLayout.names`.
    """

    def __init__(self, layout: BankLayout, slots: int, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, P())
        self.arrays: Expert = tuple(
            jnp.zeros((slots, *s.shape), s.dtype, device=self._sharding) for s in layout.shapes
        )
        for slot in range(slots):
            _number(slot, self._sharding)

    def put(self, slot: int, expert: Expert) -> None:
        """Puts an expert that is on the device into a slot."""
        self.arrays = insert(self.arrays, _number(slot, self._sharding), expert)

    def get(self, slot: int) -> Expert:
        """A copy of the expert in a slot."""
        return _get(self.arrays, _number(slot, self._sharding))
