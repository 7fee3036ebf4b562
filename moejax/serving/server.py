"""Runs the application on a socket until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moejax.errors import UserError
from moejax.serving.loop import EngineLoop

__all__ = ["HttpServer"]

_MAX_HEADERS = 32 << 10
_HEAD_SECONDS = 30.0  # in which the head of a request must come
_AFTER_GRACE = 5  # seconds in which clients are told that their texts end early


class _Protocol(H11Protocol):
    """Closes a connection that does not bring a whole head in time.

    uvicorn has a limit for the pause between two requests, but none for a request's head.
    """

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Not begun anew by each byte that comes.
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_head()

    def _expect_head(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget_head()
        elif self._head is None:
            self._head = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `HttpServer`: its program has to end well, not by the signal."""
        yield


class HttpServer:
    """An application on a socket.

    port: that it listens on.

    Args:
        app: the application.
        loop: the engine's; it is stopped with the server, and the server if the engine fails.
        host: address to listen on.
        port: 0 takes a free one.
        grace: seconds that requests under way may take when the server is stopped.

    Raises:
        UserError: the address cannot be listened on.
    """

    def __init__(
        self,
        app: Any,
        loop: EngineLoop,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        grace: float = 30.0,
    ):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=1024)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--host {host} --port {port}: cannot listen there "
                f"({getattr(error, 'strerror', None) or error}); choose another"
            ) from None
        self.port: int = self._socket.getsockname()[1]
        self._loop, self._grace = loop, grace
        self._stopper: threading.Thread | None = None
        loop.on_failure = self.stop
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                http=_Protocol,
                ws="none",
                loop="asyncio",
                server_header=False,
                timeout_keep_alive=30,
                h11_max_incomplete_event_size=_MAX_HEADERS,
                timeout_graceful_shutdown=math.ceil(grace) + _AFTER_GRACE,
            )
        )

    def run(self) -> None:
        """Serves until `stop`, or until SIGINT or SIGTERM; a second signal ends at once."""
        asyncio.run(self._run())
        if self._stopper is not None:
            self._stopper.join()
        self._loop.stop()

    @property
    def stopping(self) -> bool:
        """Whether it has been told to stop."""
        return self._stopper is not None

    def stop(self) -> None:
        """Takes no more requests and ends when those under way have; from any thread.

        Called again, it waits for nothing.
        """
        if self._stopper is not None:
            # Asked again: what is under way ends now.
            self._uvicorn.force_exit = True
            threading.Thread(target=self._loop.stop, daemon=True).start()
            return
        self._loop.refuse()
        self._stopper = threading.Thread(target=self._loop.stop, args=(self._grace,), daemon=True)
        self._stopper.start()
        self._uvicorn.should_exit = True

    async def _run(self) -> None:
        here = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Not in a thread other than the main one, and not on every system.
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                here.add_signal_handler(number, self.stop)
        await self._uvicorn.serve(sockets=[self._socket])
