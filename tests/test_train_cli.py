"""train.py's flags, and what it refuses: one line with the value, the rule and the remedy."""

import dataclasses
import errno
import itertools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from run_support import ROOT, TINY, refused, run, write_text

import train
from moejax.config import AttentionConfig, ModelConfig
from moejax.errors import UserError
from moejax.model.attention import choose_attention
from moejax.presets import PRESETS, olmoe_1b_7b, small, tiny
from moejax.training import files
from moejax.training.config import TrainConfig
from sharding.mesh import MeshShape


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("data") / "text")
    return [*TINY, "--data", text]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs that are not named begin under runs/ of the working directory."""
    monkeypatch.chdir(tmp_path)


# ── flags ────────────────────────────────────────────────────────────────────


def test_flags_over_a_preset():
    assert train.read_flags([]) == tiny()
    config = train.read_flags(["--preset", "olmoe-1b-7b", "--steps", "7", "--vocab", "300"])
    want = olmoe_1b_7b()
    data = dataclasses.replace(want.data, vocab=300)
    assert config == dataclasses.replace(want, steps=7, data=data)
    assert type(config) is TrainConfig
    assert train.read_flags(["--preset=small"]) == train.read_flags(["--steps", "2000", *SMALL])
    config = train.read_flags(["--data", "a", "b", "--vocab", "1000"])
    assert (config.data.paths, config.data.vocab) == (("a", "b"), 1000)
    assert config.model.vocab_size == 1000  # made to fit
    for name in PRESETS:
        assert isinstance(train.read_flags(["--preset", name]), TrainConfig)


SMALL = ["--preset", "small"]


def test_small_is_what_its_preset_says():
    assert train.read_flags(SMALL) == small()


def test_help_explains_the_flags(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for words in (
        *("--preset NAME", "mixtral-8x7b", "--data [STR [STR ...]], --data.paths", "--vocab INT"),
        *("files, folders, globs", "optimizer steps", "largest global gradient norm"),
        *("experts of a token", "--model.moe.exchange.bucket-rows", "base of the rotary"),
        *("width H of one expert", "continue the newest run under runs/", "multiplies the scores"),
    ):
        assert words in text, words
    # Every flag is explained: a line between its name and its default at least.
    lines = [line.strip("│ \n") for line in text.splitlines()]
    pairs = itertools.pairwise(lines)
    bare = [a for a, b in pairs if a.startswith("--") and b.startswith("(default")]
    assert not bare


def test_mesh():
    def chosen(mesh, experts=16):
        config = dataclasses.replace(tiny(), mesh=mesh)
        router = dataclasses.replace(config.model.moe.router, num_experts=experts)
        moe = dataclasses.replace(config.model.moe, router=router)
        model = dataclasses.replace(config.model, moe=moe)
        return train.choose_mesh(dataclasses.replace(config, model=model)).sizes

    assert chosen("data=2,tensor=2") == (2, 1, 2)
    for experts in (2, 3, 4, 6, 8, 64):
        data, expert, tensor = chosen("auto", experts)
        assert data * expert == jax.device_count() == 8 and tensor == 1 and expert <= experts
    assert chosen("auto", 64) == (1, 8, 1)


def test_dry_run_of_a_mesh_larger_than_this_machine():
    code, out, err = run(
        *("--dry-run", "--preset", "qwen3-30b-a3b", "--mesh", "data=2,expert=8,tensor=4"),
        *("--model.moe.router.num-experts", "512"),
    )
    assert code == 0, err
    assert len(out.splitlines()) > 10 and not os.listdir(".")


# ── refused before anything is written ───────────────────────────────────────


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--stepz", "3"], ["--stepz", "no such flag", "--steps", "see train.py --help"]),
        (["--num-layers", "3"], ["--model.num-layers"]),
        (["--steps", "many"], ["--steps", "'many'", "INT"]),
        (["--steps", "0"], ["steps=0", "at least 1"]),
        (["--preset", "nope"], ["--preset 'nope'", "no such preset", "tiny", "mixtral-8x7b"]),
        (["--preset"], ["--preset ''", "no such preset"]),
        (["--mesh", "expert=16", "--devices", "8"], ["16 devices", "there are 8", "shrink"]),
        (["--mesh", "tensor=3"], ["tensor=3"]),
        (["--mesh", "expert=0"], ["expert=0", "at least 1"]),
        (["--mesh", "experts=2"], ["'experts=2'", "write data=2,expert=4,tensor=1"]),
        (
            ["--mesh", "expert=8", "--model.moe.router.num-experts", "4"],
            ["num_experts=4", "expert=8", "shrink"],
        ),
        (
            ["--mesh", "data=2,expert=2", "--data.batch-size", "6", "--accumulate", "3"],
            ["batch_size=6", "data × expert × accumulate = 2 × 2 × 3 = 12", "--data.batch-size 12"],
        ),
        (["--data.batch-size", "9", "--accumulate", "2"], ["batch_size=9", "accumulate=2"]),
        (["--data.seq-len", "64"], ["seq_len=64", "max_context=32", "--model.max-context"]),
        (["--model.moe.router.top-k", "9"], ["top_k=9", "num_experts=8"]),
        (["--resume"], ["--resume", "no run under runs/"]),
        (["--init-from", "nowhere"], ["nowhere", "nothing there", "name a run directory"]),
    ],
)
def test_flags_that_do_not_fit(argv, words):
    line = refused(*TINY, *argv)
    for word in words:
        assert word in line, line
    assert not os.listdir("."), "a run that cannot start leaves nothing"


def test_as_a_program(tmp_path):
    """What a shell sees, in a terminal that knows ASCII only."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(ROOT / "train.py"), "--mesh", "expert=16", "--devices", "8"]
    bad = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: mesh data=1,expert=16,tensor=1 needs 16 devices")
    assert bad.stderr.count("\n") == 1


