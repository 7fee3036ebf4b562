"""The run directory: lock, configuration, metrics, and disks that refuse."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from moejax.config import ExchangeConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.data.corpus import Document
from moejax.data.tokenizer import Tokenizer, train_bpe
from moejax.errors import UserError
from moejax.training import files
from moejax.training.config_json import config_differences, config_from_json, config_to_json
from moejax.training.metrics import MetricsLog, read_metrics
from moejax.training.rundir import RunDir, latest_run, new_run_path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Adam:
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Sgd:
    rate: float = 1e-1


@dataclass(frozen=True)
class Train:
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: Adam | Sgd = field(default_factory=Adam)
    schedule: Literal["cosine", "wsd"] = "cosine"
    steps: int = 10
    limit: int | float = 3
    data: tuple[str, ...] = ()
    tokenizer: Path | None = None
    resume: bool = True


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ── configuration ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "config",
    [
        Train(),
        Train(
            model=ModelConfig(
                num_layers=2,
                top_k_by_layer=(1, 2),
                moe=MoEConfig(exchange=ExchangeConfig(bucket_slack=math.inf, bucket_rows=7)),
            ),
            optimizer=Sgd(0.5),
            schedule="wsd",
            limit=2.0,
            data=("a", "b"),
            tokenizer=Path("x/y.json"),
            resume=False,
        ),
    ],
)
def test_config_round_trip(config):
    data = json.loads(json.dumps(config_to_json(config), allow_nan=False))
    back = config_from_json(Train, data)
    assert back == config
    assert type(back.limit) is type(config.limit)
    assert type(back.tokenizer) is type(config.tokenizer)


def test_config_names_every_wrong_key():
    data = config_to_json(Train())
    data["stepz"] = 3
    del data["schedule"]
    del data["model"]["attention"]["head_dim"]
    data["model"]["moe"]["router"]["tokk"] = 1
    with pytest.raises(UserError) as error:
        config_from_json(Train, data, "config.json")
    for name in (
        "config.json",
        "unknown key stepz",
        "missing key schedule",
        "missing key model.attention.head_dim",
        "unknown key model.moe.router.tokk",
    ):
        assert name in one_line(error)


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", "10"),
        ("steps", 1.5),
        ("steps", True),
        ("schedule", "linear"),
        ("resume", 1),
        ("data", [1]),
        ("data", "ab"),
        ("tokenizer", 3),
        ("limit", "many"),
        ("optimizer", {"type": "Adagrad", "rate": 1.0}),
        ("optimizer", 3),
        ("model", [1]),
    ],
)
def test_config_names_wrong_values(name, value):
    with pytest.raises(UserError) as error:
        config_from_json(Train, config_to_json(Train()) | {name: value})
    assert name in one_line(error) and ("must" in one_line(error) or "no" in one_line(error))


def test_config_refused_by_the_class_itself():
    data = config_to_json(Train())
    data["model"]["moe"]["router"]["top_k"] = 99
    with pytest.raises(UserError, match="top_k=99"):
        config_from_json(Train, data)


def test_config_differences():
    a = {"x": 1, "y": {"z": [1, 2], "w": None}, "t": True}
    b = {"x": 1, "y": {"z": [1, 3], "v": 4}, "t": 1}
    assert config_differences(a, b) == [("y.z", [1, 2], [1, 3]), ("y.v", None, 4), ("t", True, 1)]
    assert config_differences(a, a) == []


def test_config_of_a_foreign_type_is_a_mistake_in_the_program():
    @dataclass(frozen=True)
    class Odd:
        x: object = dataclasses.field(default_factory=dict)

    with pytest.raises(TypeError, match="cannot hold dict"):
        config_to_json(Odd())


# ── the directory ────────────────────────────────────────────────────────────


def test_model_is_bound_and_the_rest_may_change(tmp_path):
    with RunDir.create_or_open(tmp_path / "a" / "run") as run:
        assert run.bind_config(Train(steps=3)) is False
        assert run.read_config(Train) == Train(steps=3)
    with RunDir.create_or_open(run.path) as run:
        assert run.bind_config(Train(steps=5)) is True
        assert run.read_config(Train).steps == 5
        before = run.config_path.read_bytes()
        other = Train(model=ModelConfig(d_model=64, moe=MoEConfig(RouterConfig(num_experts=16))))
        with pytest.raises(UserError) as error:
            run.bind_config(other)
        text = one_line(error)
        assert "model.d_model is 128 there and 64 here" in text
        assert "model.moe.router.num_experts is 8 there and 16 here" in text
        assert "head_dim" not in text
        assert run.config_path.read_bytes() == before


def test_config_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        RunDir(tmp_path).read_config(Train)
    for text in ("{", "[1]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json") as error:
            RunDir(tmp_path).read_config(Train)
        one_line(error)


def test_second_writer_is_refused_while_the_first_lives(tmp_path):
    with RunDir.create_or_open(tmp_path) as run:
        with pytest.raises(UserError) as error:
            RunDir.create_or_open(tmp_path)
        assert f"process {os.getpid()} on " in one_line(error)
        # Readers and the further processes of a multi-host run take no lock and write nothing.
        RunDir(tmp_path).metrics()
        follower = RunDir.create_or_open(tmp_path, primary=False)
        follower.append_metrics({"step": 1})
        follower.append_sample("text")
        follower.cut_metrics(0)
        follower.bind_config(Train())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["lock"]
        assert run.writable
    RunDir.create_or_open(tmp_path).close()


HOLD = """
import sys, time
from moejax.training.rundir import RunDir
run = RunDir.create_or_open(sys.argv[1])
assert "jax" not in sys.modules
print("held", flush=True)
time.sleep(60)
"""


def test_lock_is_released_by_death(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on "):
            RunDir.create_or_open(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    RunDir.create_or_open(tmp_path).close()


def test_run_on_a_file_or_below_one(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="a directory is needed") as error:
            RunDir.create_or_open(path)
        one_line(error)


def test_latest_and_new_runs(tmp_path):
    assert latest_run(tmp_path / "runs") is None
    paths = []
    for i in range(3):
        path = new_run_path(tmp_path / "runs", "a b/c")
        assert path.parent == tmp_path / "runs" and "a-b-c" in path.name and not path.exists()
        with RunDir.create_or_open(path) as run:
            run.bind_config(Train())
            os.utime(run.config_path, (1000 - i, 1000 - i))
        paths.append(path)
    assert len(set(paths)) == 3
    (tmp_path / "runs" / "no-run").mkdir()
    assert latest_run(tmp_path / "runs") == paths[0]
    with RunDir.create_or_open(paths[2]) as run:
        run.bind_config(Train())
    assert latest_run(tmp_path / "runs") == paths[2]


# ── metrics ──────────────────────────────────────────────────────────────────


def test_metrics_keep_numbers(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    row = {
        "step": np.int64(3),
        "loss": np.float32(0.1),
        "load": np.arange(4, dtype=np.int32).reshape(2, 2),
        "exact": 0.1 + 0.2,
        "bad": math.nan,
        "nested": {"worse": [math.inf, 1.0], "none": None},
    }
    log.append(row)
    # Another reader sees it before the log is closed.
    (back,) = read_metrics(tmp_path / "metrics.jsonl")
    log.close()
    assert back == {
        "step": 3,
        "loss": float(np.float32(0.1)),
        "load": [[0, 1], [2, 3]],
        "exact": 0.1 + 0.2,
        "bad": None,
        "nested": {"worse": [None, 1.0], "none": None},
    }
    with pytest.raises(ValueError, match="int 'step'"):
        log.append({"step": 1.0})


def test_resume_leaves_one_line_a_step(tmp_path):
    with RunDir.create_or_open(tmp_path) as run:
        for step in range(10):
            run.append_metrics({"step": step, "life": 1})
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"step":10,"li')  # killed here
    assert [row["step"] for row in run.metrics()] == list(range(10))
    with RunDir.create_or_open(tmp_path) as run:
        run.cut_metrics(6)
        for step in range(6, 12):
            run.append_metrics({"step": step, "life": 2})
        rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["life"] for row in rows] == [1] * 6 + [2] * 6
    assert not list(tmp_path.glob(".*tmp"))


def test_evaluations_later_than_the_resume_point_are_cut(tmp_path):
    def evaluated(run, *steps, life):
        for step in steps:
            run.append_evaluation({"step": step, "heldout_bits_per_byte": 1 / step, "life": life})

    with RunDir.create_or_open(tmp_path) as run:
        assert run.evaluations() == []
        run.cut_metrics(1)
        assert not run.evaluations_path.exists()
        evaluated(run, 2, 4, 6, life=1)
        evaluated(run, 6, life=2)  # once more at the same step
        assert [(r["step"], r["life"]) for r in run.evaluations()] == [(2, 1), (4, 1), (6, 2)]
        assert run.evaluations()[0]["heldout_bits_per_byte"] == 0.5
    with RunDir.create_or_open(tmp_path) as run:
        run.cut_metrics(5)
        assert [r["step"] for r in run.evaluations()] == [2, 4]
        follower = RunDir.create_or_open(tmp_path, primary=False)
        follower.cut_metrics(0)
        evaluated(follower, 8, life=3)
        assert [r["step"] for r in RunDir(tmp_path).evaluations()] == [2, 4]


def test_summary_and_tokenizer(tmp_path):
    bpe = train_bpe([Document("a", "the cat and the hat and the bat " * 40)], 270)
    follower = RunDir.create_or_open(tmp_path, primary=False)
    follower.write_summary({"steps": 1})
    follower.save_tokenizer(bpe)
    assert not list(tmp_path.iterdir()) and follower.load_tokenizer() is None
    with RunDir.create_or_open(tmp_path) as run:
        for steps in (1, 2):
            run.write_summary({"steps": steps, "bits_per_byte": 2.5, "text": {"files": 3}})
        for tokenizer in (Tokenizer(), bpe, bpe):  # a second time over the first
            run.save_tokenizer(tokenizer)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "steps": 2,
        "bits_per_byte": 2.5,
        "text": {"files": 3},
    }
    back = RunDir(tmp_path).load_tokenizer()
    assert back is not None and back.fingerprint == bpe.fingerprint
    assert list(back.encode("the hat")) == list(bpe.encode("the hat"))


@pytest.mark.parametrize("tail", [b"", b'{"step":2', b'{"step":2}', b"\x00\x00"])
def test_half_line_without_cut(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\n{"step":1}\n' + tail)
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    log = MetricsLog(path)
    log.append({"step": 2})
    assert path.read_bytes() == b'{"step":0}\n{"step":1}\n{"step":2}\n'
    log.cut(0)
    assert path.read_bytes() == b""
    log.close()


def test_unreadable_lines_are_skipped_and_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\n\x00\xff{\n[1]\n{"loss":1}\n{"step":1}\n')
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    log = MetricsLog(path)
    assert log.cut(1) == 4
    log.close()
    assert path.read_bytes() == b'{"step":0}\n'


# ── disks that refuse ────────────────────────────────────────────────────────


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_while_logging(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "samples.txt").symlink_to("/dev/full")
    with RunDir.create_or_open(tmp_path) as run:
        with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full") as error:
            run.append_metrics({"step": 0})
        one_line(error)
        with pytest.raises(UserError, match=r"samples\.txt: the disk is full"):
            run.append_sample("x")


@pytest.mark.parametrize(
    "code, words",
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EROFS, "permission")],
)
def test_refused_writes_keep_the_old_file(tmp_path, monkeypatch, code, words):
    with RunDir.create_or_open(tmp_path) as run:
        run.bind_config(Train(steps=1))
        run.append_metrics({"step": 0})
        run.append_metrics({"step": 1})
        before = run.config_path.read_bytes(), run.metrics_path.read_bytes()

        def refuse(fd):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files.os, "fsync", refuse)
        with pytest.raises(UserError, match=words) as error:
            run.bind_config(Train(steps=2))
        assert "config.json" in one_line(error)
        with pytest.raises(UserError, match=words):
            run.cut_metrics(1)
        monkeypatch.undo()
        assert before == (run.config_path.read_bytes(), run.metrics_path.read_bytes())
        run.append_metrics({"step": 2})  # the log is open again
        assert len(run.metrics()) == 3
        assert not list(tmp_path.glob(".*tmp"))


def test_read_only_directory(tmp_path, monkeypatch):
    folder = tmp_path / "readonly"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):  # root writes everywhere
        real = os.open

        def refuse(path, *args, **kwargs):
            if str(path).startswith(str(folder)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="permission is lacking") as error:
        RunDir.create_or_open(folder)
    assert str(folder) in one_line(error)


def test_disk_full_is_seen_through_wrapping():
    def chained(inner: BaseException) -> BaseException:
        try:
            try:
                raise inner
            except BaseException as error:
                raise RuntimeError("saving failed") from error
        except RuntimeError as error:
            return error

    assert files.is_disk_full(chained(OSError(errno.ENOSPC, "x")))
    assert files.is_disk_full(chained(ValueError("write [OS error 28: ENOSPC No space left]")))
    assert not files.is_disk_full(chained(OSError(errno.EIO, "x")))
    assert not files.is_disk_full(ValueError("x"))
