"""The thread that owns the engine: requests go in from any thread, pieces of text come out."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.engine import Engine, EngineStats, Event, TokenLogprobs
from moejax.inference.params import SamplingParams
from moejax.inference.text import TextStream

__all__ = ["EngineLoop", "Listener", "Piece", "Stopping", "Ticket"]

_STATS_SECONDS = 0.5


class Stopping(UserError):
    """The loop takes no more requests: it is being stopped, or the engine has failed."""


@dataclass(frozen=True)
class Piece:
    """News of one text of a request.

    choice: which text: of prompt p and n texts each, p·n to p·n + n - 1; -1 stands for all.
    text: that is now certain; text that may yet begin a stop string is held back.
    tokens: new ids; their text may come with a later piece.
    logprobs: of each of `tokens`, if they were asked for.
    finish: None while the text goes on. `stop`: the model ended it or a stop string came; `length`:
        `max_tokens` were made or the context is full; `cancelled`: the loop was stopped; `failed`:
        the engine broke down.
    stopped: with `stop`, whether a stop string came.
    """

    choice: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Literal["stop", "length", "cancelled", "failed"] | None = None
    stopped: bool = False


Listener = Callable[[Piece], None]
"""Called in the loop's thread: it must be quick and must not call the loop. One that raises is
taken for gone, and its request is cancelled."""


@dataclass(eq=False)
class Ticket:
    """A request under way.

    listener: gets its pieces.
    ids: of the engine's requests, one a prompt.
    left: texts that have not ended.
    """

    listener: Listener
    ids: list[int] = field(default_factory=list)
    left: int = 0


@dataclass
class _Prompt:
    """One prompt of a request: the texts that continue it and have not ended, by index."""

    ticket: Ticket
    first: int
    streams: dict[int, TextStream]


class EngineLoop:
    """Runs an engine in a thread of its own.

    Stop strings are looked for here, and end a text through `Engine.cancel`.

    Args:
        engine: stepped by the loop alone.
        tokenizer: of its texts.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine = engine
        self.tokenizer = tokenizer
        self.stats: EngineStats = engine.stats()
        """Of the engine, at most half a second old while it works."""
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        """Called once, in the loop's thread, when the engine has raised an exception."""
        self._prompts: dict[int, _Prompt] = {}
        self._refusing = self._ended = False
        # Guards the three above; `_emptied` tells that no request is left.
        self._lock = threading.Lock()
        self._emptied = threading.Condition(self._lock)
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moejax-engine", daemon=True)

    def start(self) -> EngineLoop:
        """Starts the thread; returns the loop itself."""
        self._thread.start()
        return self

    @property
    def refusing(self) -> bool:
        """Whether new requests are refused."""
        return self._refusing

    @property
    def active(self) -> int:
        """Requests under way, each prompt of one counted."""
        return len(self._prompts)

    def submit(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        params: SamplingParams,
        listener: Listener,
        *,
        stream: int = 0,
    ) -> Ticket:
        """Hands prompts to the engine; from any thread. All are taken, or none.

        Args:
            prompts: token ids of each.
            params: how to continue them.
            listener: gets the pieces.
            stream: of the random numbers, see `Engine.add`.

        Raises:
            QueueFull: too many requests wait.
            Stopping: the loop takes no more.
            UserError: a prompt is refused.
        """
        most = self.engine.settings.max_waiting
        if len(prompts) > most:
            raise UserError(f"{len(prompts)} prompts in one request: at most {most} may wait")
        ticket = Ticket(listener, left=len(prompts) * params.n)
        with self._lock:
            if self._refusing:
                raise Stopping("the server is being stopped and takes no more requests")
            try:
                for number, prompt in enumerate(prompts):
                    streams = {
                        i: TextStream(self.tokenizer, params.stop, params.min_tokens)
                        for i in range(params.n)
                    }
                    request = self.engine.add(prompt, params, stream=stream)
                    ticket.ids.append(request)
                    self._prompts[request] = _Prompt(ticket, number * params.n, streams)
            except BaseException:
                self._drop(ticket)
                raise
        self._wake.set()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request; from any thread. Its listener hears no more of it."""
        with self._lock:
            self._drop(ticket)
        self._wake.set()

    def refuse(self) -> None:
        """Takes no more requests; those under way go on."""
        with self._lock:
            self._refusing = True

    def stop(self, grace: float = 0.0) -> None:
        """Ends the thread, after at most `grace` seconds for the requests under way.

        Texts that have not ended by then are `cancelled`.
        """
        end = time.monotonic() + grace
        with self._lock:
            self._refusing = True
            while self._prompts and self._thread.is_alive():
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._emptied.wait(min(left, 0.2))
            self._end_all("cancelled")
            self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    # --- in the loop's thread, or under its lock -----------------------------------------------

    def _run(self) -> None:
        engine = self.engine
        try:
            while not self._ended:
                self._wake.wait()
                # Cleared first: what comes from here on is seen now or wakes the loop again.
                self._wake.clear()
                read = 0.0
                while engine.has_work:
                    for event in engine.step():
                        self._deliver(event)
                    if time.monotonic() - read > _STATS_SECONDS:
                        self.stats, read = engine.stats(), time.monotonic()
                self.stats = engine.stats()
        except BaseException as error:
            traceback.print_exc()
            with self._lock:
                self.failure, self._refusing = error, True
                self._end_all("failed")
            self.on_failure()

    def _deliver(self, event: Event) -> None:
        with self._lock:
            prompt = self._prompts.get(event.id)
            stream = prompt.streams.get(event.index) if prompt else None
            if prompt is None or stream is None:
                return  # cancelled a moment ago
            text = "".join(stream.push(token) for token in event.tokens)
            finish = event.finish
            if stream.stopped:
                if finish is None:
                    self.engine.cancel(event.id, event.index)
                finish = "stop"
            elif finish is not None:
                text += stream.flush()
                # What was held back may end in a stop string.
                finish = "stop" if stream.stopped else finish
            ticket = prompt.ticket
            if finish is not None:
                del prompt.streams[event.index]
                ticket.left -= 1
                if not prompt.streams:
                    self._forget(event.id)
            choice = prompt.first + event.index
            piece = Piece(choice, text, event.tokens, event.logprobs, finish, stream.stopped)
            try:
                ticket.listener(piece)
            except Exception:
                traceback.print_exc()
                self._drop(ticket)

    def _drop(self, ticket: Ticket) -> None:
        for request in ticket.ids:
            if request in self._prompts:
                self.engine.cancel(request)
                self._forget(request)

    def _forget(self, request: int) -> None:
        del self._prompts[request]
        if not self._prompts:
            self._emptied.notify_all()

    def _end_all(self, finish: Literal["cancelled", "failed"]) -> None:
        for ticket in {prompt.ticket for prompt in self._prompts.values()}:
            self._drop(ticket)
            try:
                ticket.listener(Piece(-1, finish=finish))
            except Exception:
                traceback.print_exc()
