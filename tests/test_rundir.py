"""The run directory: lock, names, and disks that refuse."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rundir_support import Train, one_line

from moejax.data.corpus import Document
from moejax.data.tokenizer import Tokenizer, train_bpe
from moejax.errors import UserError
from moejax.training import files
from moejax.training.rundir import RunDir, latest_run, new_run_path

ROOT = Path(__file__).parent.parent


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
