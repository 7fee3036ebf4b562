"""The experts of all layers while a model runs: what is on the device, what comes, what goes.

One step of a layer: `arrive` is told what its tokens chose and finds out what is missing. Where
all that is needed fits the slots, `into_slots` puts it there. Where more is needed, `waves` gives
first what the slots hold and then streams the rest in groups of W, of which one is computed while
the next one travels. Either starts what is guessed for the next layer, behind all that this one
lacks.

Shape letters: L layers with experts, E experts, S slots, W experts of a group, K experts of a
token, T tokens of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, Int32

from moejax.inference.scheduler import Plan
from moejax.offload.cache import SlotCache
from moejax.offload.config import OffloadConfig
from moejax.offload.guesses import Guesses
from moejax.offload.needs import Need, Wave
from moejax.offload.policies import make_policy
from moejax.offload.room import Room
from moejax.offload.slots import DeviceSlots
from moejax.offload.statistics import OffloadStats, Uses
from moejax.offload.store import Expert, Store
from moejax.offload.transfers import Transfers
from moejax.offload.worth import Worth

__all__ = ["OffloadedExperts"]

_RECENT = 1 / 16  # weight of a step among those that tell how often nothing is missing
_LIKELY = 1 / 4  # a program begun in vain mostly runs beside the transfer that it lacked


class OffloadedExperts:
    """Slots, transfers and guesses of a model.

    Args:
        store: all experts.
        mesh: of the one device.
        room: slots of each layer, and so on.
        config: policy and predictor.
        top_k: K, the most that any layer chooses.
    """

    def __init__(
        self, store: Store, mesh: Mesh, room: Room, config: OffloadConfig, top_k: int
    ) -> None:
        self.store, self.room, self.config = store, room, config
        self.layers = tuple(store.banks)
        self.transfers = Transfers(store, mesh, room.guess_bytes, low=config.low)
        self.experts_L = tuple(bank.experts for bank in store.banks.values())
        self.guesses = Guesses(config, self.experts_L, top_k)
        smallest = min(bank.expert_bytes for bank in store.banks.values())
        self.worth = Worth(room.guess_bytes // smallest)
        self._mesh, self._here = mesh, NamedSharding(mesh, P())
        self._uses = {True: Uses(), False: Uses()}
        self._stall = {True: 0.0, False: 0.0}
        self._decodes, self._tokens = False, 0
        self._read_to_fill = 0
        self._caches: list[SlotCache] = []
        self._slots: list[DeviceSlots] = []
        # Of each layer, experts that came to their slot in fewer bits; some may have left it.
        self._low: list[set[int]] = []
        self._whole_L = [1.0] * len(self.layers)  # share of the last steps that decode
        self._left: float | None = None  # when all that the layer before lacked was there
        self._lost = False  # what the slots hold
        self._fill()

    def _fill(self) -> None:
        """Fills the slots anew, which is no part of what is counted."""
        before, read_before = replace(self.transfers.moved), self.store.read_bytes
        self._caches, self._slots, self._low = [], [], [set() for _ in self.layers]
        for at, (layer, bank) in enumerate(self.store.banks.items()):
            slots = DeviceSlots(bank, self.room.slots_L[at], self._mesh)
            held = self._at_first(at)
            for group in self._grouped(held):
                start = time.perf_counter()
                self.transfers.ask(layer, group, exact=True)
                arrived = {expert: self.transfers.take(layer, expert) for expert in group}
                self.worth.sent((time.perf_counter() - start) / len(group))
                for expert, arrays in arrived.items():
                    slots.put(held.index(expert), expert, arrays)
                del arrived, arrays  # or their memory would be taken for one group longer
            policy = make_policy(self.config.policy, bank.experts)
            self._caches.append(SlotCache(self.room.slots_L[at], bank.experts, policy, held))
            self._slots.append(slots)
        self.transfers.moved = before
        self._read_to_fill += self.store.read_bytes - read_before

    def begin(self, plan: Plan) -> None:
        """A step begins."""
        if self._lost:
            self._fill()
            self._lost = False
        self._decodes, self._left = plan.shape.tokens == 0, None
        if self._decodes:
            self._tokens += sum(len(works) for works in plan.rows)
        self.guesses.begin(plan)

    def slots_of(self, at: int) -> Int32[np.ndarray, " E"]:
        """Where each expert of a layer is now; −1 for absent. A copy."""
        return self._caches[at].slot_E.copy()

    def in_slots(self, at: int) -> tuple[Expert, jax.Array]:
        """The slots' arrays of a layer, and where each expert is in them: int32 [E], −1 for absent.

        Until an expert is put into a slot, which takes the arrays.
        """
        return self._slots[at].arrays, self._slots[at].slot_E

    def likely_whole(self, at: int) -> bool:
        """Whether a step of a layer may well need nothing but what its slots hold."""
        return self._whole_L[at] > _LIKELY

    def arrive(
        self, at: int, experts_TK: Int[np.ndarray, "T K"], probe_E: np.ndarray | None
    ) -> Need:
        """A layer's tokens have chosen.

        Args:
            at: the layer, counted among those with experts.
            experts_TK: −1 for no choice.
            probe_E: what the layer's program thinks of the next layer's choice; None: it does not.
        """
        layer, cache = self.layers[at], self._caches[at]
        if self._left is not None:
            self.worth.idle(self._decodes, time.perf_counter() - self._left)
        count_E = np.bincount(experts_TK[experts_TK >= 0], minlength=self.experts_L[at])
        needed = np.flatnonzero(count_E).tolist()
        self.worth.chosen(self._decodes, at, needed)
        # What is there in fewer bits, and was guessed, is exact from now on.
        poor = self._poor(at, needed)
        better = [expert for expert in poor if self.transfers.guessed(layer, expert)]
        missing = cache.missing(needed) + better
        uses = self._uses[self._decodes]
        guessed = {expert for expert in missing if self.transfers.guessed(layer, expert)}
        low = frozenset(missing) - guessed if self.config.low else frozenset()
        early = len(guessed)
        uses.low += len(low) + len(poor) - len(better)
        uses.held += len(needed) - len(missing)
        uses.early += early
        uses.missed += len(missing) - early
        if self._decodes:
            self._whole_L[at] += _RECENT * ((not missing) - self._whole_L[at])
        self.guesses.observe(at, experts_TK, probe_E)
        cache.policy.expect(self.guesses.again(at))
        cache.used(needed)
        # Those that are here or nearly so come first, so that the others have time.
        missing.sort(key=lambda expert: not self.transfers.guessed(layer, expert))
        held = tuple(expert for expert in needed if expert in cache and expert not in better)
        fits = len(needed) <= cache.slots
        return Need(at, layer, count_E, held, tuple(missing), fits, low)

    def _poor(self, at: int, experts: Sequence[int]) -> list[int]:
        """Of some experts of a layer those that are on the device in fewer bits."""
        return [e for e in experts if e in self._low[at] and e in self._caches[at]]

    def into_slots(self, need: Need) -> tuple[Expert, jax.Array]:
        """Puts what is missing into slots, for a step that needs no more than fit.

        The last group may still travel: a program waits for it on the device. `settle` must be
        called when that has been started.

        Returns:
            the slots' arrays, and where each expert is in them: int32 [E], −1 for absent.
        """
        cache = self._caches[need.at]
        keep = {*need.held, *need.missing}
        places = {expert: cache.admit(expert, keep) for expert in need.missing}
        for group in self._streamed(need, self._wait, wait=False):
            for expert, arrays in group.items():
                self._place(need, places[expert], expert, arrays)
            group.clear()  # or its memory would be taken for one group longer
        return self.in_slots(need.at)

    def settle(self, need: Need) -> None:
        """Waits until all is there that `into_slots` has put into slots."""
        if need.missing:
            self._wait()
        self.transfers.give_up(need.layer)

    def waves(self, need: Need, *, alike: bool = False) -> Iterator[Wave]:
        """All that is needed, some at a time.

        What is streamed stays where the step uses it more than what a slot holds, or where all
        fits: its weights are on the device already.

        Args:
            need: of a layer.
            alike: experts in slots come in groups of W, too, each by itself: so what is computed
                does not depend on which experts are where.
        """
        cache, slots = self._caches[need.at], self._slots[need.at]
        held = self._grouped(need.held if alike else ())
        missing = self._grouped(need.missing)
        tables = iter([self._put(self._table(need, group)) for group in (*held, *missing)])
        held_E = cache.slot_E.copy()
        held_E[list(need.missing)] = -1  # or what is there in fewer bits would come twice
        slot_E = self._put(held_E)
        for first in missing[:1]:
            self.transfers.ask(need.layer, first)
        if need.held and not alike:
            yield Wave(slots.arrays, slot_E, stacked=True)
        last: Wave | None = None

        def computed() -> None:
            nonlocal last
            if last is not None and last.done is not None:
                jax.block_until_ready(last.done)
            last = None

        for experts in held:
            computed()
            places = [int(cache.slot_E[expert]) for expert in experts]
            # No name for the copies: it would keep them for one group longer.
            last = self._wave(dict(zip(experts, map(slots.get, places))), next(tables))
            yield last
            last.weights = ()
            last.weights = ()
        for group in self._streamed(need, computed):
            last = self._wave(group, next(tables))
            yield last
            self._keep(need, group)
            last.weights = ()
            del group  # or its memory would be taken for one group longer
        self.transfers.give_up(need.layer)

    def _grouped(self, experts: Sequence[int]) -> list[Sequence[int]]:
        size = self.room.wave
        return [experts[i : i + size] for i in range(0, len(experts), size)]

    def _table(self, need: Need, group: Sequence[int]) -> np.ndarray:
        """Where each expert is in a group, int32 [E]."""
        slot_E = np.full(len(need.count_E), -1, np.int32)
        slot_E[list(group)] = np.arange(len(group), dtype=np.int32)
        return slot_E

    def _wave(self, group: dict[int, Expert], slot_E: jax.Array) -> Wave:
        """A group of experts that lie each by itself; filled up, so that one program serves all."""
        weights = [*group.values()]
        weights += weights[-1:] * (self.room.wave - len(weights))
        return Wave(tuple(weights), slot_E, stacked=False)

    def _put(self, array: np.ndarray) -> jax.Array:
        """A small array onto the device.

        It would wait for experts whose transfer began earlier: so these are sent before any that
        the program which needs the array does not wait for, too.
        """
        return jax.device_put(array, self._here)

    def stats(self) -> OffloadStats:
        """What was done so far."""
        moved = self.transfers.moved
        return OffloadStats(
            slots=sum(self.room.slots_L),
            experts=sum(self.experts_L),
            layers=len(self.layers),
            decode=Uses(**vars(self._uses[True])),
            prefill=Uses(**vars(self._uses[False])),
            decoded_tokens=self._tokens,
            decode_stall_seconds=self._stall[True],
            prefill_stall_seconds=self._stall[False],
            asked_bytes=moved.asked_bytes,
            guessed_bytes=moved.guessed_bytes,
            vain_bytes=moved.vain_bytes,
            read_bytes=self.store.read_bytes - self._read_to_fill,
        )

    def reset(self) -> None:
        """Begins anew after a step has failed: who knows what is in the slots.

        They are filled when the next step begins, if one does.
        """
        self.transfers.forget()
        self.guesses.forget()
        self.worth.forget()
        self._lost = True

    def close(self) -> None:
        """Ends what goes on beside the steps; when no step comes any more."""
        self.transfers.close()

    def _at_first(self, at: int) -> list[int]:
        """What the slots hold before anything is known: the most used experts, if fits say so."""
        fits, experts = self.config.fits, self.experts_L[at]
        order = np.arange(experts)
        if fits is not None:
            order = np.argsort(-fits.frequency_LE[at, :experts], kind="stable")
        return order[: self.room.slots_L[at]].tolist()

    def _guess(self, need: Need) -> None:
        """Starts a guess for the next layer: as many experts as this one needs, at most.

        Those that pay, if copies start at once; where threads read, what is asked for goes first.
        """
        found = self.guesses.ahead(need.at)
        if found is None:
            return
        target, scores_E = found
        if target == need.at:  # the only layer, whose experts are on their way or here
            return
        like = len(need.held) + len(need.missing)
        best = np.argsort(-scores_E, kind="stable")[:like].tolist()
        lacking = self._caches[target].missing(best) + self._poor(target, best)
        self.worth.expect(target, lacking)
        if self.config.guesses == "paying" and not self.store.threaded:
            lacking = lacking[: self.worth.count(self._decodes, len(lacking))]
        self.transfers.guess(self.layers[target], lacking)

    def _streamed(
        self, need: Need, computed: Callable[[], None], *, wait: bool = True
    ) -> Iterator[dict[int, Expert]]:
        """What is missing, in groups of W: while one is used, the next one travels.

        When nothing is left to be started, the guess for the next layer is.

        Args:
            need: of a layer.
            computed: waits until the group before has been used, or is there.
            wait: until a group is there.
        """
        groups = self._grouped(need.missing)
        self._left = time.perf_counter()
        if not groups:
            self._guess(need)
        for number, group in enumerate(groups):
            computed()
            for ahead in groups[number : number + 2]:
                self.transfers.ask(need.layer, ahead)
            if number == max(len(groups) - 2, 0):
                self._guess(need)
            with self._stalling():
                arrived = {e: self.transfers.take(need.layer, e, wait=wait) for e in group}
            yield arrived
            del arrived

    def _wait(self) -> None:
        with self._stalling():
            self.transfers.settle()

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        """What the host waits for weights meanwhile counts for the steps of this kind."""
        before = self.transfers.moved.stall_seconds
        yield
        self._stall[self._decodes] += self.transfers.moved.stall_seconds - before
        self._left = time.perf_counter()

    def _keep(self, need: Need, group: dict[int, Expert]) -> None:
        """Puts streamed experts into slots, if they are worth it."""
        cache, count_E = self._caches[need.at], need.count_E
        for expert, arrays in group.items():
            least = 1 if need.fits else count_E[expert]
            stay = [held for held in cache.held if count_E[held] >= least]
            if expert in cache or len(stay) < cache.slots:  # in 8 bits until now, or another's
                self._place(need, cache.admit(expert, stay), expert, arrays)

    def _place(self, need: Need, slot: int, expert: int, arrays: Expert) -> None:
        """Puts an expert into a slot, and notes whether it came in fewer bits."""
        self._slots[need.at].put(slot, expert, arrays)
        (self._low[need.at].add if expert in need.low else self._low[need.at].discard)(expert)
