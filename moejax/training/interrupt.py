"""Stopping a run in good order: SIGTERM or Ctrl-C asks, a second Ctrl-C insists.

Of several processes all stop after the same step, whichever got the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

__all__ = ["AgreedStop", "Interrupt"]


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


class AgreedStop:
    """Whether to stop, in all processes alike.

    With several of them each says at each step whether it has got a signal; a program of a few
    bytes, started behind the step's, adds that up on the devices. What comes out is read a step
    later, so that no device waits for it: a signal counts one or two steps after it came.

    Args:
        signals: of this process.
        mesh: with devices of all processes.
    """

    def __init__(self, signals: Interrupt, mesh: Mesh):
        from sharding.arrays import Vote
        from sharding.mesh import runs_in_turn

        self._signals = signals
        several = len({device.process_index for device in mesh.devices.flat}) > 1
        self._vote = Vote(mesh) if several else None
        # Fake devices run one program at a time: the result is there before the next step.
        self._late = not runs_in_turn(mesh)
        self._waiting: jax.Array | None = None

    def agreed(self) -> bool:
        """Whether to stop before the next step; all processes ask before each."""
        if self._vote is None:
            return self._signals.requested
        new = self._vote.start(self._signals.requested)
        told, self._waiting = (self._waiting, new) if self._late else (new, None)
        return told is not None and bool(told)

    def at_last(self) -> bool:
        """Whether a signal has come until now; all processes ask when the steps are over."""
        if self._vote is None:
            return self._signals.requested
        return bool(self._vote.start(self._signals.requested))
