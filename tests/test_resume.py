"""Runs of train.py: what they leave behind, and going on after stops, kills and on other meshes."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from run_support import ROOT, TIMES, TINY, kept_programs, refused, rows, run, stop_at, write_text

import train
from moejax.presets import small, tiny
from moejax.training import checkpoint, session
from moejax.training.checkpoint import Checkpoints
from moejax.training.rundir import RunDir

STEPS = 24


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    with kept_programs(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SAMPLE_TOKENS", 8)
        yield folder


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("data") / "text")
    return [*TINY, "--data", text, "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags):
    """A run from start to end: its directory and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = run(*flags, "--run", path, "--eval-every", 8)
    assert code == 0, err
    return path, out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, flags):
    """A run that got SIGTERM in its fourth step."""
    path = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        code, out, err = run(*flags, "--run", path)
    assert code == 0, err
    assert f"stopped after step 4; continue with: python train.py --run {path}" in out
    assert RunDir(path).metrics()[-1]["step"] == 4
    assert Checkpoints(path / "checkpoints").latest_step() == 4
    assert not (path / "summary.json").exists()
    return path


# ── what a run leaves ────────────────────────────────────────────────────────


def test_files_of_a_run(whole):
    path, out = whole
    names = {p.name for p in path.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "evaluations.jsonl", "summary.json", "checkpoints"),
        *("samples.txt", "loss.png", "expert_load.png", "tokenizer", "lock"),
    }
    for name in ("loss.png", "expert_load.png"):
        with Image.open(path / name) as image:
            image.verify()
            assert image.format == "PNG" and min(image.size) > 100
    assert Checkpoints(path / "checkpoints").steps() == [STEPS - 2, STEPS]
    summary = json.loads((path / "summary.json").read_text())
    assert summary["steps"] == STEPS and 0 < summary["bits_per_byte"] < 16
    for name in ("zlib", "xz", "training_seconds", "tokens_per_second"):
        assert summary[name] > 0
    assert len(summary["text"]["corpus_sha256"]) == 64
    evaluations = RunDir(path).evaluations()
    assert [row["step"] for row in evaluations] == [8, 16, STEPS]
    assert evaluations[-1]["heldout_bits_per_byte"] == summary["bits_per_byte"]
    assert (path / "samples.txt").read_text().startswith(f"--- step {STEPS}, ")
    for words in ("held-out", "zlib", "xz", f"infer.py --model {path} -p ", "\nsample:\ndef "):
        assert words in out, words


def test_metrics_have_a_row_a_step_with_every_field(whole):
    path, _ = whole
    metrics = RunDir(path).metrics()
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    for row in metrics:
        for name in (
            *("loss", "bits_per_byte", "aux_loss", "learning_rate", "grad_norm"),
            *("step_seconds", "memory_bytes", "load_max_over_mean"),
        ):
            assert np.isfinite(np.asarray(row[name])).all(), name
        assert {*TIMES, "router_entropy", "exchange"} <= row.keys()
        assert row["exchange"]["dropped"] == [0, 0]
        # 2 of the 4 devices hold an expert of a token each way at most, 256 tokens, 2 layers.
        assert np.asarray(row["tokens_per_expert"]).sum(1).tolist() == [2 * 256] * 2
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["tokens_per_second"] > 0
    assert metrics[0]["loss"] == pytest.approx(np.log(257), rel=0.1)


# ── going on ─────────────────────────────────────────────────────────────────


def copied(path, tmp_path):
    return shutil.copytree(path, tmp_path / "copy", ignore=shutil.ignore_patterns("lock"))


