"""train.py over several processes of fake devices, which talk by gloo: as a single process does.

Losses of float32 steps agree to 1e-5: sums over devices are taken in another order, no more.
"""

import json
import os
import signal

import numpy as np
import pytest
from processes_support import GLOO, processes, together
from run_support import TINY, rows, run, write_text

STEPS = 20
SHORT = [*TINY, "--devices", "4", "--steps", STEPS, "--save-every", "10", "--keep", "9"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "files")


def losses(path, first=1):
    found = [row for row in rows(path) if row["step"] >= first]
    return np.array([row["loss"] for row in found]), np.array([row["grad_norm"] for row in found])


def assert_same(one, other, first=1, last=STEPS, of_norms=1e-4):
    """The steps' losses and norms; losses move far more than the tolerance meanwhile."""
    (a, norm_a), (b, norm_b) = losses(one, first), losses(other, first)
    assert len(a) >= last - first + 1 and len(b) >= last - first + 1
    count = last - first + 1
    np.testing.assert_allclose(a[:count], b[:count], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm_a[:count], norm_b[:count], rtol=of_norms)
    if first == 1:
        assert a[0] - a[-1] > 0.5


def only_steps(monkeypatch):
    """The single process leaves out what the others do: the last evaluation, the sample."""
    from moejax.training.session import Session

    monkeypatch.setattr(Session, "finish", lambda self, *args, **more: self.placing.finish())


def single(monkeypatch, *argv):
    only_steps(monkeypatch)
    code, _, err = run(*argv)
    assert code == 0, err


def exchange(mode):
    return ["--model.moe.exchange.mode", mode]


def test_what_gloo_prints_is_left_out(rng):
    """However the pieces of two or three threads' lines fall among each other."""
    line = ["[Gloo] Rank ", "", " is connected to ", "", " peer ranks. "]
    line += ["Expected number of connected peer ranks is : ", "", "\n"]
    for _ in range(500):
        lines = [[p or str(rng.integers(16)) for p in line] for _ in range(rng.integers(1, 4))]
        printed = ""
        while any(lines):
            printed += lines[rng.choice([i for i, left in enumerate(lines) if left])].pop(0)
        assert GLOO.sub("", f"step 20/20{printed}3 experts\n") == "step 20/203 experts\n"


