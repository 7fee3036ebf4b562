"""Connections between process 0 and the others: they meet, agree on small values, end together.

A program over several processes waits for ever where one of them is gone: a collective has no time
limit. So every process keeps a connection to process 0, and whoever sees one break, or is told that
a process has failed, ends its own process with a line that says so. The system closes connections
however a process dies; a host that is cut off is noticed by keep-alive packets, in half a minute.

What travels is JSON, four bytes of length first. Nothing here knows of JAX.
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from sharding.meeting import KEEP_ALIVE, Meeting, receive, send

__all__ = ["Lifeline"]

_LAST_WORDS = 5.0  # seconds that a process which ends waits for the word of process 0
_HEARD = 0.5  # seconds in which the others read the last word of process 0
_LONGEST = 600
_END = "end"
_LOST = "it has ended without a word, or its host cannot be reached"
_ADVICE = "see what that process said, then start all again"


class Lifeline:
    """One process's connections; all processes make the same calls in the same order.

    Args:
        meeting: how it began.
        end: ends the process with a code, without waiting for anything.

    Attributes:
        process, processes: the number of this one, and how many there are.
        hosts: names of the machines, one a process.
        host_numbers: the same for processes of the same machine.
    """

    def __init__(self, meeting: Meeting, end: Callable[[int], Any] = os._exit):
        self.process, self.processes = meeting.process, meeting.processes
        self.hosts = meeting.hosts
        numbers = {host: number for number, host in reversed([*enumerate(self.hosts)])}
        self.host_numbers = tuple(numbers[host] for host in self.hosts)
        self._peers: dict[int, socket.socket] = meeting.peers  # process 0 has all, others process 0
        self._end = end
        self._inbox: dict[int, queue.SimpleQueue[Any]] = {
            number: queue.SimpleQueue() for number in self._peers
        }
        self._turn = threading.Lock()
        self._sending = threading.Lock()
        self._deciding = threading.Lock()
        self._verdict: tuple[int, str] | None = None
        self._judged = threading.Event()
        self._own: str | None = None  # why this process fails, while it waits for the verdict
        self._saying, self._said = threading.Lock(), False
        self._gone: set[int] = set()  # whose connections have ended
        self._ended: set[int] = set()  # that have come to their good end
        for peer in self._peers.values():
            for option in KEEP_ALIVE:
                peer.setsockopt(*option)
            peer.settimeout(None)
        self._thread = threading.Thread(target=self._listen, name="lifeline", daemon=True)
        self._thread.start()

    def collect(self, name: str, value: Any) -> list[Any]:
        """In process 0 what each gave, in their order; elsewhere nothing, and nobody is waited for.

        Args:
            name: of what is collected, to notice when processes are not at the same place.
            value: what JSON can hold.

        Raises:
            RuntimeError: another process is somewhere else in the program.
        """
        with self._turn:
            if self.process:
                self._send(0, {"at": name, "value": value})
                return []
            return [value, *(self._take(number, name) for number in sorted(self._peers))]

    def from_first(self, name: str, value: Any) -> Any:
        """What process 0 gave; process 0 waits for nobody.

        Args:
            name, value: as for `collect`; other processes' values are not looked at.

        Raises:
            RuntimeError: as there.
        """
        with self._turn:
            if self.process:
                return self._take(0, name)
            for number in self._peers:
                self._send(number, {"at": name, "value": value})
            return value

    def fail(self, why: str, code: int, say: Callable[[], Any], wait: float = 0.0) -> NoReturn:
        """Ends all processes: this one says why itself, the others are told; never returns.

        Args:
            why: one line.
            code: of this process's exit.
            say: prints what is wrong. Not called where another process has said the same, or has
                failed before and so is the reason.
            wait: seconds in which to learn that another process was the reason.
        """
        self._own = why  # from here on the other thread leaves the ending to this one
        self._judged.wait(wait)
        if self.process == 0 or 0 in self._gone:
            self._settle(self.process, why)
        else:
            with contextlib.suppress(OSError):
                self._send(0, {"failed": [self.process, why]})
            self._judged.wait(_LAST_WORDS)
        first, reason = self._verdict or (self.process, why)
        if first == self.process:
            say()
        elif reason != why:
            self._say_of(first, reason)
        self._leave(code)
        raise SystemExit(code)  # only where `end` comes back, in tests

    def fail_as_one(self, code: int, say: Callable[[], Any]) -> NoReturn:
        """Ends all processes, which all call this: process 0 says why; never returns.

        Args:
            code: of this process's exit.
            say: prints what is wrong.
        """
        if self.process == 0:
            say()
        self.close()
        self._leave(code)
        raise SystemExit(code)  # only where `end` comes back, in tests

    def close(self) -> None:
        """The good end: waits until all processes are there, so that none takes it for a failure.

        Nothing can be exchanged afterwards.
        """
        self.collect(_END, None)
        self.from_first(_END, None)
        self._hang_up()
        self._thread.join(_LAST_WORDS)
        for peer in self._peers.values():
            peer.close()

    # --- of the thread that listens, too --------------------------------------------------------

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, number)
            while len(self._gone) < len(self._peers):
                for key, _ in selector.select():
                    number = key.data
                    try:
                        message = receive(self._peers[number])
                    except (OSError, ValueError):
                        message = None
                    if message is None:
                        selector.unregister(key.fileobj)
                        self._gone.add(number)
                        if number not in self._ended:
                            self._settle(number, _LOST)
                    elif "failed" in message:
                        self._settle(*message["failed"])
                    else:
                        if message["at"] == _END:
                            self._ended.add(number)
                        self._inbox[number].put(message)

    def _settle(self, number: int, why: str) -> None:
        """Which failure was the first: process 0 decides, and tells all."""
        with self._deciding:
            if self._verdict is None:
                self._verdict = (number, why)
                for other in () if self.process else self._peers.keys() - self._gone:
                    with contextlib.suppress(OSError):
                        self._send(other, {"failed": [number, why]})
        self._judged.set()
        if self._own is None and threading.current_thread() is self._thread:
            self._say_of(*self._verdict)
            self._leave(2)

    def _leave(self, code: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if not self.process:
            time.sleep(_HEARD)  # what was sent has to be read before the connections break
        self._end(code)

    def _say_of(self, number: int, why: str) -> None:
        # Two threads may learn of the same failure: the second one waits until it has been said.
        with self._saying, contextlib.suppress(OSError, ValueError):
            if self._said:
                return
            self._said = True
            print(
                f"error: process {number} of {self.processes} on {self.hosts[number]} has failed: "
                f"{why}; process {self.process} ends, too: {_ADVICE}",
                file=sys.stderr,
                flush=True,
            )

    def _send(self, number: int, message: Any) -> None:
        with self._sending:
            send(self._peers[number], message)

    def _take(self, number: int, name: str) -> Any:
        message = self._inbox[number].get()
        if message.get("at") != name:
            raise RuntimeError(
                f"process {self.process} exchanges {name!r} and process {number} "
                f"{message.get('at')!r}: they do not run the same program"
            )
        return message["value"]

    def _hang_up(self) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)


def one_line(text: str) -> str:
    """A text without line breaks, of at most some hundred characters."""
    return " ".join(text.split())[:_LONGEST]
