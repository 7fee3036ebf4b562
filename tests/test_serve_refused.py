"""What the server refuses, and how it says so."""

import contextlib
import socket

import pytest
from serve_support import CHAT, COMPLETION, CONTEXT, book_server, client_of

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def strict(patched):
    with book_server(patched, max_body=50_000, body_seconds=1.0) as served:
        yield served


@pytest.mark.parametrize(
    "change, param",
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""] * 129}, "prompt"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": [[1], "x"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": [128]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * CONTEXT}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": [1]}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": "b"}}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "y"}, "suffix"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"model": 5}, "model"),
        ({"temprature": 1}, "temprature"),
        ({"\ud800": 1}, "\ud800"),
        ({"messages": []}, "messages"),
    ],
)
def test_completions_that_are_refused(strict, change, param):
    status, body = strict.ask("/v1/completions", {**COMPLETION, **change})
    assert status == 400 and body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param and "\n" not in body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "change, param",
    [
        ({"messages": None}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_chats_that_are_refused(strict, change, param):
    status, body = strict.ask("/v1/chat/completions", {**CHAT, **change})
    assert status == 400 and body["error"]["param"] == param


def test_fields_that_ask_for_nothing(strict):
    idle = {
        **{"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        **{"logit_bias": {}, "metadata": {"a": "b"}, "store": False, "user": "me"},
        **{"seed": None, "stop": None, "top_logprobs": None, "parallel_tool_calls": True},
    }
    plain = strict.ask("/v1/chat/completions", {**CHAT, "max_tokens": 5})[1]["choices"]
    status, body = strict.ask("/v1/chat/completions", {**CHAT, "max_tokens": 5, **idle})
    assert status == 200 and body["choices"] == plain


@pytest.mark.parametrize(
    "raw, headers, status, told",
    [
        (b"", {}, 400, "not JSON"),
        (b"{", {}, 400, "not JSON"),
        (b"[]", {}, 400, "JSON object"),
        (b"null", {}, 400, "JSON object"),
        (b'{"a": NaN}', {}, 400, "NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", {}, 400, "not JSON"),
        (b'\xff{"model": "book"}', {}, 400, "not UTF-8 at byte 0"),
        ('{"model": "book"}'.encode("utf-16"), {}, 400, "not UTF-8"),
        (b"[" * 40_000, {}, 400, "nested"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, {}, 400, "nested"),
        (b"[" * 70 + b"]" * 70, {}, 400, "nested"),
        (b" " * 50_001, {}, 413, "larger than 50000"),
        (b"{}", {"content-type": "text/plain"}, 415, "application/json"),
        (b"{}", {"content-type": ""}, 415, "application/json"),
        (b"{}", {"content-encoding": "gzip"}, 415, "content-encoding"),
        (b'{"prompt": "x", "model": "\\ud800"}', {}, 404, "not served here"),
    ],
)
def test_bodies_that_are_refused(strict, raw, headers, status, told):
    got, body = strict.ask("/v1/completions", raw=raw, headers=headers)
    assert (got, told in body["error"]["message"]) == (status, True), body


def test_other_paths_and_methods(strict):
    for path, method, status in [
        ("/", "GET", 404),
        ("/v1/embeddings", "POST", 404),
        ("/v1/completions", "GET", 405),
        ("/health", "DELETE", 405),
        ("/v1/completions/", "POST", 404),
    ]:
        got, body = strict.ask(path, method=method, raw=b"{}")
        assert got == status and body["error"]["code"] == "no_such_endpoint"


def answer_to(served, data, wait=5.0):
    """What a connection that sends these bytes is told until it is closed."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=wait) as connection:
        out = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            while part := connection.recv(65536):
                out += part
        return out


def test_what_is_not_http(strict):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    assert b" 400 " in answer_to(strict, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    assert b" 400 " in answer_to(strict, head + b"x: " + b"y" * 100_000)
    # A body that never comes, one that never ends, and one that is shorter than it says.
    assert b" 408 " in answer_to(strict, head + b"content-length: 10\r\n\r\n{")
    chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
    endless = head + b"transfer-encoding: chunked\r\n\r\n" + chunk * 10
    assert b" 413 " in answer_to(strict, endless)
    assert strict.ask("/v1/completions", COMPLETION)[0] == 200


def test_another_model(monkeypatch):
    with book_server(monkeypatch) as served:
        with pytest.raises(openai.NotFoundError) as caught:
            client_of(served).completions.create(model="gpt-5", prompt="x")
        assert caught.value.code == "model_not_found" and caught.value.param == "model"
        status, _ = served.ask("/v1/completions", {"prompt": "x"})
        assert status == 200  # none named


def test_keys(monkeypatch, capfd):
    with book_server(monkeypatch, api_key="s3cret") as served:
        client = client_of(served, "s3cret")
        assert client.completions.create(model="book", prompt="my words").choices
        for wrong in ("s3cre", "s3cret2", "S3CRET"):
            with pytest.raises(openai.AuthenticationError):
                client_of(served, wrong).models.list()
        for headers in ({}, {"authorization": "s3cret"}, {"authorization": "Bearer \xe9"}):
            status, body = served.ask("/v1/completions", COMPLETION, headers=headers)
            assert status == 401 and body["error"]["type"] == "authentication_error"
        assert served.ask("/health")[0] == 200
    log = capfd.readouterr().err
    assert "POST /v1/completions 200" in log and "in=8 out=16" in log and " 401 " in log
    assert "s3cre" not in log and "my words" not in log
