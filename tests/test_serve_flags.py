"""Folders and flags of the modes of `infer.py`: what reaches the engine, mistakes, help."""

import contextlib
import dataclasses
import json

import pytest
from modes_support import CONFIG, make_folder, make_weights

import infer
from moejax import progress as progress_module
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference import console
from moejax.inference.params import SamplingParams
from moejax.inference.source import ModelSource, open_model
from moejax.serving import routes, start
from moejax.serving.flags import EngineFlags
from moejax.serving.protocol import read_job
from moejax.serving.start import make_engine, running_model
from moejax.serving.text_model import TextModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory, make_weights())


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
    monkeypatch.setattr(progress_module, "SECONDS", -1)
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
        (["routes", "-p", "x", "--pairs-picture", "x"], "--pairs-picture x: must end with .png"),
        (["routes", "-p", "x", "--trace", "x.png"], "--trace x.png: must end with .npz"),
        (["routes", "-p", "x", "--domain", "a", "b"], "2 labels for 1 documents"),
        (["routes", "--text", "-", "a", "-"], "name it once"),
        (["routes", "-p", "x", "--mesh", "1x1x1", "--counts", "/no/x.npz"], "/no/x.npz: No such"),
        (["routes", "-p", "x", "--mesh", "1x1x1", "--trace", "/no/x.npz"], "/no/x.npz: No such"),
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
