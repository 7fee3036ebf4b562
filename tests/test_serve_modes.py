"""The modes chat, batch and bench of `infer.py`: what they print and write."""

import contextlib
import io
import json
import sys

import pytest
from modes_support import make_folder, make_weights, mode_runner

import infer
from moejax.inference import console
from moejax.inference.params import SamplingParams
from moejax.serving import batch, bench, chat_mode, start
from moejax.serving.flags import EngineFlags
from moejax.serving.start import running_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model and a loop that all tests share."""
    folder = make_folder(tmp_path_factory, make_weights())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "keep_compiled_programs", lambda: None)
        flags = EngineFlags(model=str(folder), mesh="1x1x1", max_rows=2, prefill_chunk=16)
        with running_model(flags) as running:
            yield running


@pytest.fixture
def script(monkeypatch, model, capsys):
    """Runs a mode on the model that is loaded."""

    @contextlib.contextmanager
    def loaded(config, **options):
        yield model

    for module in (chat_mode, batch, bench):
        monkeypatch.setattr(module, "running_model", loaded)
    return mode_runner(monkeypatch, capsys)


def answer_to(model, messages, most):
    """What the model says to a chat, by the engine alone."""
    text, (texts, loop) = [], model
    params = SamplingParams(temperature=0, max_tokens=most, stop=texts.chat_stop)
    chat_mode.stream(loop, texts.encode_chat(messages), params, text.append)
    return "".join(text)


# --- chat -------------------------------------------------------------------------------------


def test_a_chat_remembers(script, model):
    def user(text):
        return {"role": "user", "content": text}

    def assistant(text):
        return {"role": "assistant", "content": text}

    system = [{"role": "system", "content": "S"}]
    flags = ("--temperature", 0, "--max-tokens", 3, "--system", "S")
    code, out, err = script("chat", *flags, stdin=b"a\nb\n\n/clear\nb\n/quit\nnever\n")
    first = answer_to(model, [*system, user("a")], 3)
    second = answer_to(model, [*system, user("a"), assistant(first), user("b")], 3)
    third = answer_to(model, [*system, user("b")], 3)
    assert (code, out) == (0, f"{first}\n{second}\n{third}\n")
    assert "forgotten" in err and sum("cut off" in line for line in err) == 3


def test_a_chat_that_is_too_long(script):
    code, _, err = script("chat", "--max-tokens", 2, stdin=b"x" * 90)
    assert code == 2 and "begin anew with /clear" in err[0]
    code, _, err = script("chat", stdin=b"/help\n")
    assert code == 2 and "'/help': no such command" in err[0].replace("/help:", "'/help':")


def test_an_answer_that_is_cut_short_by_ctrl_c(model, monkeypatch, capsys):
    """What was read of it is remembered, and the person goes on."""
    texts, loop = model
    chat = chat_mode.Chat(texts, loop, chat_mode.ChatConfig(temperature=0.0, max_tokens=20))
    real = chat_mode.stream

    def interrupted(loop, prompt, params, show):
        def stop(text):
            show(text)
            raise KeyboardInterrupt

        return real(loop, prompt, params, stop)

    monkeypatch.setattr(chat_mode, "stream", interrupted)
    typed = iter(["a", "/nonsense", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    console.interact(lambda lines: chat.turn(lines[0]), "hello")
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "hello" and "no such command" in err
    said, answered = chat.messages
    assert said == {"role": "user", "content": "a"} and answered["content"] == out.strip("\n")
    assert not loop.active


# --- batch, bench -----------------------------------------------------------------------------


def test_batch(script, tmp_path):
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 4}}
    requests.write_text(json.dumps(line) + "\n{\n")
    flags = ("batch", "-i", requests, "-o", out)
    code, printed, err = script(*flags)
    assert (code, printed) == (1, "") and err[-1].startswith("[1 answered, 1 failed, 0 were there")
    assert out.read_bytes().count(b"\n") == 2
    # Done with is not done well.
    code, _, err = script(*flags)
    assert code == 1 and err[-1].startswith("[0 answered, 0 failed, 2 were there (1 failed)")
    out.write_bytes(b"".join(n for n in out.read_bytes().splitlines(True) if b'"a"' in n))
    requests.write_text(json.dumps(line) + "\n")
    code, _, err = script(*flags)
    assert code == 0 and err[-1].startswith("[0 answered, 0 failed, 1 were there;")


def test_what_modes_ask_of_the_model(model, monkeypatch, tmp_path, capsys):
    asked = {}

    def loaded(config, name="", **options):
        asked[type(config)] = name, options
        return contextlib.nullcontext(model)

    monkeypatch.setattr(batch, "running_model", loaded)
    monkeypatch.setattr(bench, "running_model", loaded)
    (tmp_path / "in").write_text("")
    files = ("-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
    assert infer.main(["batch", *files, "--name", "other"]) == 0
    assert infer.main(["bench", "--loads", "1", "--requests", "1", "--max-tokens", "1"]) == 0
    assert asked[batch.BatchConfig][0] == "other"
    # The same prompts come again: what an engine keeps of them must not be measured.
    assert asked[bench.BenchConfig][1]["prefix_reuse"] is False


def test_bench(script, tmp_path):
    figures = tmp_path / "figures.json"
    sizes = ("--prompt-tokens", 5, "--max-tokens", 6)
    code, out, err = script("bench", "--loads", 1, 3, *sizes, "--json", figures)
    assert code == 0 and str(figures) in err[-1]
    rows = json.loads(figures.read_text())["rows"]
    assert [(r["load"], r["requests"], r["output_tokens"]) for r in rows] == [
        (1, 4, 24),
        (3, 12, 72),
    ]
    for row, line in zip(rows, out.splitlines()[2:], strict=True):
        assert 0 < row["between_p50"] <= row["between_p99"] and row["first_p50"] > 0
        # Waiting for the first token and then for five more takes no longer than all of it.
        assert row["first_p50"] + 5 * row["between_p50"] <= row["seconds"]
        assert line.startswith(f"| {row['load']} | {row['requests']} | ")
        assert row["tokens_per_second"] == pytest.approx(row["output_tokens"] / row["seconds"])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\nand two\n")
    flags = ("--prompts", prompts, "--max-tokens", 2, "--requests", 5, "--json", figures)
    code, out, _ = script("bench", "--loads", 2, *flags)
    assert code == 0 and len(out.splitlines()) == 3
    assert json.loads(figures.read_text())["rows"][0]["prompt_tokens"] == 3 * 3 + 2 * 7
