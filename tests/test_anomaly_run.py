"""Runs of train.py with steps that are not finite: skipped, stopped before, looked into."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from processes_support import processes
from run_support import TINY, assert_rows_close, kept_programs, refused, rows, run, write_text

from moejax.training.anomaly_log import read_dump
from moejax.training.session import Session

STEPS = 30  # of which one epoch at least has all of the text
FLAGS = [*TINY, "--steps", str(STEPS), "--keep", "99", "--anomaly.spike", "ignore"]
POISON = ord("Z")  # a byte that the text has once; its embedding is not finite


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    text = Path(write_text(tmp_path_factory.mktemp("text") / "files"))
    # Not in a file that is held out, whichever that is: in one that is all training text.
    (text / "z.jsonl").write_text(json.dumps({"text": "x = Z\n"}))
    held = text / "held.txt"
    held.write_text("def return x self\n" * 20)
    return [*FLAGS, "--data", text, "--data.held-out-paths", held]


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with kept_programs(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    begin = Session.begin

    def poison(self):
        state = begin(self)
        flat = []
        for path, variable in nnx.to_flat_state(state.masters):
            if path[0] == "embedding":
                value = variable.get_value()
                variable = variable.replace(value.at[POISON].set(np.nan))
            flat.append((path, variable))
        state = dataclasses.replace(state, masters=nnx.from_flat_state(flat))
        return jax.block_until_ready(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "begin", poison)
        yield


@pytest.fixture(scope="module")
def skipped(flags, tmp_path_factory):
    path = tmp_path_factory.mktemp("skipped") / "run"
    code, out, err = run(*flags, "--run", path)
    assert code == 0, err
    return path, out


def anomalies(path):
    return [row["step"] for row in rows(path) if row.get("anomaly") == "nonfinite"]


def test_a_step_that_is_skipped_is_told_and_kept(skipped):
    path, out = skipped
    found = anomalies(path)
    assert 1 <= len(found) <= 3
    for row in rows(path):
        if row["step"] in found:
            assert row["loss"] is None and row["applied"] is False
        else:
            assert np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"])
    files = sorted((path / "anomalies").iterdir())
    assert [file.name for file in files] == [f"step_{step:08d}.npz" for step in found]
    for step, file in zip(found, files):
        assert f"step {step}: not finite: loss nan, norm of the gradient nan: skipped; its " in out
        dump = read_dump(file)
        assert dump.step == step and np.isnan(dump.loss)
        assert (dump.tokens[..., :-1] == POISON).any() and dump.tokens.shape == (1, 8, 33)


def test_a_batch_is_looked_into(skipped):
    path, _ = skipped
    step = anomalies(path)[0]
    file = path / "anomalies" / f"step_{step:08d}.npz"
    before = {f: f.stat().st_mtime_ns for f in path.rglob("*")}
    code, out, err = run("--run", path, "--replay", file)
    assert code == 0, err
    tokens = read_dump(file).tokens[0]
    (bad,) = np.flatnonzero((tokens[:, :-1] == POISON).any(1))
    lines = out.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("  example ")][:1]
    assert lines[first].startswith(f"  example {bad}: nan nats a token")
    other = float(lines[first + 1].split(": ")[1].split()[0])
    assert np.isfinite(other)
    saved = (step - 1) // 2 * 2
    assert f"weights: of step {saved}" in out
    assert "weights: not finite in 1 of " in out and "embedding" in out
    assert "gradient: not finite in " in out
    assert {f: f.stat().st_mtime_ns for f in path.rglob("*")} == before


@pytest.mark.slow
def test_a_run_stops_before_the_step_and_goes_on(flags, skipped, tmp_path):
    """Its checkpoint is that of the step before; without that batch it is the run that skipped."""
    path, step = tmp_path / "run", anomalies(skipped[0])[0]
    for _ in range(2):  # again, it stops again
        err = refused(*flags, "--run", path, "--anomaly.nonfinite", "stop")
        assert f"step {step}: not finite" in err and "--anomaly.nonfinite stop" in err
        assert f"the checkpoint of step {step - 1} is the state before it" in err
        newest = max((path / "checkpoints").iterdir())
        assert newest.name == f"step_{step - 1:08d}" and (newest / "manifest.json").exists()
        assert len(rows(path)) == step
    (file,) = (path / "anomalies").iterdir()
    code, out, err = run("--run", path, "--replay", file)
    assert code == 0 and "those that it began with" in out, err
    code, _, err = run(*flags, "--run", path, "--anomaly.nonfinite", "skip")
    assert code == 0, err
    assert_rows_close(rows(path), rows(skipped[0]))  # of a step that stops, and one that skips


@pytest.mark.slow
def test_weights_that_are_lost_stop_a_run(flags, tmp_path):
    path = tmp_path / "run"
    wild = ["--optimizer.learning-rate", "1e30", "--optimizer.clip-norm", "0"]
    more = ["--anomaly.most-in-a-row", "3", "--anomaly.dumps", "2"]
    err = refused(*flags, *wild, *more, "--run", path)
    assert "3 steps before it were skipped one after the other" in err
    assert "--optimizer.learning-rate" in err
    # Two as asked for, and the one that stops the run.
    found = sorted(file.name for file in (path / "anomalies").iterdir())
    assert len(found) == 3 and len(rows(path)) == int(found[-1][5:13])


def test_what_cannot_be_replayed(skipped, tmp_path):
    path, _ = skipped
    (tmp_path / "text").write_text("no batch")
    np.savez(tmp_path / "other.npz", tokens=np.zeros(3))
    file = path / "anomalies" / f"step_{anomalies(path)[0]:08d}.npz"
    assert "nothing.npz: No such file" in refused("--run", path, "--replay", "nothing.npz")
    for name in ("text", "other.npz"):
        err = refused("--run", path, "--replay", tmp_path / name)
        assert f"{name}: no batch that a run has kept" in err
    assert "name the run that kept it" in refused(*TINY, "--replay", file)
    err = refused("--run", path, "--replay", file, "--mesh", "data=3")
    assert "batch_size=8" in err


@pytest.mark.slow
def test_two_processes_stop_as_one(flags, tmp_path):
    wild = ["--optimizer.learning-rate", "1e30", "--optimizer.clip-norm", "0"]
    argv = [*flags, *wild, "--devices", "4", "--anomaly.nonfinite", "stop"]
    argv += ["--run", tmp_path / "run"]
    with processes(tmp_path / "said", "train", argv, argv) as group:
        ended = group.wait(200)
    assert [process.code for process in ended] == [2, 2], group.said()
    said = "".join(process.err for process in ended)
    assert said.count("not finite") == 1 and "error: step 2: not finite" in said, said
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name == "step_00000001"
