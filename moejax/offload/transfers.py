"""Experts on their way from the host to the device, what is missing before what is guessed.

A device's copies from the host come one after the other, in the order in which they are started. So
what a layer lacks is started as soon as that is known, and only then the guess for the next layer,
which travels while this layer's experts and the next one's attention are computed. There is a group
of guesses for the layer that is computed and one for the layer after it: two buffers in turn.
Experts that have to be read first keep to the same order (`sending`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.offload.low import low_bytes
from moejax.offload.sending import Coming, sender_of
from moejax.offload.store import Expert, Store

__all__ = ["Moved", "Transfers"]

_GROUPS = 2


@dataclass
class Moved:
    """What has travelled so far.

    asked_bytes: of experts that a layer lacked.
    guessed_bytes: of guesses, without those given up before they had begun.
    vain_bytes: of guesses that were not used.
    stall_seconds: that the host waited for weights.
    """

    asked_bytes: int = 0
    guessed_bytes: int = 0
    vain_bytes: int = 0
    stall_seconds: float = 0.0


class Transfers:
    """Copies from the store to the device.

    Args:
        store: where experts come from.
        mesh: of the one device.
        guess_bytes: the most that guesses for one layer take; there are two such groups at most.
        low: what a layer lacks comes in fewer bits; the store has such copies.
    """

    def __init__(self, store: Store, mesh: Mesh, guess_bytes: int, *, low: bool = False) -> None:
        self.moved = Moved()
        self._store, self._guess_bytes, self._low = store, guess_bytes, low
        device = mesh.devices.flat[0]
        kind = device.default_memory().kind
        self._sender = sender_of(store, NamedSharding(mesh, P(), memory_kind=kind))
        self._asked: dict[tuple[int, int], Coming] = {}
        self._groups: dict[int, dict[int, Coming]] = {}
        self._vain: list[tuple[int, Coming]] = []
        self._taken: list[Coming] = []  # and not waited for
        if low:  # compiles what makes experts of copies, before the first step
            for layer in {bank.shapes: layer for layer, bank in store.banks.items()}.values():
                self._start(layer, 0, asked=True, low=True).arrays()

    def ask(self, layer: int, experts: Iterable[int], *, exact: bool = False) -> None:
        """Starts what a layer lacks; what was guessed is under way already.

        Args:
            layer: index in the model.
            experts: that are needed next.
            exact: even where what is lacking comes in fewer bits.
        """
        low, bank = self._low and not exact, self._store.banks[layer]
        for expert in experts:
            if self.guessed(layer, expert):
                self._groups[layer][expert].hurry()
            if (layer, expert) in self._asked or self.guessed(layer, expert):
                continue
            self._asked[layer, expert] = self._start(layer, expert, asked=True, low=low)
            self.moved.asked_bytes += low_bytes(bank) if low else bank.expert_bytes

    def guess(self, layer: int, experts: Sequence[int]) -> int:
        """Starts a group of guesses, as many as its bytes allow; the best come first.

        Returns:
            how many were started: none while two groups, or what is left of wrong ones, fill the
            room.
        """
        size = self._store.banks[layer].expert_bytes
        self._vain = [(n, coming) for n, coming in self._vain if not coming.is_there()]
        taken = sum(n for n, _ in self._vain) + sum(
            self._store.banks[other].expert_bytes * len(group)
            for other, group in self._groups.items()
        )
        if layer in self._groups or len(self._groups) >= _GROUPS:
            return 0
        room = min(self._guess_bytes, _GROUPS * self._guess_bytes - taken) // size
        chosen = list(experts)[: max(room, 0)]
        if chosen:
            self._groups[layer] = {e: self._start(layer, e, asked=False) for e in chosen}
            self.moved.guessed_bytes += size * len(chosen)
        return len(chosen)

    def guessed(self, layer: int, expert: int) -> bool:
        """Whether an expert is on its way, or there, because it was guessed."""
        return expert in self._groups.get(layer, ())

    def take(self, layer: int, expert: int, *, wait: bool = True) -> Expert:
        """An expert that was started.

        Args:
            layer, expert: which one.
            wait: until it is there, which is a stall. If not, programs may be given it all the same
                and wait on the device; `settle` waits then.
        """
        guessed = self.guessed(layer, expert)
        coming = self._groups[layer].pop(expert) if guessed else self._asked.pop((layer, expert))
        start = time.perf_counter()
        if wait:
            coming.wait()
        arrays = coming.arrays()
        self.moved.stall_seconds += time.perf_counter() - start
        if not wait:
            self._taken.append(coming)
        return arrays

    def settle(self) -> None:
        """Waits until all that was taken is there; the time until then is a stall."""
        start = time.perf_counter()
        for coming in self._taken:
            coming.wait()
        self._taken.clear()
        self.moved.stall_seconds += time.perf_counter() - start

    def give_up(self, layer: int) -> None:
        """Lets go of what was guessed for a layer and not taken."""
        size = self._store.banks[layer].expert_bytes
        group = self._groups.pop(layer, {}).values()
        begun = [coming for coming in group if not coming.drop()]
        self._vain += [(size, coming) for coming in begun]
        self.moved.vain_bytes += size * len(begun)
        self.moved.guessed_bytes -= size * (len(group) - len(begun))

    def forget(self) -> None:
        """Lets go of everything that is under way."""
        for layer in list(self._groups):
            self.give_up(layer)
        for coming in self._asked.values():
            coming.drop()
        self._asked.clear()
        self._taken.clear()

    def close(self) -> None:
        """Lets go of everything, and ends threads."""
        self.forget()
        self._sender.close()

    def _start(self, layer: int, expert: int, *, asked: bool, low: bool = False) -> Coming:
        return self._sender.send(layer, expert, asked=asked, low=low)
