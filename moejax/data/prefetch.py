"""Preparing the next steps' batches in a thread while the devices work."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

T = TypeVar("T")


class Prefetcher(Iterator[T], Generic[T]):
    """Yields `make(start_step)`, `make(start_step + 1)`, … made ahead of time in one thread.

    What `make` raises is raised by `next` at its place in the order, and again by every `next`
    after it. Use it in a `with` statement, or call `close`.
    """

    def __init__(self, make: Callable[[int], T], start_step: int, depth: int = 2):
        """Starts the thread.

        Args:
            make: called with one step number after the other, in the thread.
            start_step: the first step.
            depth: how many results may lie ready; bounds the memory.
        """
        if depth < 1:
            raise ValueError(f"depth {depth}: must be at least 1")
        self._make = make
        self._depth = depth
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._run, args=(start_step,), name="prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, step: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                if self._closed:
                    return
            try:
                value = self._make(step)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready.append(value)
                self._changed.notify_all()
            step += 1

    def __next__(self) -> T:
        """The next step's result; waits for it.

        Raises:
            RuntimeError: the prefetcher is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready or self._error is not None)
            if self._closed:
                raise RuntimeError("the prefetcher is closed")
            if self._ready:
                value = self._ready.popleft()
                self._changed.notify_all()
                return value
            assert self._error is not None
            raise self._error

    def close(self) -> None:
        """Ends the thread, after the call of `make` that may be under way, and drops results."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
