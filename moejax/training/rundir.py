"""The directory of one training run: who may write in it, and what lies where.

config.json       the fully resolved configuration
metrics.jsonl     one line a step
evaluations.jsonl one line an evaluation
summary.json      the figures a finished run ended with
checkpoints/      see `moejax.training.checkpoint`
samples.txt  loss.png  expert_load.png
anomalies/        batches of steps that were not finite or a spike
placement.jsonl   one line for each look at the traffic, with `placement=auto`
placement.png  placement.npz  what that did, and the slots of the last one
placement_stats.npz  which experts are chosen together, with `placement_stats`
lock              held by the process that writes
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.training.config_json import (
    config_differences,
    config_from_json,
    config_to_json,
    with_new_fields,
)
from moejax.training.files import disk_errors, write_atomically
from moejax.training.metrics import MetricsLog, read_metrics
from sharding.distributed import collect, from_first, several

__all__ = ["RunDir", "latest_run", "new_run_path"]

_SEEN_SECONDS = 30.0  # in which a file that another host wrote is seen

Config = TypeVar("Config")


class RunDir:
    """A run directory, open for writing (`create_or_open`) or for reading (`RunDir(path)`).

    Attributes:
        path: the directory, absolute.
        writable: whether this process holds the lock.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Names an existing directory for reading; nothing is locked or changed."""
        self.path = Path(path).absolute()
        self.writable = False
        self._lock_fd = -1
        self._metrics: MetricsLog | None = None

    @classmethod
    def create_or_open(cls, path: str | os.PathLike[str], primary: bool = True) -> RunDir:
        """Makes the directory if need be and locks it until `close` or the end of the process.

        The lock is an advisory `flock`, which the system releases however the process dies.

        Args:
            path: the directory.
            primary: False on the further processes of a multi-host run, which share the
                directory: they take no lock and their writes do nothing.

        Raises:
            UserError: another run is writing there, or the directory cannot be made or written.
        """
        run = cls(path)
        with disk_errors(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            if primary:
                run._lock()
        return run

    def check_shared(self) -> None:
        """All processes call it: whether they see the directory that process 0 writes in.

        Raises:
            UserError: this one sees another directory of the same name.
        """
        if not several():
            return
        name = f".shared.{os.getpid()}.{time.time_ns()}"
        name = from_first("run directory's file", name)
        file = self.path / name
        if self.writable:
            with disk_errors(file):
                file.write_bytes(b"")
        from_first("run directory's file is there", None)
        end = time.monotonic() + _SEEN_SECONDS
        while not file.exists():
            if time.monotonic() > end:
                raise UserError(
                    f"{self.path}: on {socket.gethostname()} this is not the directory in which "
                    "process 0 writes: choose a run directory that all hosts share"
                )
            os.listdir(self.path)  # network file systems look anew then
            time.sleep(0.1)
        collect("run directory's file was seen", None)
        if self.writable:
            with contextlib.suppress(OSError):
                file.unlink()

    @property
    def config_path(self) -> Path:
        """`config.json`."""
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        """`metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        """`checkpoints/`; made by the first save."""
        return self.path / "checkpoints"

    @property
    def samples_path(self) -> Path:
        """`samples.txt`."""
        return self.path / "samples.txt"

    @property
    def anomalies_path(self) -> Path:
        """`anomalies/`: batches of unusual steps; made by the first."""
        return self.path / "anomalies"

    @property
    def loss_picture(self) -> Path:
        """`loss.png`."""
        return self.path / "loss.png"

    @property
    def expert_load_picture(self) -> Path:
        """`expert_load.png`."""
        return self.path / "expert_load.png"

    @property
    def placement_stats_path(self) -> Path:
        """`placement_stats.npz`."""
        return self.path / "placement_stats.npz"

    def bind_config(
        self, config: Any, must_match: Sequence[str] = ("model",), free: Sequence[str] = ()
    ) -> bool:
        """Writes `config.json`; a run that was here before must have had the same model.

        Args:
            config: the resolved configuration, a dataclass.
            must_match: its fields that a run cannot change; the others are replaced.
            free: dotted names inside of those that it can.

        Returns:
            Whether the run existed.

        Raises:
            UserError: such a field differs (each value is named), `config.json` is unreadable, or
                the disk is full.
        """
        exists = self.check_config(config, must_match, free)
        if self.writable:
            with disk_errors(self.config_path):
                text = json.dumps(config_to_json(config), indent=2) + "\n"
                write_atomically(self.config_path, text)
        return exists

    def check_config(
        self, config: Any, must_match: Sequence[str] = ("model",), free: Sequence[str] = ()
    ) -> bool:
        """What `bind_config` refuses, and returns, without writing."""
        new = config_to_json(config)
        if not self.config_path.exists():
            return False
        old = with_new_fields(self._read_json(), config)
        pairs = [(_entry(old, name), _entry(new, name), name) for name in must_match]
        found = [d for a, b, name in pairs for d in config_differences(a, b, name)]
        found = [difference for difference in found if difference[0] not in free]
        if found:
            told = ", ".join(f"{name} is {a!r} there and {b!r} here" for name, a, b in found)
            raise UserError(
                f"{self.path}: the run was started with another configuration: {told}; "
                "pass the same values or choose a new run directory"
            )
        return True

    def read_config(self, cls: type[Config]) -> Config:
        """The configuration the run was last started with.

        Raises:
            UserError: there is none, or it does not fit `cls` (each key is named).
        """
        return config_from_json(cls, self._read_json(), source=str(self.config_path))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`; see `MetricsLog.append`."""
        if self.writable:
            self._log().append(row)

    def cut_metrics(self, step: int) -> None:
        """Removes what was written of `step` and later, before a run resumes there."""
        if self.writable:
            self._log().cut(step)
            for path in (self.evaluations_path, self._placements_path):
                if path.exists():
                    with contextlib.closing(MetricsLog(path)) as log:
                        log.cut(step)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, oldest first."""
        return read_metrics(self.metrics_path)

    @property
    def evaluations_path(self) -> Path:
        """`evaluations.jsonl`: held-out bits per byte, one line an evaluation."""
        return self.path / "evaluations.jsonl"

    @property
    def placement_path(self) -> Path:
        """`placement.png`."""
        return self.path / "placement.png"

    @property
    def _placements_path(self) -> Path:
        return self.path / "placement.jsonl"

    def append_placement(self, row: dict[str, Any]) -> None:
        """Adds a line to `placement.jsonl`, in the place of one of the same step."""
        self._append(self._placements_path, row)

    def append_evaluation(self, row: dict[str, Any]) -> None:
        """Adds a line to `evaluations.jsonl`, in the place of one of the same step."""
        self._append(self.evaluations_path, row)

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self.writable:
            with contextlib.closing(MetricsLog(path)) as log:
                log.cut(row["step"])
                log.append(row)

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of `evaluations.jsonl`, oldest first."""
        return read_metrics(self.evaluations_path)

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Writes `tokenizer/`."""
        if self.writable:
            folder = self.path / "tokenizer"
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
            tokenizer.save(folder)

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer the run was started with; None before it has one."""
        folder = self.path / "tokenizer"
        # The description is written last: without it a kill came in between.
        return Tokenizer.load(folder) if (folder / "tokenizer_meta.json").exists() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replaces `summary.json`, the figures a finished run ended with."""
        if self.writable:
            path = self.path / "summary.json"
            with disk_errors(path):
                write_atomically(path, json.dumps(summary, indent=2) + "\n")

    def append_sample(self, text: str) -> None:
        """Adds text and a newline to `samples.txt`.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        if self.writable:
            with disk_errors(self.samples_path), open(self.samples_path, "ab") as file:
                file.write(text.encode("utf-8", errors="replace") + b"\n")

    def close(self) -> None:
        """Closes the metrics and releases the lock."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        self.writable = False

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _log(self) -> MetricsLog:
        if self._metrics is None:
            self._metrics = MetricsLog(self.metrics_path)
        return self._metrics

    def _read_json(self) -> dict[str, Any]:
        if not self.config_path.is_file():
            raise UserError(f"{self.path}: no config.json there: name the directory of a run")
        with disk_errors(self.config_path):
            text = self.config_path.read_bytes()
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UserError(
                f"{self.config_path}: not valid JSON ({error}): mend it or choose another run"
            ) from error
        if not isinstance(data, dict):
            raise UserError(f"{self.config_path}: must hold a JSON object: mend it")
        return data

    def _lock(self) -> None:
        # The file is never removed: unlinking a lock file lets two processes lock two inodes.
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(fd, 4096, 0))
            os.close(fd)
            raise UserError(
                f"{self.path}: {holder} is writing in this run directory: wait for it to end, "
                "stop it, or choose another directory"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        self._lock_fd = fd
        self.writable = True
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _entry(config: Any, name: str) -> Any:
    """The entry `data.seq_len` of nested dictionaries; None where there is none."""
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _holder(content: bytes) -> str:
    try:
        owner = json.loads(content)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def latest_run(root: str | os.PathLike[str] = "runs") -> Path | None:
    """The run directory under `root` that was started or resumed last, by its `config.json`.

    Returns:
        Its path; None if there is no run.
    """
    found = []
    for config in Path(root).glob("*/config.json"):
        try:
            found.append((config.stat().st_mtime_ns, config.parent))
        except OSError:
            continue  # removed meanwhile
    return max(found)[1] if found else None


def new_run_path(root: str | os.PathLike[str] = "runs", name: str = "run") -> Path:
    """A directory name under `root` that nothing has yet: the local time, then `name`.

    Args:
        root: where the runs are.
        name: what the run is; characters other than letters, digits, `._-` become `-`.
    """
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name) or 'run'}"
    path = Path(root) / stem
    number = 2
    while path.exists():
        path = Path(root) / f"{stem}-{number}"
        number += 1
    return path