def test_two_processes_are_as_one(text, tmp_path, monkeypatch):
    small = ["--model.num-layers", "1"]
    argv = [*SHORT, "--data", text, "--mesh", "expert=4", *exchange("ring"), *small]
    ended = together(tmp_path / "said", "steps", 2, [*argv, "--run", tmp_path / "two"])
    single(monkeypatch, *argv, "--run", tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one")
    # Logs once, and one writer.
    out = [process.out for process in ended]
    assert out[0].count("step 20/20") == 1 and out[0].count("run directory") == 1
    assert out[1] == "" and ended[0].err == ended[1].err == ""
    one, two = ({f.name for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


# Wide enough for gradients to be compressed.
WIDE = ["--model.d-model", "128", "--model.moe.experts.hidden", "128"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "mesh", "mode", "more"),
    [
        (2, "data=2,expert=2", "ring", ["--accumulate", "2"]),
        (2, "expert=4", "all_to_all", []),
        (4, "data=2,expert=2", "all_to_all", ["--placement-stats"]),
        (4, "data=2,tensor=2", "ring", []),
        (2, "data=2,expert=2", "ring", [*WIDE, "--grad-compression.method", "int8"]),
    ],
)
def test_losses(text, tmp_path, monkeypatch, number, mesh, mode, more):
    argv = [*SHORT, "--data", text, "--mesh", mesh, *exchange(mode), *more]
    together(tmp_path / "said", "steps", number, [*argv, "--run", tmp_path / "many"])
    single(monkeypatch, *argv, "--run", tmp_path / "one")
    if "int8" in more:
        # What differs in the last bits is sometimes rounded to the next of 256 steps. In one
        # process, too: weights that differ by 2⁻²³ at the start move its losses by up to 5e-4,
        # from step 14 on, where 4e-6 are usual without rounding.
        assert_same(tmp_path / "many", tmp_path / "one", last=10, of_norms=1e-3)
        (many, _), (one, _) = losses(tmp_path / "many"), losses(tmp_path / "one")
        np.testing.assert_allclose(many, one, rtol=0, atol=2e-3)
    else:
        assert_same(tmp_path / "many", tmp_path / "one")
    if more == ["--placement-stats"]:
        one, many = (np.load(tmp_path / n / "placement_stats.npz") for n in ("one", "many"))
        assert one["load"].sum() > 0
        for name in one.files:
            np.testing.assert_allclose(one[name], many[name], rtol=1e-5)


@pytest.mark.slow
def test_checkpoints_fit_any_number_of_processes(text, tmp_path, monkeypatch):
    argv = [*SHORT, "--data", text, "--mesh", "data=2,expert=2", "--steps", "24"]
    single(monkeypatch, *argv, "--run", tmp_path / "one")
    path = tmp_path / "many"
    # Steps of 1, 2, 4, 2 and 1 processes; each goes on from what the one before has saved.
    for last, number in ((4, 1), (9, 2), (14, 4), (19, 2), (24, 1)):
        part = [*argv, "--run", path, "--save-every", "0"]
        if last == 24:
            single(monkeypatch, *part)
            break
        # The schedule is that of 24 steps, so each part is stopped by a signal.
        with processes(tmp_path / f"said{last}", "steps", *[part] * number) as group:
            group.wait_for_step(path, last - 3)
            os.kill(group.running[-1].pid, signal.SIGTERM)
            ended = group.wait()
            assert [process.code for process in ended] == [0] * number, group.said()
        assert "stopped after step" in ended[0].out
    assert_same(path, tmp_path / "one", last=24)


@pytest.mark.slow
def test_a_placement_that_follows_the_traffic(text, tmp_path, monkeypatch):
    follow = ["--placement", "auto", "--rebalance-every", "8", "--placement-stats-window", "0"]
    argv = [*SHORT, "--data", text, "--mesh", "expert=4", "--data.batch-size", "16", *follow]
    together(tmp_path / "said", "steps", 2, [*argv, "--run", tmp_path / "many"])
    single(monkeypatch, *SHORT, *argv[len(SHORT) : -len(follow)], "--run", tmp_path / "home")
    assert_same(tmp_path / "many", tmp_path / "home")
    looks = map(json.loads, (tmp_path / "many" / "placement.jsonl").read_text().splitlines())
    looks = list(looks)
    assert [look["step"] for look in looks] == [8, 16]
    assert looks[0]["kind"] == "plan" and looks[0]["moved"] > 0
    assert (tmp_path / "many" / "placement.png").exists()


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(text, tmp_path):
    path = tmp_path / "run"
    argv = [*SHORT, "--data", text, "--mesh", "data=2,expert=2", "--steps", "9999", "--run", path]
    with processes(tmp_path / "said", "steps", argv, argv) as group:
        group.wait_for_step(path, 12)
        os.kill(group.running[1].pid, signal.SIGTERM)
        ended = group.wait(60)
    assert [process.code for process in ended] == [0, 0], group.said()
    done = len(rows(path))
    assert f"stopped after step {done}" in ended[0].out
    assert (path / "checkpoints" / f"step_{done:08d}" / "manifest.json").exists()
    assert "SIGTERM" in ended[1].err and ended[0].err == ""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_who_is_killed_ends_the_other(text, tmp_path, killed):
    path = tmp_path / "run"
    argv = [*SHORT, "--data", text, "--mesh", "data=2,expert=2", "--steps", "9999", "--run", path]
    with processes(tmp_path / "said", "steps", argv, argv) as group:
        group.wait_for_step(path, 12)
        group.running[killed].kill()
        ended = group.wait(60)
    left = ended[1 - killed]
    assert left.seconds < 20
    if left.code == 2:
        (told,) = [line for line in left.err.splitlines() if line.startswith("error: ")]
        assert told.startswith(f"error: process {killed} of 2 ")
        assert "has ended without a word" in told
    else:  # where process 0 is gone JAX's own service may be the first to notice
        assert killed == 0 and left.code == -signal.SIGABRT
        assert "JAX distributed service detected fatal errors" in left.err
    # What was saved before is there for the next start.
    assert (path / "checkpoints" / "step_00000010" / "manifest.json").exists()


@pytest.mark.slow
def test_an_exception_in_one_ends_the_other(text, tmp_path):
    path = tmp_path / "run"
    argv = [*SHORT, "--data", text, "--mesh", "data=2,expert=2", "--run", path]
    with processes(tmp_path / "said", "raise:1:3", argv, argv) as group:
        ended = group.wait(120)
    assert [process.code for process in ended] == [2, 1], group.said()
    assert "Traceback" in ended[1].err and "the cat sat" in ended[1].err
    assert ended[0].err.count("\n") == 1
    assert "process 1 of 2" in ended[0].err and "RuntimeError: the cat sat" in ended[0].err


@pytest.mark.slow
def test_a_run_to_its_end_and_its_text(text, tmp_path, capsys):
    """Everything of train.py, then infer.py, by two processes and by one."""
    argv = [*SHORT, "--data", text, "--mesh", "data=2,expert=2", "--eval-every", "10"]
    two, one = tmp_path / "two", tmp_path / "one"
    ended = together(tmp_path / "said", "train", 2, [*argv, "--run", two])
    assert run(*argv, "--run", one)[0] == 0
    assert_same(two, one)
    for name in ("evaluations.jsonl", "summary.json"):
        lines = [(path / name).read_text().splitlines() for path in (two, one)]
        assert len(lines[0]) == len(lines[1])
    bits = [json.loads((p / "summary.json").read_text())["bits_per_byte"] for p in (two, one)]
    np.testing.assert_allclose(*bits, rtol=0, atol=1e-4)
    assert {f.name for f in two.iterdir()} == {f.name for f in one.iterdir()}
    assert ended[0].out.count("Training has ended") == 1 and ended[1].out == ""

    import infer

    asked = ["--model", two, "--mesh", "data=2,expert=2", "-p", "def x", "-p", "self", "--devices"]
    asked += ["4", "--max-tokens", "8", "--max-len", "32"]
    ended = together(tmp_path / "infer", "infer", 2, asked)
    capsys.readouterr()
    assert infer.main([str(word) for word in asked]) == 0
    # The last line has the time.
    assert ended[0].out.splitlines()[:-1] == capsys.readouterr().out.splitlines()[:-1]
    assert ended[1].out == ""
