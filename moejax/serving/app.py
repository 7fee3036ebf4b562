"""The OpenAI-like HTTP interface: models, completions, chats, health, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moejax.errors import UserError
from moejax.serving.answers import Answer
from moejax.serving.errors import ApiError
from moejax.serving.http import (
    AccessLog,
    RequireKey,
    error_response,
    json_response,
    read_json,
)
from moejax.serving.json_text import to_json
from moejax.serving.loop import EngineLoop, Piece
from moejax.serving.metrics_text import CONTENT_TYPE, metrics_text
from moejax.serving.protocol import ENDPOINTS, Job, Kind, read_job
from moejax.serving.text_model import TextModel

__all__ = ["AppSettings", "make_app"]

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would hold chunks back
]


@dataclass(frozen=True)
class AppSettings:
    """Limits of what clients may do.

    api_key: that they must bring; None: none.
    max_body: bytes of a request's body.
    body_seconds: most time for a body to come.
    request_seconds: most time for an answer.
    """

    api_key: str | None = None
    max_body: int = 4 << 20
    body_seconds: float = 30.0
    request_seconds: float = 600.0


def make_app(model: TextModel, loop: EngineLoop, settings: AppSettings | None = None) -> Starlette:
    """The ASGI application.

    Args:
        model: what is served.
        loop: runs the engine; started by the caller.
        settings: limits.
    """
    settings = settings or AppSettings()
    created = int(time.time())
    card = {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "moejax",
        "max_model_len": loop.engine.max_len,
    }

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [card]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != model.name:
            raise ApiError(404, f"model {name!r:.80}: not served here", code="model_not_found")
        return json_response(card)

    async def health(request: Request) -> Response:
        status = "failed" if loop.failure else "stopping" if loop.refusing else "ok"
        stats = asdict(loop.stats)
        return json_response({"status": status, **stats}, 200 if status == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return Response(metrics_text(loop.stats), headers={"content-type": CONTENT_TYPE})

    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        *(
            Route(path, _Generate(kind, model, loop, settings), methods=["POST"])
            for path, kind in ENDPOINTS.items()
        ),
    ]
    middleware = [Middleware(AccessLog)]
    if settings.api_key is not None:
        middleware.append(Middleware(RequireKey, key=settings.api_key))
    handlers: Any = {ApiError: error_response, HTTPException: error_response}
    # Any other exception is a bug: its handler answers, and the server prints the traceback.
    handlers[Exception] = error_response
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class _Generate:
    """An endpoint that runs requests on the engine."""

    def __init__(self, kind: Kind, model: TextModel, loop: EngineLoop, settings: AppSettings):
        self._kind: Kind = kind
        self._model, self._loop, self._settings = model, loop, settings
        self._reading = 0
        # Chats are rendered one after the other: they must not fill the threads of all.
        self._threads = ThreadPoolExecutor(1, "moejax-chats") if kind == "chat" else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings, seconds = self._settings, self._settings.request_seconds
        exchange = _Exchange(scope, receive, send)
        try:
            body = await read_json(
                Request(scope, receive),
                max_bytes=settings.max_body,
                seconds=settings.body_seconds,
                refusing=lambda: self._loop.refusing,
            )
            async with asyncio.timeout(seconds):
                await self._answer(await self._read(body), exchange)
        except ClientDisconnect:
            return
        except TimeoutError:
            await exchange.fail(ApiError(504, f"no answer within {seconds:g} seconds"))
        except ApiError as error:
            await exchange.fail(error)

    async def _read(self, body: Any) -> Job:
        """The job of a body, made in another thread: long texts and templates take their time."""
        engine = self._loop.engine
        if self._reading >= engine.settings.max_waiting:
            raise ApiError(
                429, f"{self._reading} requests wait already: try again later", code="queue_full"
            )
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, read_job, self._kind, body, self._model, engine.max_len
            )
        finally:
            self._reading -= 1

    async def _answer(self, job: Job, exchange: _Exchange) -> None:
        answer = Answer(job, self._model)
        exchange.scope["moejax.tokens"]["in"] = sum(map(len, job.prompts))
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        here = asyncio.get_running_loop()
        try:
            ticket = self._loop.submit(
                job.prompts,
                job.params,
                lambda piece: here.call_soon_threadsafe(pieces.put_nowait, piece),  # type: ignore[arg-type,return-value]
            )
        except UserError as error:
            raise ApiError.of(error, "messages" if job.kind == "chat" else "prompt") from None
        watch = asyncio.create_task(exchange.tell_when_gone(pieces))
        try:
            if job.stream:
                await self._stream(answer, pieces, exchange)
            else:
                async for several in _taken(answer, pieces):
                    del several
                await json_response(answer.body(), headers={"x-request-id": answer.id})(
                    exchange.scope, exchange.receive, exchange.send
                )
        finally:
            self._loop.cancel(ticket)
            exchange.scope["moejax.tokens"]["out"] = answer.generated
            watch.cancel()

    async def _stream(
        self, answer: Answer, pieces: asyncio.Queue[Piece | None], exchange: _Exchange
    ) -> None:
        await exchange.begin_stream(answer.id)
        async for chunks in _taken(answer, pieces):
            await exchange.send_events(map(to_json, chunks))
        await exchange.send_events([*map(to_json, answer.last_chunks()), b"[DONE]"])
        await exchange.end_stream()


async def _taken(
    answer: Answer, pieces: asyncio.Queue[Piece | None]
) -> AsyncIterator[list[dict[str, Any]]]:
    """The chunks that are due, until all texts have ended; those of a moment together."""
    while not answer.done:
        waiting = [await pieces.get()]
        while not pieces.empty():
            waiting.append(pieces.get_nowait())
        chunks = []
        for piece in waiting:
            if piece is None:
                raise ClientDisconnect
            chunks += answer.take(piece)
        yield chunks


class _Exchange:
    """One request and its answer; remembers whether the answer has begun."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.scope, self.receive, self.send = scope, receive, send
        self._streams = False

    async def tell_when_gone(self, pieces: asyncio.Queue[Piece | None]) -> None:
        """Puts None into the queue when the client has gone."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        pieces.put_nowait(None)

    async def begin_stream(self, request_id: str) -> None:
        self._streams = True
        headers = [*_EVENT_STREAM, (b"x-request-id", request_id.encode())]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send_events(self, events: Any) -> None:
        body = b"".join(b"data: %b\n\n" % event for event in events)
        if body:
            await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def end_stream(self) -> None:
        await self.send({"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        """Tells of an error, in the stream if it has begun."""
        if not self._streams:
            raise error
        # A client that does not read must not hold this task for ever.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self.send_events([to_json(error.body)])
                await self.end_stream()
