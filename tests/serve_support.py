"""What the tests of the server share: one with made-up devices, and clients."""

import contextlib
import http.client
import json
import threading
import time

import numpy as np
from engine_support import END, book_engine, expected

from moejax.data.tokenizer import Tokenizer
from moejax.inference.chat import ChatTemplate
from moejax.serving.loop import EngineLoop
from moejax.serving.text_model import TextModel

NUM_IDS = 128  # so that every token is a character
CONTEXT = 512
COMPLETION = {"model": "book", "prompt": "x"}
CHAT = {"model": "book", "messages": [{"role": "user", "content": "x"}]}


def book_model():
    """The texts' part of a model whose tokens are ASCII characters."""
    tokenizer = Tokenizer()
    return TextModel("book", tokenizer, ChatTemplate(None, tokenizer), end_ids=(END,))


def book_loop(monkeypatch, delay=0.0, **settings):
    """A loop around an engine whose steps take `delay` seconds; not started."""
    engine = book_engine(monkeypatch, 2, NUM_IDS, CONTEXT, **{"page_len": 4, **settings})
    run = engine._programs.run

    def slow(plan):
        time.sleep(delay)
        return run(plan)

    engine._programs.run = slow
    return EngineLoop(engine, Tokenizer())


def text_of(prompt, most):
    """The text that such an engine makes of a prompt, and why it ends."""
    ids = Tokenizer().encode(prompt) if isinstance(prompt, str) else np.asarray(prompt)
    tokens, finish = expected(ids.tolist(), NUM_IDS, min(len(ids) + most, CONTEXT))
    return bytes(tokens).decode(), finish


def prompt_of(rng, most, finish="length", size=12):
    """A prompt whose text ends so."""
    while True:
        prompt = "".join(chr(c) for c in rng.integers(32, 127, size))
        if text_of(prompt, most)[1] == finish:
            return prompt


class Served:
    """A server that runs, and a plain client."""

    def __init__(self, http_server, loop, model):
        self.server, self.loop, self.model = http_server, loop, model
        self.port = http_server.port
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def connect(self, timeout=30):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, path, body=None, *, raw=None, headers=None, method=None):
        """Status and parsed body of one request."""
        connection = self.connect()
        with contextlib.closing(connection):
            data = raw if raw is not None else None if body is None else json.dumps(body)
            method = method or ("GET" if data is None else "POST")
            headers = {"content-type": "application/json", **(headers or {})}
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text)

    def settled(self, seconds=10):
        """Waits until the engine has nothing to do; its last counts."""
        end = time.monotonic() + seconds
        while self.loop.active or self.loop.stats.running or self.loop.stats.waiting:
            assert time.monotonic() < end, self.loop.stats
            time.sleep(0.01)
        assert self.loop.stats.pages_held == 0
        return self.loop.stats


@contextlib.contextmanager
def serving(loop, model, *, grace=5.0, **limits):
    """A server in a thread."""
    from moejax.serving.app import AppSettings, make_app
    from moejax.serving.server import HttpServer

    server = HttpServer(make_app(model, loop, AppSettings(**limits)), loop, grace=grace)
    thread = threading.Thread(target=server.run)
    loop.start()
    thread.start()
    try:
        yield Served(server, loop, model)
    finally:
        if thread.is_alive() and not server.stopping:
            server.stop()
        thread.join(60)
        assert not thread.is_alive()


def events(response, begun=b""):
    """The events of a stream, parsed, `[DONE]` as it is; `begun` has been read already."""
    out = []
    for line in (begun + response.read()).decode().split("\n\n"):
        if line:
            assert line.startswith("data: ")
            data = line.removeprefix("data: ")
            out.append(data if data == "[DONE]" else json.loads(data))
    return out


@contextlib.contextmanager
def book_server(monkeypatch, delay=0.0, grace=5.0, settings=None, **limits):
    """A server of made-up devices whose steps take `delay` seconds."""
    loop = book_loop(monkeypatch, delay, **(settings or {}))
    with (
        serving(loop, book_model(), grace=grace, **limits) as served,
        contextlib.ExitStack() as clients,
    ):
        served.clients = clients
        yield served


def client_of(served, key="none"):
    """OpenAI's own client, closed with the server."""
    import openai

    client = openai.OpenAI(base_url=served.url, api_key=key, max_retries=0, timeout=30)
    return served.clients.enter_context(client)
