"""The server with OpenAI's own client, on devices whose every token is known beforehand."""

import contextlib
import json
import threading
import time

import pytest
from serve_support import (
    COMPLETION,
    CONTEXT,
    book_server,
    client_of,
    events,
    prompt_of,
    text_of,
)

from moejax.errors import UserError
from moejax.inference.params import SamplingParams

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")


# --- what it answers --------------------------------------------------------------------------


def test_completions(monkeypatch, rng):
    prompt, ending = prompt_of(rng, 20), prompt_of(rng, 60, "stop")
    with book_server(monkeypatch) as served:
        client = client_of(served)
        create = client.completions.create
        one = create(model="book", prompt=prompt, max_tokens=20)
        assert one.object == "text_completion" and one.model == "book"
        assert one.choices[0].text == text_of(prompt, 20)[0]
        assert one.choices[0].finish_reason == "length"
        assert one.usage.model_dump(exclude_none=True) == {
            "prompt_tokens": 12,
            "completion_tokens": 20,
            "total_tokens": 32,
        }
        assert len(create(model="book", prompt=prompt).choices[0].text) == 16
        two = create(model="book", prompt=[prompt, ending], max_tokens=60, n=2, echo=True)
        texts = [p + text_of(p, 60)[0] for p in (prompt, prompt, ending, ending)]
        assert [choice.text for choice in two.choices] == texts
        assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
        assert two.choices[2].finish_reason == "stop"
        ids = list(prompt.encode())
        for given in (ids, [ids]):
            assert create(model="book", prompt=given, max_tokens=20).choices == one.choices
        served.settled()


def test_chat(monkeypatch, rng):
    messages = [
        {"role": "system", "content": prompt_of(rng, 1)},
        {"role": "user", "content": [{"type": "text", "text": prompt_of(rng, 1)}]},
    ]
    prompt = f"system: {messages[0]['content'].strip()}\n"
    prompt += f"user: {messages[1]['content'][0]['text'].strip()}\nassistant:"
    with book_server(monkeypatch) as served:
        create = client_of(served).chat.completions.create
        answer = create(model="book", messages=messages, max_completion_tokens=9)
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content == text_of(prompt, 9)[0]
        # Without a limit the context is one.
        text, finish = text_of(prompt, CONTEXT)
        answer = create(model="book", messages=messages)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (
            text,
            finish,
        )


