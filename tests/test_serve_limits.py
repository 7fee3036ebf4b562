"""The limits of the server: heads, bodies and texts that do not fit; `min_tokens`."""

import contextlib
import socket
import threading
import time

from serve_support import CHAT, COMPLETION, CONTEXT, book_server, prompt_of, text_of
from test_serve import run_aside, wait_until

from moejax.data.tokenizer import Tokenizer
from moejax.inference.text import TextStream


def test_stopping_does_not_wait_for_bodies(monkeypatch):
    with book_server(monkeypatch, grace=60) as served:
        with contextlib.closing(served.connect()) as connection:
            connection.putrequest("POST", "/v1/completions")
            connection.putheader("content-type", "application/json")
            connection.putheader("content-length", "100")
            connection.endheaders(b"{")
            time.sleep(0.2)
            start = time.monotonic()
            served.server.stop()
            response = connection.getresponse()
            assert response.status == 503 and b'"stopping"' in response.read()
        wait_until(lambda: not served.loop._thread.is_alive())
        assert time.monotonic() - start < 10


def test_heads_that_do_not_come(monkeypatch):
    from moejax.serving import server

    monkeypatch.setattr(server, "_HEAD_SECONDS", 0.3)
    with book_server(monkeypatch, delay=0.02) as served:
        address = "127.0.0.1", served.port
        whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        for before, sent in ((b"", b""), (b"", whole[:9]), (whole, whole[:9])):
            with socket.create_connection(address, 10) as connection:
                if before:
                    connection.sendall(before)
                    assert connection.recv(4096)
                    time.sleep(0.1)
                connection.sendall(sent)
                start = time.monotonic()
                while connection.recv(4096):
                    pass
                assert time.monotonic() - start < 5
        # A head that came has its answer, however long that takes.
        body = {**COMPLETION, "max_tokens": 40, "ignore_eos": True}
        assert served.ask("/v1/completions", body)[0] == 200


def test_chats_that_wait_are_bounded(monkeypatch):
    with book_server(monkeypatch, settings={"max_waiting": 3}) as served:
        go, encode = threading.Event(), served.model.encode_chat
        monkeypatch.setattr(
            served.model, "encode_chat", lambda *args: go.wait(30) and encode(*args)
        )
        asked = [run_aside(served.ask, "/v1/chat/completions", CHAT) for _ in range(5)]
        wait_until(lambda: sum(bool(found) for _, found in asked) == 2)
        # Others do not wait for them.
        assert served.ask("/v1/completions", COMPLETION)[0] == 200
        go.set()
        for thread, _ in asked:
            thread.join(30)
        assert sorted(found[0][0] for _, found in asked) == [200, 200, 200, 429, 429]


def test_long_texts_are_refused_before_they_are_encoded(monkeypatch):
    with book_server(monkeypatch) as served:

        def never(*_):
            raise AssertionError

        assert served.ask("/v1/completions", COMPLETION)[0] == 200
        monkeypatch.setattr(served.model, "encode", never)
        monkeypatch.setattr(served.model, "encode_chat", never)
        long = "x" * (16 * CONTEXT + 1)
        status, body = served.ask("/v1/completions", {**COMPLETION, "prompt": ["x", long]})
        assert status == 400 and "share a context" in body["error"]["message"]
        said = [{"role": "user", "content": [{"type": "text", "text": long}]}]
        status, body = served.ask("/v1/chat/completions", {**CHAT, "messages": said})
        assert status == 400 and body["error"]["param"] == "messages"


def test_no_stop_string_before_min_tokens(monkeypatch, rng):
    prompt = prompt_of(rng, 30)
    text = text_of(prompt, 30)[0]
    least = int(rng.integers(2, 20))
    with book_server(monkeypatch) as served:
        body = {**COMPLETION, "prompt": prompt, "max_tokens": 30, "min_tokens": least}
        stop = text[least - 2 : least]
        again = text.find(stop, least - 1)
        wanted = text if again < 0 else text[:again]
        choice = served.ask("/v1/completions", {**body, "stop": stop})[1]["choices"][0]
        assert choice["text"] == wanted
        # One that begins in those tokens and ends behind them counts.
        stop = text[least - 2 : least + 1]
        choice = served.ask("/v1/completions", {**body, "stop": stop})[1]["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[: least - 2], "stop")


def test_min_tokens_by_hand(rng):
    """Of stop strings that end behind those tokens the first to end counts, then the longest."""
    for _ in range(300):
        text = "".join(rng.choice(list("ab"), 12))
        least = int(rng.integers(0, 13))
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 5))) for _ in range(3)]
        ends = [
            (end, end - len(stop))
            for end in range(least + 1, 13)
            for stop in stops
            if text[:end].endswith(stop)
        ]
        stream = TextStream(Tokenizer(), stops, least)
        shown = "".join([*map(stream.push, text.encode()), stream.flush()])
        assert shown == (text[: min(ends)[1]] if ends else text), (text, stops, least)
        assert stream.stopped == bool(ends)
