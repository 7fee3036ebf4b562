"""Many clients at once against a server, some of which go away: `python -m moejax.serving.stress`.

What must hold: no request hangs, each answer is the text that its prompt has alone (up to the first
near tie), requests that are refused get 429, memory does not grow, and in the end all pages of the
cache are free.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moejax.cli import parse, run_main
from moejax.errors import UserError
from moejax.inference.params import SamplingParams
from moejax.serving.app import make_app
from moejax.serving.flags import EngineFlags
from moejax.serving.loop import EngineLoop, Piece
from moejax.serving.server import HttpServer
from moejax.serving.start import note, running_model
from moejax.serving.text_model import TextModel

__all__ = ["Findings", "StressConfig", "main", "stress"]

DESCRIPTION = "Many clients at once, some of which go away, against a server of a model."

_NEAR_TIE = 1e-3  # nats between the two best tokens, below which rounding may choose
_HANGS = 120.0  # seconds
_BEGINNINGS = ("def ", "import ", "class A", "for i in ", "return ", "# ", "x = [", "while ", "")


@dataclass(frozen=True)
class StressConfig(EngineFlags):
    """A trial.

    Attributes:
        seconds: how long new requests are made.
        clients: at once.
        leaving: share of the requests whose client goes away in the middle.
        prompts: different ones.
        max_tokens: most of a text; each request asks for some number up to that.
        seed: of the random numbers.
    """

    max_rows: int = 16
    max_len: int = 128
    max_waiting: int = 128
    seconds: float = 120.0
    clients: int = 200
    leaving: float = 0.2
    prompts: int = 16
    max_tokens: int = 24
    seed: int = 0


@dataclass
class Findings:
    """What came of it.

    counts: of answers by kind: `equal`, `streamed` (and equal), `refused`, `left`.
    wrong: what went wrong, a line each.
    memory: resident bytes of the process at a third of the time and at the end; 0 if not known.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Known:
    """The text of a prompt alone: beginnings of it, by number of tokens, up to a near tie.

    texts[i]: of i tokens. sure: of so many tokens the text is certain.
    """

    prompt: list[int]
    texts: list[str]
    sure: int


def main(argv: Sequence[str] | None = None) -> int:
    """The program; 0 if nothing was wrong, else 1."""

    def run() -> int:
        config = parse(StressConfig(), argv, "stress", DESCRIPTION)
        with running_model(config, warm_up=True) as (model, loop):
            findings = stress(config, model, loop)
        first, last = (f"{size / 2**20:.0f}" for size in findings.memory)
        note(f"{dict(findings.counts)}; memory {first} MiB, in the end {last} MiB")
        for line in findings.wrong[:20]:
            note(line)
        return 1 if findings.wrong else 0

    return run_main(run)


def stress(config: StressConfig, model: TextModel, loop: EngineLoop) -> Findings:
    """Runs a server and its clients; the loop has ended afterwards.

    Args:
        config: how many, how long.
        model: what is served.
        loop: runs it.
    """
    rng = np.random.default_rng(config.seed)
    letters = [chr(c) for c in range(32, 127)]
    prompts = [
        _BEGINNINGS[i % len(_BEGINNINGS)] + "".join(rng.choice(letters, i))
        for i in range(config.prompts)
    ]
    known = [
        _alone(model.encode(prompt).tolist(), config.max_tokens, model, loop) for prompt in prompts
    ]
    server = HttpServer(make_app(model, loop), loop, grace=30)
    thread = threading.Thread(target=server.run)
    # A line for each of so many requests tells nobody anything.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        thread.start()
        try:
            findings = asyncio.run(_clients(config, known, server.port, rng))
            _check_empty(loop, findings)
        finally:
            server.stop()
            thread.join(60)
    if thread.is_alive():
        findings.wrong.append("the server does not stop")
    first, last = findings.memory
    if last > 1.1 * first + 32 * 2**20:
        findings.wrong.append(f"memory grew from {first} to {last} bytes")
    if loop.failure is not None:
        findings.wrong.append(f"the engine failed: {loop.failure!r}")
    return findings