def test_streams(monkeypatch, rng):
    prompt = prompt_of(rng, 40)
    with book_server(monkeypatch) as served:
        client = client_of(served)
        chunks = list(
            client.completions.create(
                model="book", prompt=[prompt, "x"], max_tokens=40, n=2, echo=True, stream=True
            )
        )
        for index, begin in enumerate([prompt, prompt, "x", "x"]):
            mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
            text, finish = text_of(begin, 40)
            assert "".join(c.text for c in mine) == begin + text
            assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [finish]
        assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 40

        messages = [{"role": "user", "content": prompt}]
        chunks = list(
            client.chat.completions.create(
                model="book",
                messages=messages,
                max_tokens=40,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        whole = client.chat.completions.create(model="book", messages=messages, max_tokens=40)
        *some, last = chunks
        assert some[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in some)
        assert text == whole.choices[0].message.content
        assert some[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert all(chunk.usage is None for chunk in some)
        assert last.choices == [] and last.usage == whole.usage


def test_stop_strings_wherever_tokens_end(monkeypatch, rng):
    prompt = prompt_of(rng, 60)
    text, _ = text_of(prompt, 60)
    at = int(rng.integers(1, 50))
    stop = text[at : at + 3]
    with book_server(monkeypatch) as served:
        create = client_of(served).completions.create
        for stream in (False, True):
            found = create(
                model="book",
                prompt=prompt,
                max_tokens=60,
                stop=["\0never", stop],
                stream=stream,
            )
            choices = [c.choices[0] for c in found] if stream else found.choices
            assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
            assert choices[-1].finish_reason == "stop"
        served.settled()


def test_models_and_health(monkeypatch):
    with book_server(monkeypatch) as served:
        client = client_of(served)
        assert [model.id for model in client.models.list()] == ["book"]
        assert client.models.retrieve("book").max_model_len == CONTEXT
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other/one")
        status, body = served.ask("/health")
        assert status == 200 and body["status"] == "ok" and body["pages_held"] == 0


# --- many, slow, and gone ---------------------------------------------------------------------


def test_a_full_queue(monkeypatch):
    settings = {"max_rows": 2, "max_waiting": 3}
    with book_server(monkeypatch, delay=0.05, settings=settings) as served:
        client, found = client_of(served), []

        def ask():
            try:
                create = client.completions.create
                found.append(create(model="book", prompt="x", max_tokens=20).usage)
            except openai.RateLimitError as error:
                found.append(error.code)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(found) == 12 and 3 <= sum(f != "queue_full" for f in found) < 12
        served.settled()
        # A request is taken whole or not at all, and one that never fits is no matter of waiting.
        long = {**COMPLETION, "max_tokens": 60, "ignore_eos": True}
        thread, answered = run_aside(served.ask, "/v1/completions", {**long, "prompt": ["a"] * 3})
        wait_until(lambda: served.loop.stats.running == 2)
        status, body = served.ask("/v1/completions", {**long, "prompt": ["b"] * 3})
        assert status == 429 and body["error"]["type"] == "rate_limit_error"
        assert served.loop.active == 3
        assert served.ask("/v1/completions", {**long, "prompt": ["a"] * 4})[0] == 400
        thread.join(30)
        assert answered[0][0] == 200
        served.settled()


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go(monkeypatch, stream, capfd):
    with book_server(monkeypatch, delay=0.02) as served:
        connection = served.connect()
        body = {**COMPLETION, "max_tokens": 400, "n": 3, "stream": stream}
        body["ignore_eos"] = True
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        if stream:
            connection.getresponse().read(300)
        while not served.loop.active:
            time.sleep(0.01)
        connection.close()
        assert served.settled(5).generated_tokens < 600
    status = 200 if stream else 499
    assert f"/v1/completions {status}" in capfd.readouterr().err


def test_requests_that_take_too_long(monkeypatch):
    with book_server(monkeypatch, delay=0.05, request_seconds=0.4) as served:
        long = {**COMPLETION, "max_tokens": 300, "ignore_eos": True}
        status, body = served.ask("/v1/completions", long)
        assert status == 504 and body["error"]["type"] == "timeout_error"
        with contextlib.closing(served.connect()) as connection:
            headers = {"content-type": "application/json"}
            body = json.dumps({**long, "stream": True})
            connection.request("POST", "/v1/completions", body, headers)
            *chunks, last = events(connection.getresponse())
        assert chunks and "no answer within" in last["error"]["message"]
        with pytest.raises(openai.APIError, match="no answer within"):
            list(
                client_of(served).completions.create(
                    model="book", prompt="x", max_tokens=300, stream=True
                )
            )
        served.settled()


def run_aside(function, *args):
    """Runs a function in a thread; its result or exception comes into the returned list."""
    found = []

    def run():
        try:
            found.append(function(*args))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("grace", [20.0, 0.3])
def test_stopping(monkeypatch, grace):
    """Within the grace time texts end as they would; after it they are told that they end."""
    with book_server(monkeypatch, delay=0.03, grace=grace) as served:
        body = {**COMPLETION, "max_tokens": 60, "ignore_eos": True}
        thread, found = run_aside(served.ask, "/v1/completions", body)
        wait_until(lambda: served.loop.active)
        served.server.stop()
        assert served.loop.refusing
        thread.join(30)
        ((status, answer),) = found
        if grace > 1:
            assert status == 200 and answer["usage"]["completion_tokens"] == 60
        else:
            assert status == 503 and answer["error"]["code"] == "stopping"
        wait_until(lambda: not served.loop._thread.is_alive())
        with pytest.raises(OSError):
            served.ask("/health")


def test_stopping_twice_waits_for_nothing(monkeypatch):
    with book_server(monkeypatch, delay=0.03, grace=60) as served:
        body = {**COMPLETION, "max_tokens": 400, "ignore_eos": True}
        thread, found = run_aside(served.ask, "/v1/completions", body)
        wait_until(lambda: served.loop.active)
        start = time.monotonic()
        served.server.stop()
        served.server.stop()
        thread.join(30)
        assert len(found) == 1
    assert time.monotonic() - start < 10


def test_a_loop_that_stops_refuses(monkeypatch):
    with book_server(monkeypatch) as served:
        served.loop.refuse()
        status, body = served.ask("/v1/completions", COMPLETION)
        assert status == 503 and body["error"]["code"] == "stopping"
        assert served.ask("/health")[1]["status"] == "stopping"


def test_an_engine_that_breaks(monkeypatch, capfd):
    with book_server(monkeypatch, delay=0.01) as served:
        thread, found = run_aside(
            served.ask, "/v1/completions", {**COMPLETION, "max_tokens": 300, "ignore_eos": True}
        )
        wait_until(lambda: served.loop.active)

        def broken():
            raise RuntimeError("a device is gone")

        monkeypatch.setattr(served.loop.engine, "step", broken)
        thread.join(30)
        assert found[0][0] == 500 and found[0][1]["error"]["code"] == "engine_failed"
        # The server ends by itself, a moment after it has answered.
        wait_until(lambda: served.server.stopping)
        assert isinstance(served.loop.failure, RuntimeError)
        with pytest.raises(UserError, match="no more requests"):
            served.loop.submit([[1]], SamplingParams(), print)
    assert "a device is gone" in capfd.readouterr().err
