"""Rows that arrive while a product of theirs runs: dispatch and the first product as one kernel.

The first blocks of the kernel write this device's rows to the others (`pushing`), in the order in
which the products need them: rows whose first expert there is in the first group of slots, then
those of the second, and so on. The tiles of a slot wait for the groups up to its own. That hides
most of the exchange without chunks: no tile is split and no matrix is read twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.pushing import Pusher, wait_for_signals

__all__ = ["Arrivals", "Arriving"]


@dataclass(frozen=True)
class Arrivals:
    """How rows arrive in a kernel of products.

    pusher: what the writing warpgroups know.
    slots: of a group.
    groups: Q.
    blocks: that write before they multiply.
    late: tiles that each other block takes before those take part.
    """

    pusher: Pusher
    slots: int
    groups: int
    blocks: int
    late: int

    @property
    def rows(self) -> int:
        """That may arrive, G·T."""
        return self.pusher.devices * self.pusher.tokens

    def semaphores(self) -> Any:
        """One a group."""
        return pl.get_global(plgpu.SemaphoreType.REGULAR((self.groups,)))

    def send(
        self, source: Any, entries: Any, first: Any, received: Any, arrived: Any, worker: Any
    ) -> None:
        """Writes a warpgroup's share of all groups: group q is entries[first[q] : first[q + 1]]."""

        def group(q: Any, _: None) -> None:
            self.pusher.push(source, entries, first[q], first[q + 1], received, worker)
            self.pusher.signal(arrived.at[q])

        lax.fori_loop(0, self.groups, group, None)

    def wait(self, arrived: Any, seen: Any, slot: Any) -> Any:
        """Waits for what a slot's tiles need; returns how many groups are there."""
        needed = jnp.maximum(seen, lax.div(slot, self.slots) + 1)
        self.wait_until(arrived, seen, needed)
        return needed

    def wait_until(self, arrived: Any, seen: Any, needed: Any) -> None:
        """Waits for the groups from `seen` to `needed` − 1."""

        def group(q: Any, _: None) -> None:
            wait_for_signals(arrived.at[q], self.pusher.signals)

        lax.fori_loop(seen, needed, group, None)

    def share(self, block: Any, tiles: Any, blocks: int) -> Any:
        """How many of the tiles a block takes."""
        others = blocks - self.blocks
        early = jnp.minimum(tiles, self.late * others)
        before = lax.div(jnp.maximum(early - (block - self.blocks) + (others - 1), 0), others)
        after = lax.div(jnp.maximum(tiles - early - block + (blocks - 1), 0), blocks)
        return jnp.where(block < self.blocks, 0, before) + after

    def tile(self, block: Any, i: Any, blocks: int) -> Any:
        """A block's i-th."""
        others = blocks - self.blocks
        late = jnp.where(block < self.blocks, 0, self.late)
        early = (block - self.blocks) + i * others
        return jnp.where(i < late, early, self.late * others + block + (i - late) * blocks)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arriving:
    """Rows on their way into a kernel.

    entries_M: int32, where this device's rows go (`pushing`), sorted by group.
    firsts_Q: int32 [Q + 1], where the groups begin in it, and the end of the last.
    how: static.
    """

    entries_M: jax.Array
    firsts_Q: jax.Array
    how: Arrivals = field(metadata={"static": True})