def test_resumed_after_sigterm_bit_for_bit(stopped, whole, tmp_path):
    """Nothing but the directory is named: the flags come from the run's own record."""
    path = copied(stopped, tmp_path)
    code, out, err = run("--run", path)
    assert code == 0, err
    assert "resuming after step 4" in out and "note:" not in out
    assert rows(path) == rows(whole[0])
    ends = [json.loads((p / "summary.json").read_text())["bits_per_byte"] for p in (path, whole[0])]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "mesh", ["expert=2,tensor=2", pytest.param("expert=4,tensor=2", marks=pytest.mark.slow)]
)
def test_resumed_on_another_mesh(stopped, whole, tmp_path, mesh):
    path = copied(stopped, tmp_path)
    code, out, err = run("--run", path, "--mesh", mesh)
    assert code == 0 and "resuming after step 4" in out, err
    got, want = (np.array([r["loss"] for r in rows(p)]) for p in (path, whole[0]))
    assert len(got) == STEPS
    np.testing.assert_array_equal(got[:4], want[:4])
    assert len(got[4:]) == 20
    np.testing.assert_allclose(got[4:], want[4:], rtol=1e-5)


KILLED = """
import os, signal, sys
import train
from moejax.training import checkpoint, session
session.SAMPLE_TOKENS = 8
write = checkpoint.manifest.write

def killed(path, head):
    if head["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, head)

checkpoint.manifest.write = killed
sys.exit(train.main(sys.argv[1:]))
"""


def test_killed_in_the_middle_of_a_save(flags, whole, programs, tmp_path):
    path = tmp_path / "killed"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(programs)}
    command = [sys.executable, "-c", KILLED, *flags, "--run", str(path)]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert Checkpoints(path / "checkpoints").steps() == [2]
    assert (path / "checkpoints" / "step_00000004").exists()
    assert RunDir(path).metrics()[-1]["step"] >= 4
    code, out, err = run("--run", path)
    assert code == 0 and "resuming after step 2" in out, err
    assert rows(path) == rows(whole[0])


def test_damaged_newest_checkpoint_is_passed_over(whole, tmp_path):
    path = copied(whole[0], tmp_path)
    newest = path / "checkpoints" / f"step_{STEPS:08d}"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    code, out, err = run("--run", path)
    assert code == 0, err
    assert "the checkpoint is damaged: " in out and f"resuming after step {STEPS - 2}" in out
    assert rows(path) == rows(whole[0])
    assert [row["step"] for row in RunDir(path).evaluations()] == [8, 16, STEPS]


def test_changed_text_is_told(whole, flags, tmp_path):
    path = copied(whole[0], tmp_path)
    text = shutil.copytree(flags[flags.index("--data") + 1], tmp_path / "text")
    with open(text / "0.txt", "a") as file:
        file.write("more\n")
    code, out, err = run("--run", path, "--data", text)
    assert code == 0, err
    assert "note: the text has changed since this run was started" in out
    assert [r["step"] for r in rows(path)] == list(range(1, STEPS + 1))


def test_second_run_on_the_same_directory_is_refused(flags, tmp_path):
    with RunDir.create_or_open(tmp_path):
        line = refused(*flags, "--run", tmp_path)
    assert f"process {os.getpid()} on " in line and "choose another directory" in line


def test_resume_takes_the_newest_run(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no run under runs/; start one without the flag" in refused("--resume")
    for name in ("b", "a"):
        path = tmp_path / "runs" / name
        shutil.copytree(stopped, path, ignore=shutil.ignore_patterns("lock"))
        os.utime(path / "config.json", (1000, 1000 + (name == "a")))
    config = train.read_flags(["--resume", "--steps", "99"])
    assert config.run == "runs/a" and config.steps == 99 and config.model.d_model == 32
    assert train.run_path(config) == "runs/a"
    # A preset that is named counts, and is told to be of another model later.
    assert train.read_flags(["--run", "runs/a", "--preset", "small"]).model == small().model
    fresh = train.read_flags(["--run", "runs/c"])
    assert fresh == dataclasses.replace(tiny(), run="runs/c")


# ── checkpoints and disks that fail ──────────────────────────────────────────


def snapshot(path):
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and p.name != "lock"
    }


def test_run_of_another_model(stopped, tmp_path):
    path = copied(stopped, tmp_path)
    before = snapshot(path)
    line = refused("--run", path, "--model.d-model", "64")
    assert "model.d_model is 32 there and 64 here" in line
    line = refused("--run", path, "--model.moe.exchange.wire.dispatch", "int8")
    assert "model.moe.exchange.wire.dispatch is 'compute' there and 'int8' here" in line
    line = refused("--run", path, "--preset", "tiny")
    assert "another configuration" in line and "choose a new run directory" in line
    assert snapshot(path) == before


