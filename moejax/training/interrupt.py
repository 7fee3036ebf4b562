"""Stopping a run in good order: SIGTERM or Ctrl-C asks, a second Ctrl-C insists."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupt"]


class Interrupt:
    """Turns SIGTERM and SIGINT into a flag that the training loop reads between steps.

    The first signal sets `requested`; a Ctrl-C after that raises KeyboardInterrupt where the
    program is. Outside the main thread, where Python has no signal handlers, nothing is installed.

        with Interrupt() as stop:
            for step in steps:
                ...
                if stop.requested:
                    break

    Attributes:
        requested: whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler before ours was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        name = signal.Signals(number).name
        hint = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        # os.write, since print is not reentrant and the signal may have come inside one.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: finishing this step, then saving{hint}\n".encode())
