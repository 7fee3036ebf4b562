"""The metrics of a run: numbers, resuming, half lines, and full disks."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from rundir_support import one_line

from moejax.errors import UserError
from moejax.training.metrics import MetricsLog, read_metrics
from moejax.training.rundir import RunDir


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