def _alone(prompt: list[int], most: int, model: TextModel, loop: EngineLoop) -> _Known:
    """Runs a prompt with nothing beside it."""
    pieces: list[Piece] = []
    ended = threading.Event()

    def listen(piece: Piece) -> None:
        pieces.append(piece)
        if piece.finish is not None:
            ended.set()

    loop.submit([prompt], SamplingParams(temperature=0, max_tokens=most, logprobs=2), listen)
    if not ended.wait(_HANGS) or pieces[-1].finish in ("cancelled", "failed"):
        raise UserError("the engine does not answer")
    tokens = [token for piece in pieces for token in piece.tokens]
    gaps = [
        found.top_logprobs[0] - max(found.top_logprobs[1:], default=-math.inf)
        for piece in pieces
        for found in piece.logprobs
    ]
    # Of the id that ended the text nothing is known, so what comes after it is not sure either.
    sure = next((i for i, gap in enumerate(gaps) if gap < _NEAR_TIE), len(tokens))
    return _Known(prompt, [model.text_of(tokens[:i]) for i in range(len(tokens) + 1)], sure)


def _check_empty(loop: EngineLoop, findings: Findings) -> None:
    end = time.monotonic() + _HANGS
    while loop.active or loop.stats.running or loop.stats.waiting or loop.stats.pages_held:
        if time.monotonic() > end:
            findings.wrong.append(f"in the end something is left: {loop.stats}")
            return
        time.sleep(0.05)


async def _clients(
    config: StressConfig, known: Sequence[_Known], port: int, rng: np.random.Generator
) -> Findings:
    findings = Findings()
    start = time.monotonic()
    end = start + config.seconds

    async def client(rng: np.random.Generator) -> None:
        while time.monotonic() < end:
            one = known[int(rng.integers(len(known)))]
            most = int(rng.integers(1, config.max_tokens + 1))
            leaves = rng.random() < config.leaving
            try:
                async with asyncio.timeout(_HANGS):
                    kind = await _request(one, most, bool(rng.random() < 0.5), leaves, port, rng)
            except TimeoutError:
                findings.wrong.append(f"a request for {most} tokens hangs")
                continue
            except (OSError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
                findings.wrong.append(f"a request failed: {error!r}")
                continue
            if kind in ("equal", "streamed", "refused", "left"):
                findings.counts[kind] += 1
            else:
                findings.wrong.append(kind)
            if kind == "refused":
                await asyncio.sleep(float(rng.random()))

    tasks = [asyncio.create_task(client(one)) for one in rng.spawn(config.clients)]
    await asyncio.sleep(config.seconds / 3)
    first = _resident()
    await asyncio.gather(*tasks)
    findings.memory = (first, _resident())
    return findings


async def _request(
    one: _Known, most: int, streams: bool, leaves: bool, port: int, rng: np.random.Generator
) -> str:
    """One request by hand; how it went."""
    body = json.dumps(
        {"prompt": one.prompt, "max_tokens": most, "temperature": 0, "stream": streams}
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        if leaves:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(float(rng.random()) * 0.5):
                    await reader.read(int(rng.integers(1, 2000)))
            writer.transport.abort()
            return "left"
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        data = await reader.read()
    finally:
        writer.close()
    if status == 429:
        return "refused"
    if status != 200:
        return f"status {status}: {data[:200]!r}"
    text = _streamed(data) if streams else json.loads(data)["choices"][0]["text"]
    want = one.texts[min(most, len(one.texts) - 1)]
    if most > one.sure:
        # What comes from the near tie on may be otherwise.
        want = one.texts[one.sure].removesuffix("\ufffd")
        text = text[: len(want)]
    if text != want:
        return f"{text!r} instead of {want!r} for {one.prompt} and {most} tokens"
    return "streamed" if streams else "equal"


def _streamed(data: bytes) -> str:
    """The text of a stream in chunked encoding."""
    body = bytearray()
    while data:
        size, _, data = data.partition(b"\r\n")
        count = int(size, 16)
        body += data[:count]
        data = data[count + 2 :]
    *events, last = body.decode().removesuffix("\n\n").split("\n\n")
    if last != "data: [DONE]":
        raise ValueError(f"a stream ends with {last!r}")
    chunks: list[Any] = [json.loads(event.removeprefix("data: ")) for event in events]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def _resident() -> int:
    """Resident bytes of this process; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * 4096


if __name__ == "__main__":
    sys.exit(main())
