"""Batch files: an answer for each line, once, whatever the lines are and whenever it is killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from inference_support import CONFIG, random_weights
from serve_support import book_loop, book_model, prompt_of, text_of

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.model_folder import save_model_folder
from moejax.serving import batch
from moejax.serving.batch_file import name_of, open_output

ROOT = Path(__file__).parent.parent


def line_of(custom_id, prompt="x", **body):
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "book", "prompt": prompt, **body},
    }


def written(lines):
    return b"".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines
    )


@pytest.fixture
def answer(monkeypatch, tmp_path):
    """Answers lines into a file, as if the program were started again: lines → result, answers."""
    out_path = tmp_path / "out.jsonl"
    loop = book_loop(monkeypatch, max_rows=4, max_waiting=3).start()

    def run(lines, together=5):
        with open_output(str(out_path)) as (out, done):
            source = io.BytesIO(written(lines))
            result = batch.run_batch(source, out, done, book_model(), loop, together)
        return result, [json.loads(line) for line in out_path.read_bytes().splitlines()]

    run.path, run.loop = out_path, loop
    yield run
    loop.stop()


def test_lines_run_together(answer, rng):
    prompts = {f"line {i}": prompt_of(rng, 20) for i in range(40)}
    lines = [line_of(name, prompt, max_tokens=20) for name, prompt in prompts.items()]
    lines.append(line_of("several", [prompts["line 1"]] * 3, max_tokens=20))
    lines.append(
        {
            "custom_id": "chat",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 7},
        }
    )
    result, answers = answer(lines)
    assert (result.answered, result.failed, result.skipped) == (42, 0, 0)
    found = {one["custom_id"]: one for one in answers}
    assert len(answers) == len(found) == 42
    for name, prompt in prompts.items():
        one = found[name]
        assert one["error"] is None and one["response"]["status_code"] == 200
        body = one["response"]["body"]
        assert body["choices"][0]["text"] == text_of(prompt, 20)[0]
        assert body["id"] == one["response"]["request_id"]
    texts = [c["text"] for c in found["several"]["response"]["body"]["choices"]]
    assert texts == [text_of(prompts["line 1"], 20)[0]] * 3
    message = found["chat"]["response"]["body"]["choices"][0]["message"]["content"]
    assert message == text_of("user: hi\nassistant:", 7)[0]
    # Several at once, or it would be no batch.
    stats = answer.loop.stats
    assert stats.decode_steps < 0.6 * stats.generated_tokens


BAD = [
    (b"{\n", None, "not JSON"),
    (b"\xff\n", None, "not UTF-8"),
    (b"[1]\n", None, "JSON object"),
    (b"[" * 2000 + b"\n", None, "nested"),
    ({"url": "/v1/completions", "body": {}}, None, "custom_id"),
    (line_of(""), None, "custom_id"),
    (line_of(5), None, "custom_id"),
    (line_of("good"), None, "an earlier line has it"),
    ({**line_of("method"), "method": "GET"}, None, "POST"),
    ({**line_of("url"), "url": "/v1/embeddings"}, None, "/v1/embeddings"),
    ({**line_of("list"), "body": []}, None, "body"),
    (line_of("model", model="other"), 404, "not served here"),
    (line_of("field", temperature=-1), 400, "temperature"),
    (line_of("stream", stream=True), 400, "stream"),
    (line_of("long", "x" * 600), 400, "context"),
    (line_of("too many", ["x"] * 4), 400, "at most 3 may wait"),
]


def test_bad_lines_get_errors_of_their_own(answer, monkeypatch):
    lines = [line_of("good"), *(line for line, _, _ in BAD), b"\n", line_of("last")]
    for again in (False, True):
        result, answers = answer(lines)
        assert result.answered == (0 if again else 2)
        assert result.failed == (0 if again else len(BAD))
        assert result.skipped == (len(BAD) + 2 if again else 0)
        assert len(answers) == len(BAD) + 2
    by_line = {one["id"]: one for one in answers}
    assert len(by_line) == len(answers)
    for number, (line, status, told) in enumerate(BAD, 2):
        one = by_line[f"batch_req_{number}"]
        if status is None:
            assert one["custom_id"] is None and one["response"] is None
            assert f"line {number}: " in one["error"]["message"]
            assert told in one["error"]["message"]
        else:
            assert one["custom_id"] == line["custom_id"] and one["error"] is None
            assert one["response"]["status_code"] == status
            assert told in one["response"]["body"]["error"]["message"]


def test_a_line_without_end_is_one_line(answer, monkeypatch):
    from moejax.serving import batch_file

    monkeypatch.setattr(batch_file, "_MAX_LINE", 1000)
    huge = b'{"custom_id": "' + b"x" * 5000 + b'"}\n'
    result, answers = answer([line_of("a"), huge, line_of("b")])
    assert (result.answered, result.failed) == (2, 1)
    assert {one["id"] for one in answers} == {"batch_req_1", "batch_req_2", "batch_req_3"}


def test_a_torn_line_is_taken_off(answer, rng):
    lines = [line_of(f"{i}", prompt_of(rng, 9), max_tokens=9) for i in range(6)]
    _, whole = answer(lines)
    data = answer.path.read_bytes()
    for cut in rng.integers(0, len(data), 8).tolist():
        answer.path.write_bytes(data[:cut])
        kept = data[:cut].count(b"\n")
        result, answers = answer(lines)
        assert (result.answered, result.skipped) == (6 - kept, kept)
        assert answers[:kept] == whole[:kept]
        assert sorted(one["custom_id"] for one in answers) == [str(i) for i in range(6)]


def test_files_that_are_no_output(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("some notes\n", "[]\n", '{"custom_id": "x"}\n'):
        path.write_text(text)
        with (
            pytest.raises(UserError, match=r"line 1 is no answer of a batch"),
            open_output(str(path)),
        ):
            pass
        assert path.read_text() == text
    path.write_text("")
    with (
        open_output(str(path)),
        pytest.raises(UserError, match="another program is writing it"),
        open_output(str(path)),
    ):
        pass
    with pytest.raises(UserError, match="check the path"), open_output(str(tmp_path / "no" / "x")):
        pass
    assert name_of(3, "a") != name_of(3, None)


def test_an_engine_that_stops_leaves_its_lines_for_later(answer, rng):
    lines = [line_of(f"{i}", prompt_of(rng, 9), max_tokens=9) for i in range(6)]
    answer(lines[:2])
    answer.loop.refuse()
    with pytest.raises(UserError, match="no more requests"):
        answer(lines)
    assert len(answer.path.read_bytes().splitlines()) == 2


def test_killed_in_the_middle(tmp_path, rng):
    """As a program, with kill -9 between two answers: what it wrote stands, and nothing is lost."""
    folder = tmp_path / "model"
    save_model_folder(
        folder, random_weights(CONFIG, rng), CONFIG, Tokenizer(), record={}, dtype=np.float32
    )
    lines = [
        {
            **line_of(f"id {i}"),
            "body": {
                **{"prompt": f"text {i} ", "max_tokens": 30, "ignore_eos": True},
                **{"temperature": 0},
            },
        }
        for i in range(60)
    ]
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_bytes(written(lines))
    flags = ["--model", folder, "-i", requests, "-o", out, "--max-rows", "2"]
    command = [sys.executable, "-W", "error", "infer.py", "batch", *map(str, flags)]
    environment = {**os.environ, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE}
    counts = [0]
    for least in (1, 5):
        with subprocess.Popen(command, **options) as process:
            end = time.monotonic() + 200
            while not out.exists() or out.read_bytes().count(b"\n") < counts[-1] + least:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait(30)
            process.stderr.read()
        counts.append(out.read_bytes().count(b"\n"))
    assert counts[0] < counts[1] < counts[2] < 60
    before = out.read_bytes()
    done = subprocess.run(command, timeout=250, **options)
    assert done.returncode == 0, done.stderr.decode()
    assert f"{counts[2]} were there" in done.stderr.decode()
    after = out.read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    answers = [json.loads(line) for line in after.splitlines()]
    assert sorted(one["custom_id"] for one in answers) == sorted(f"id {i}" for i in range(60))
    assert {one["response"]["body"]["usage"]["completion_tokens"] for one in answers} == {30}
