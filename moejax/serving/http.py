"""What is the same for every request: reading a body, writing JSON, keys, the access log."""

from __future__ import annotations

import asyncio
import hmac
import sys
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moejax.serving.errors import ApiError
from moejax.serving.json_text import parse_json, to_json

__all__ = ["AccessLog", "RequireKey", "error_response", "json_response", "read_json"]

_OPEN = ("/health",)
_REFUSING_SECONDS = 0.2  # between two looks


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response that is JSON."""
    return Response(to_json(value), status, headers, "application/json")


async def error_response(request: Request, error: Exception) -> Response:
    """The response to an exception; of a bug the client learns nothing."""
    if isinstance(error, HTTPException):
        where = f"{request.method} {_shown(request.scope)}"
        error = ApiError(error.status_code, f"{where}: {error.detail}", code="no_such_endpoint")
    if not isinstance(error, ApiError):
        error = ApiError(500, "the server has failed; see its log", code="internal_error")
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status, {})
    if error.status in (408, 413, 503):
        # The rest of the body is not read.
        headers = {"connection": "close"}
    return json_response(error.body, error.status, headers)


async def read_json(
    request: Request, *, max_bytes: int, seconds: float, refusing: Callable[[], bool]
) -> Any:
    """The body of a request.

    Args:
        request: whose body has not been read.
        max_bytes: most bytes of a body.
        seconds: most time for it to come.
        refusing: whether the server takes no more requests; asked now and then.

    Raises:
        ApiError: 415 for another type than JSON, 413, 408, 503 when refused, or 400 for what is no
            JSON in UTF-8.
        ClientDisconnect: the client has gone.
    """
    # Web pages cannot send this type to another site unasked.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "content-type: must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "content-encoding: send the body as it is")
    data = bytearray()
    try:
        async with asyncio.timeout(seconds) as limit:
            watch = asyncio.create_task(_end_when(refusing, limit))
            try:
                async for part in request.stream():
                    data += part
                    if len(data) > max_bytes:
                        raise ApiError(413, f"the body is larger than {max_bytes} bytes")
            finally:
                watch.cancel()
    except TimeoutError:
        if refusing():
            told = "the server is being stopped and takes no more requests"
            raise ApiError(503, told, code="stopping") from None
        raise ApiError(408, f"the body did not come within {seconds:g} seconds") from None
    return parse_json(bytes(data))


async def _end_when(refusing: Callable[[], bool], limit: asyncio.Timeout) -> None:
    """Lets a time limit pass at once when no more requests are taken."""
    while not refusing():
        await asyncio.sleep(_REFUSING_SECONDS)
    limit.reschedule(asyncio.get_running_loop().time())


class RequireKey:
    """Lets requests pass that bring the key; `/health` needs none.

    Args:
        app: what they pass to.
        key: must come as `Authorization: Bearer KEY`.
    """

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._expected = app, b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401, or passes the request on."""
        if scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            # In the same time, however much of it is right.
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "wrong or missing API key", code="invalid_api_key")
                response = await error_response(Request(scope), error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class AccessLog:
    """Writes a line to stderr for each request: who, what, status, time, tokens; no contents."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and writes its line when it is over."""
        start, status = time.perf_counter(), 0
        tokens: dict[str, int] = {}
        scope["moejax.tokens"] = tokens

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - start
            client = (scope.get("client") or ("-",))[0]
            counts = "".join(f" {name}={count}" for name, count in tokens.items())
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
            # 499 as nginx writes it: the client went before there was an answer.
            line = f"{scope['method']} {_shown(scope)} {status or 499} {seconds:.3f}s{counts}"
            print(f"{stamp} {client} {line}", file=sys.stderr, flush=True)


def _shown(scope: Scope) -> str:
    """The path, without its query, and without characters that a terminal would obey."""
    return urllib.parse.quote(scope["path"], safe="/")[:100]
