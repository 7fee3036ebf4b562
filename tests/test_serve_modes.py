"""The modes of `infer.py` beside continuing texts: what they print and write; mistakes."""

import contextlib
import dataclasses
import io
import json
import sys

import jax
import numpy as np
import pytest
from inference_support import CONFIG as SMALL
from inference_support import random_weights
from jax import numpy as jnp

import infer
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference import console
from moejax.inference.model_folder import save_model_folder
from moejax.inference.params import SamplingParams
from moejax.inference.source import ModelSource, open_model
from moejax.serving import batch, bench, chat_mode, routes, start
from moejax.serving.flags import EngineFlags
from moejax.serving.protocol import read_job
from moejax.serving.start import make_engine, running_model
from moejax.serving.text_model import TextModel
from sharding.mesh import MeshShape

pytest.importorskip("uvicorn")
CONFIG = dataclasses.replace(SMALL, max_context=96)


@pytest.fixture(scope="module")
def flat():
    weights = random_weights(CONFIG, np.random.default_rng())
    weights["params/head.w"][:, Tokenizer().eos_id] = 0
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory, flat):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model_folder(path, flat, CONFIG, Tokenizer(), record={}, dtype=np.float32)
    return path


@pytest.fixture(scope="module")
def model(folder):
    """The model and a loop that all tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "keep_compiled_programs", lambda: None)
        flags = EngineFlags(model=str(folder), mesh="1x1x1", max_rows=2, prefill_chunk=16)
        with running_model(flags) as running:
            yield running


@pytest.fixture
def script(monkeypatch, model, capsys, folder):
    """Runs a mode on the model that is loaded: words → exit code, stdout, lines of stderr."""

    @contextlib.contextmanager
    def loaded(config, **options):
        yield model

    for module in (chat_mode, batch, bench):
        monkeypatch.setattr(module, "running_model", loaded)
    monkeypatch.setattr(routes, "keep_compiled_programs", lambda: None)

    def run(*argv, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = infer.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


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


# --- what a folder says of its texts ----------------------------------------------------------


def test_a_folder_with_defaults_and_a_template(tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / "generation_config.json").write_text(
        json.dumps(
            {
                **{"temperature": 0.5, "top_k": 7, "do_sample": True, "max_new_tokens": 9},
                "eos_token_id": [256, 3],
            }
        )
    )
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    source = ModelSource(tmp_path, CONFIG, Tokenizer(), lambda _: {}, (256,), 11)
    texts = TextModel.open(source)
    try:
        assert texts.end_ids == (256, 3) and texts.name == tmp_path.name
        assert texts.encode("é").tolist() == [11, 0xC3, 0xA9] and texts.encode("").tolist() == [11]
        messages = [{"role": "user", "content": "hi"}]
        job = read_job("chat", {"messages": messages, "top_p": 0.9}, texts)
        assert bytes(job.prompts[0].tolist()) == b"[user]hi[assistant]"
        wanted = SamplingParams(temperature=0.5, top_k=7, top_p=0.9, max_tokens=9)
        assert job.params == wanted
        job = read_job("completion", {"prompt": "x", "temperature": 0, "max_tokens": 2}, texts)
        assert job.params == SamplingParams(temperature=0, top_k=7, max_tokens=2)
    finally:
        texts.close()
    bare = ModelSource(tmp_path, CONFIG, None, lambda _: {})
    with pytest.raises(UserError, match=r"no tokenizer\.json there"):
        TextModel.open(bare)


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


# --- routes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2"])
def test_routes(script, folder, flat, tmp_path, mesh, rng):
    """Counts of a text of several windows are those of one device without masks."""
    text = "".join(rng.choice(list("abc é\n"), 150))
    source = tmp_path / "text"
    source.write_text(text)
    counts, picture = tmp_path / "counts.npz", tmp_path / "picture.png"
    flags = ("--model", folder, "--mesh", mesh, "--counts", counts, "--picture", picture)
    code, _, err = script("routes", "--text", source, *flags)
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    found = np.load(counts)
    tokens = len(text.encode())
    assert int(found["tokens"]) == tokens and f"{tokens} tokens" in err[-1]
    assert found["layers"].tolist() == [0, 1]
    np.testing.assert_array_equal(found["counts"].sum(axis=1), 2 * tokens)
    np.testing.assert_array_equal(found["counts"], by_windows(flat, text.encode()))


def test_routes_begin_as_the_model_wants(folder, monkeypatch, tmp_path):
    source, seen = dataclasses.replace(open_model(folder), bos_id=11), []
    monkeypatch.setattr("moejax.inference.source.open_model", lambda *_, **__: source)
    monkeypatch.setattr(routes, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(routes, "load_model", lambda *_: (None, None, None))
    monkeypatch.setattr(
        routes, "count_routes", lambda *args: seen.append(args[-1].tolist()) or np.ones((2, 4))
    )
    counts = str(tmp_path / "c.npz")
    assert infer.main(["routes", "-p", "ab", "--counts", counts, "--picture", ""]) == 0
    assert seen == [[11, 97, 98]]


def by_windows(flat, data):
    """Counts [L, E] from a model on one device, one window after the other, without masks."""
    from jax.sharding import PartitionSpec as P

    from moejax.training.state import Blueprint, load_weights
    from sharding.mesh import make_mesh

    blueprint = Blueprint(CONFIG, make_mesh(MeshShape()))
    weights = load_weights(flat, blueprint, jnp.dtype("float32"))

    def run(params, biases, tokens):
        return blueprint.merge(params, biases)(tokens, inference=True).aux.counts_E

    run = jax.jit(
        jax.shard_map(run, mesh=blueprint.mesh, in_specs=P(), out_specs=P(), check_vma=False)
    )
    windows = [data[i : i + CONFIG.max_context] for i in range(0, len(data), CONFIG.max_context)]
    return sum(
        np.asarray(run(*weights, jnp.asarray(np.frombuffer(w, np.uint8).astype(np.int32)[None])))
        for w in windows
    )


def test_a_picture_as_svg(script, folder, tmp_path):
    picture = tmp_path / "picture.svg"
    flags = ("--counts", tmp_path / "c.npz", "--picture", picture, "--mesh", "1x1x1")
    assert script("routes", "--model", folder, "-p", "some text", *flags)[0] == 0
    assert "<svg" in picture.read_text()


# --- flags, mistakes ---------------------------------------------------------------------------


def test_flags_reach_the_engine(folder, monkeypatch):
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    flags = EngineFlags(
        model=str(folder),
        mesh="1x2x1",
        expert_weights="int8",
        max_rows=3,
        max_len=40,
        page_len=8,
        pages=20,
        max_waiting=7,
        deterministic=True,
    )
    engine = make_engine(open_model(folder), flags)
    settings = engine.settings
    assert (engine.max_len, settings.max_waiting, settings.deterministic) == (40, 7, True)
    stats = engine.stats()
    assert (stats.rows, stats.pages) == (4, 40)
    engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=2))
    made = []
    while engine.has_work:
        made += [token for event in engine.step() for token in event.tokens]
    assert len(made) == 2


def test_few_pages_are_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    flags = EngineFlags(model=str(folder), mesh="1x1x1", max_rows=1, page_len=8, pages=3)
    assert make_engine(open_model(folder), flags).max_len == 24
    assert capsys.readouterr().err == (
        "texts of at most 24 tokens, not 96: --pages 3 hold no more\n"
    )
    with running_model(flags, chats=False, prefix_reuse=False) as (_, loop):
        assert not loop.engine.settings.prefix_reuse
    with pytest.raises(UserError, match="hold 24 tokens, fewer than --max-len 25"):
        dataclasses.replace(flags, max_len=25)


def test_progress_is_told(folder, monkeypatch, capsys):
    asked = []

    def opened(path, report=None, progress=None):
        asked.append(progress)
        return open_model(folder)

    monkeypatch.setattr("moejax.inference.source.open_model", opened)
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    flags = EngineFlags(mesh="1x1x1", max_rows=1, max_len=16)
    with running_model(flags, chats=False):
        pass
    monkeypatch.setattr(infer, "load", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(console, "interact", lambda *_: None)
    monkeypatch.setattr(console, "read_prompts", lambda *_: [])
    assert infer.main([]) == 0
    capsys.readouterr()
    for progress in asked:
        progress(1, 2)
        assert capsys.readouterr().err == ""
    monkeypatch.setattr(start, "_NOTE_SECONDS", -1)
    for progress in asked:
        progress(1_500_000_000, 4_000_000_000)
    assert capsys.readouterr().err == "read 1.5 of 4.0 GB of weights\n" * 2


@pytest.mark.parametrize(
    "argv, told",
    [
        (["talk"], "'talk': no such mode; there are chat, serve, batch, bench, routes"),
        (["chat", "--temprature", "1"], "the closest is --temperature"),
        (["chat", "--temperature", "-1"], "temperature=-1"),
        (["chat", "--max-rows", "0"], "max_rows=0"),
        (["chat", "--pages", "-1"], "--pages -1"),
        (["chat", "--mesh", "foo"], "mesh 'foo'"),
        (["chat", "--max-len", "5000"], "max_len=5000"),
        (["chat", "--max-tokens", "-1"], "max_tokens=-1"),
        (["batch"], "--input: missing"),
        (["batch", "-i", "/no/such"], "--output: missing"),
        (["batch", "-i", "/no/such", "-o", "out"], "/no/such: No such file"),
        (["batch", "-i", "same", "-o", "./same"], "is the input"),
        (["bench", "--loads", "0"], "--loads 0"),
        (["bench", "--requests", "-1"], "--requests -1"),
        (["bench", "--prompt-tokens", "5000"], "together at most"),
        (["bench", "--prompts", "/no/such"], "--prompts /no/such: No such file"),
        (["serve", "--port", "99999"], "--port 99999"),
        (["serve", "--grace", "-1"], "--grace -1"),
        (["serve", "--request-seconds", "nan"], "--request-seconds nan"),
        (["serve", "--api-key-file", "/no/such"], "/no/such: No such file"),
        (["serve", "--api-key-file", "/dev/null"], "must hold one word"),
        (["serve", "--host", "203.0.113.1", "--no-warm-up"], "cannot listen there"),
        (["routes"], "--text, --prompt: give one of them"),
        (["routes", "-p", "x", "--counts", "x.txt"], "must end with .npz"),
        (["routes", "-p", "x", "--picture", "x.gif"], "must end with .png or .svg"),
        (["routes", "-p", "x", "--mesh", "1x1x1", "--counts", "/no/x.npz"], "/no/x.npz: No such"),
        (["routes", "--text", "/no/such"], "/no/such: No such file"),
        (["routes", "--text", "/dev/null"], "the text is empty"),
        (["--expert-weights", "int4"], "--expert-weights"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, told, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(routes, "keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    argv = [argv[0], "--model", str(folder), *argv[1:]]
    assert infer.main(argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("error: ") and told in err[0], err


@pytest.mark.parametrize("mode", ["chat", "serve", "batch", "bench", "routes"])
def test_each_mode_has_help(mode, capsys):
    with pytest.raises(SystemExit) as end:
        infer.main([mode, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"infer.py {mode}" in out and "--model" in out and "--expert-weights" in out
    with pytest.raises(SystemExit):
        infer.main(["--help"])
    assert f"  {mode} " in capsys.readouterr().out