def test_checkpoint_of_another_model(stopped, tmp_path):
    """The record says this model, and the checkpoint does not."""
    path = copied(stopped, tmp_path)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"hidden": 16', '"hidden": 8'))
    before = snapshot(path / "checkpoints")
    line = refused("--run", path)
    assert "params/" in line and "another model" in line
    assert snapshot(path / "checkpoints") == before


def test_checkpoint_of_another_version(stopped, tmp_path):
    path = copied(stopped, tmp_path)
    for manifest in (path / "checkpoints").glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(content | {"format": 99}))
    before = snapshot(path / "checkpoints")
    line = refused("--run", path)
    assert "99" in line
    assert snapshot(path / "checkpoints") == before


def test_truncated_checkpoints(stopped, tmp_path):
    path = copied(stopped, tmp_path)
    for step in Checkpoints(path / "checkpoints").steps():
        folder = path / "checkpoints" / f"step_{step:08d}"
        largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    before = rows(path)
    line = refused("--run", path)
    assert "no checkpoint is usable" in line and "damaged" in line
    assert rows(path) == before


def test_record_of_another_version(stopped, tmp_path):
    path = copied(stopped, tmp_path)
    record = path / "config.json"
    record.write_text(record.read_text().replace('"accumulate"', '"accumulation"'))
    line = refused("--run", path)
    assert "unknown key accumulation" in line and "missing key accumulate" in line
    assert "config.json" in line


def test_full_disk_while_saving(stopped, whole, tmp_path, monkeypatch):
    """The save of step 6 fails; the checkpoint of step 4 is there, and the run goes on from it."""
    path = copied(stopped, tmp_path)
    write = checkpoint.manifest.write

    def full(folder, head):
        if head["step"] >= 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write(folder, head)

    monkeypatch.setattr(checkpoint.manifest, "write", full)
    line = refused("--run", path)
    assert "the disk is full" in line and "free some space" in line and "step 4" in line
    monkeypatch.undo()
    assert Checkpoints(path / "checkpoints").latest_step() == 4
    code, out, err = run("--run", path)
    assert code == 0 and "resuming after step 4" in out, err
    assert rows(path) == rows(whole[0])


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [("--seed", 5, "seed"), ("--data.batch-size", 16, "data.batch_size")],
)
def test_what_a_step_reads_cannot_change(stopped, tmp_path, flag, value, name):
    """Another seed or batch size would jump in the order of examples without a word."""
    path = copied(stopped, tmp_path)
    before = (path / "config.json").read_bytes()
    code, _, err = run("--run", path, flag, value)
    assert code == 2 and f"{name} is " in err and err.count("\n") == 1
    assert (path / "config.json").read_bytes() == before


def test_a_failure_at_the_end_keeps_the_last_checkpoint(stopped, tmp_path, monkeypatch):
    """The save under way is completed before the run lets go of its directory."""

    def fail(*_, **__):
        raise RuntimeError("no picture today")

    path = copied(stopped, tmp_path)
    monkeypatch.setattr(session.Session, "finish", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        run("--run", path, "--steps", 6)
    assert Checkpoints(path / "checkpoints").latest_step() == 6


def test_held_out_text_is_not_trained_on(tmp_path):
    """The same text under another name is left out of the training documents."""
    from moejax.config import ModelConfig
    from moejax.training.config import DataConfig, TrainConfig
    from moejax.training.text import prepare_text

    (tmp_path / "a.txt").write_text("one text\n" * 50)
    (tmp_path / "b.txt").write_text("another text\n" * 50)
    (tmp_path / "held.txt").write_text("one text\n" * 50)
    paths = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    data = DataConfig(paths=paths, held_out_paths=(str(tmp_path / "held.txt"),), seq_len=8)
    text = prepare_text(TrainConfig(model=ModelConfig(vocab_size=257), data=data))
    assert text.record["training_bytes"] == len("another text\n") * 50
    assert text.record["held_out_bytes"] == len("one text\n") * 50
