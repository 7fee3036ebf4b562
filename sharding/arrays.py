"""Host arrays onto a mesh whose devices may belong to several processes, and flags from them."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from sharding.collectives import psum_statistics
from sharding.mesh import AXES, in_turn

__all__ = ["Vote", "put"]


def put(arrays: Any, sharding: Sharding) -> Any:
    """Lays host arrays over devices; each process its own parts, from the same whole arrays.

    `jax.device_put` would compare the arrays of all processes, each time by a collective.

    Args:
        arrays: a pytree of NumPy or local arrays, the same in all processes.
        sharding: of all of them.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)

    def one(array: Any) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, arrays)


class Vote:
    """Whether any process says yes, found by the devices beside their other work.

    Args:
        mesh: with devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        sharding = NamedSharding(mesh, P(AXES))

        def ballot(value: int) -> jax.Array:
            mine = np.full(1, value, np.int32)
            return jax.make_array_from_callback((mesh.size,), sharding, lambda _: mine)

        self._ballots = ballot(0), ballot(1)

    def start(self, yes: bool) -> jax.Array:
        """Called by every process at the same place; `bool` of what it gives waits for it."""
        return in_turn(self._mesh, _summed(self._mesh)(self._ballots[yes]))


@cache
def _summed(mesh: Mesh) -> Any:
    mapped = jax.shard_map(
        lambda votes: psum_statistics(votes[0], AXES),
        mesh=mesh,
        in_specs=P(AXES),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(mapped)