# ── text ─────────────────────────────────────────────────────────────────────


def no_run_is_left():
    """A directory may stay, but none that `--resume` would take for a run."""
    return not [p for p, _, names in os.walk(".") if "config.json" in names]


def test_text_that_cannot_be_used(flags, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 500)
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    for name, words in (
        ("missing", ["missing", "no such file", "check the path"]),
        ("none", ["none", "holds no text", "name files, folders or globs"]),
        ("empty.txt", ["empty.txt"]),
        ("latin.txt", ["latin.txt", "not UTF-8 at byte 0", "convert the file"]),
        ("short.txt", ["3 bytes", "give more text"]),
        ("*.nothing", ["*.nothing", "matches nothing", "quote it"]),
        ("bad.jsonl", ["bad.jsonl, line 2"]),
    ):
        line = refused(*flags, "--data", str(tmp_path / name))
        for word in words:
            assert word in line, line
        assert no_run_is_left()


def test_tokenizer_that_does_not_fit(flags, tmp_path):
    from moejax.data.corpus import Document
    from moejax.data.tokenizer import train_bpe

    letters = np.random.default_rng(0).integers(97, 123, size=(2000, 4), dtype=np.uint8)
    text = " ".join(bytes(word).decode() for word in letters)
    (tmp_path / "bpe").mkdir()
    train_bpe([Document("a", text)], 300).save(tmp_path / "bpe")
    given = str(tmp_path / "bpe" / "tokenizer.json")
    line = refused(*flags, "--data.tokenizer", given)
    assert "vocab_size=257" in line and "300 ids" in line
    assert "pass --model.vocab-size 300" in line
    assert "200" in refused(*flags, "--vocab", "200")  # fewer than the bytes
    line = refused(*flags, "--data.tokenizer", str(tmp_path / "no.json"))
    assert "no.json" in line
    (tmp_path / "odd.json").write_text("{")
    assert "odd.json" in refused(*flags, "--data.tokenizer", str(tmp_path / "odd.json"))
    assert no_run_is_left()


# ── the rest ─────────────────────────────────────────────────────────────────


def test_run_directory_that_is_a_file(flags, tmp_path):
    (tmp_path / "file").write_text("")
    assert "a directory is needed" in refused(*flags, "--run", str(tmp_path / "file"))


def test_full_disk_at_the_start(flags, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    line = refused(*flags, "--run", str(tmp_path / "run"))
    assert "the disk is full" in line and "free some space" in line


def test_mistakes_of_the_program_are_not_hidden(flags, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(train, "check_batch", broken)
    with pytest.raises(ZeroDivisionError):
        run(*flags)


def test_check_batch():
    config = dataclasses.replace(tiny(), data=dataclasses.replace(tiny().data, batch_size=16))
    train.check_batch(config, MeshShape(2, 4, 1))
    train.check_batch(config, MeshShape(1, 1, 8))  # `tensor` does not split examples
    with pytest.raises(UserError, match=r"batch_size=16.* = 3 × 1 × 1 = 3; .*--data.batch-size 18"):
        train.check_batch(config, MeshShape(3, 1, 1))


@pytest.mark.parametrize(
    "platform, dtype, head_dim, want",
    [
        ("gpu", "bfloat16", 64, "cudnn"),
        ("cuda", "bfloat16", 128, "cudnn"),
        ("gpu", "bfloat16", 192, None),
        ("gpu", "bfloat16", 12, None),
        ("gpu", "float32", 64, None),
        ("cpu", "bfloat16", 64, None),
    ],
)
def test_attention_on_a_platform(platform, dtype, head_dim, want):
    attention = AttentionConfig(4, 2, head_dim)
    config = ModelConfig(attention=attention, compute_dtype=dtype)
    assert choose_attention(platform, config) == want
    assert choose_attention(platform, config, deterministic=True) == "xla"
