"""How an expert gets from its store to the device: at once, or through threads that read it.

Where experts lie in host memory, a copy is started and that is all. Where one has to be read first,
threads do it, so that the loop over layers waits only for what it needs: what is asked for goes
before what is guessed, one thread never reads a guess, and a guess that is given up before its turn
is not read at all. A thread has one expert at a time, from the files to the end of its transfer: so
of the host's memory there are never more than `THREADS` experts in use, however many are asked for.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax.sharding import NamedSharding

from moejax.offload.low import LowExpert, restored
from moejax.offload.parts import BankLayout
from moejax.offload.store import Expert, Store

__all__ = ["THREADS", "Coming", "Sender", "sender_of"]

THREADS = 4
"""Of a store that reads; one of them reads only what is asked for."""


class Coming(Protocol):
    """An expert on its way."""

    def wait(self) -> None:
        """Until it is there."""

    def arrays(self) -> Expert:
        """Its arrays on the device, which may still be on their way there; to be called once.

        Their memory is free when this object is let go of, too.
        """

    def is_there(self) -> bool:
        """Whether nothing of it is under way any more."""

    def hurry(self) -> None:
        """It is needed now."""

    def drop(self) -> bool:
        """It is not needed. Returns whether it had not begun, and never will."""


class Sender(Protocol):
    """What starts experts."""

    def send(self, layer: int, expert: int, *, asked: bool, low: bool) -> Coming:
        """Starts one, or has it wait for its turn; those that are asked for before guesses.

        Args:
            layer, expert: which one.
            asked: not guessed.
            low: in fewer bits; the store has such copies.
        """

    def close(self) -> None:
        """Ends what it has started; nothing is sent any more."""


def sender_of(store: Store, device: NamedSharding) -> Sender:
    """What brings a store's experts to the device."""
    return _Threads(store, device) if store.threaded else _AtOnce(store, device)


class _Copy:
    """A copy that the runtime makes by itself."""

    def __init__(self, arrays: Any) -> None:
        self._arrays = arrays

    def wait(self) -> None:
        jax.block_until_ready(self._arrays)

    def arrays(self) -> Expert:
        return self._arrays

    def is_there(self) -> bool:
        return all(array.is_ready() for array in jax.tree.leaves(self._arrays))

    def hurry(self) -> None:
        pass

    def drop(self) -> bool:
        return False


class _LowCopy(_Copy):
    """A copy in fewer bits, which becomes an expert on the device."""

    def __init__(self, bank: BankLayout, arrays: LowExpert) -> None:
        super().__init__(arrays)
        self._bank = bank

    def arrays(self) -> Expert:
        return restored(self._bank, self._arrays)


class _AtOnce:
    def __init__(self, store: Store, device: NamedSharding) -> None:
        self._store, self._device = store, device

    def send(self, layer: int, expert: int, *, asked: bool, low: bool) -> Coming:
        del asked  # copies come in the order in which they are started
        if low:
            copy = jax.device_put(self._store.low(layer, expert), self._device)
            return _LowCopy(self._store.banks[layer], copy)
        return _Copy(jax.device_put(self._store.expert(layer, expert), self._device))

    def close(self) -> None:
        pass


class _Queue:
    """What is to be read, by what is waited for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.asked: deque[_Reading] = deque()
        self.guessed: deque[_Reading] = deque()
        self.closed = False

    def get(self, guesses: bool) -> _Reading | None:
        """The next one, when there is one; None when there never will be."""
        with self.changed:
            while not (self.closed or self.asked or (guesses and self.guessed)):
                self.changed.wait()
            if self.closed:
                return None
            reading = (self.asked or self.guessed).popleft()
            reading.begun = True
            return reading


class _Reading:
    """An expert that a thread reads and sends.

    begun: whether a thread has it; changed under the queue's lock.
    """

    def __init__(self, queue: _Queue, run: Callable[[], Expert]) -> None:
        self.begun = False
        self._queue, self._run = queue, run
        self._done = threading.Event()
        self._arrays: Expert | None = None
        self._error: BaseException | None = None

    def read(self) -> None:
        """In a thread; afterwards the thread holds nothing of it."""
        try:
            self._arrays = self._run()
        except BaseException as error:  # whoever waits for it is told
            self._error = error
        self._done.set()

    def wait(self) -> None:
        self.hurry()
        self._done.wait()
        if self._error is not None:
            raise self._error

    def arrays(self) -> Expert:
        self.wait()
        arrays, self._arrays = self._arrays, None
        assert arrays is not None, "an expert is taken once"
        return arrays

    def is_there(self) -> bool:
        return self._done.is_set()

    def hurry(self) -> None:
        queue = self._queue
        with queue.changed:
            if not self.begun and self in queue.guessed:
                queue.guessed.remove(self)
                queue.asked.append(self)
                queue.changed.notify_all()

    def drop(self) -> bool:
        queue = self._queue
        with queue.changed:
            if self.begun:
                return False
            (queue.asked if self in queue.asked else queue.guessed).remove(self)
            return True


class _Threads:
    """Threads, which end with this object or the program."""

    def __init__(self, store: Store, device: NamedSharding) -> None:
        self._store, self._device, self._queue = store, device, _Queue()
        threads = [
            # The first one is there for what is asked for.
            threading.Thread(target=_work, args=(self._queue, number > 0), daemon=True)
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        self._end = weakref.finalize(self, _end, self._queue, threads)

    def send(self, layer: int, expert: int, *, asked: bool, low: bool) -> Coming:
        assert not low, "OffloadConfig refuses it"
        store, device, queue = self._store, self._device, self._queue

        def run() -> Expert:
            # Until it is there, for as long the thread holds the host's copy.
            return jax.block_until_ready(jax.device_put(store.expert(layer, expert), device))

        reading = _Reading(queue, run)
        with queue.changed:
            (queue.asked if asked else queue.guessed).append(reading)
            queue.changed.notify_all()
        return reading

    def close(self) -> None:
        self._end()


def _work(queue: _Queue, guesses: bool) -> None:
    while (reading := queue.get(guesses)) is not None:
        reading.read()
        del reading  # or its arrays would live until there is another


def _end(queue: _Queue, threads: list[threading.Thread]) -> None:
    """Ends the threads: one that is at work when the program ends would be cut off within JAX."""
    with queue.changed:
        queue.closed = True
        queue.changed.notify_all()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
