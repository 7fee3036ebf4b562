"""What a run tells of its unusual steps, and their batches in `anomalies/` of the run directory."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.training.anomaly import NONE, NONFINITE, Verdict
from moejax.training.config import TrainConfig
from moejax.training.files import disk_errors, write_atomically
from moejax.training.rundir import RunDir
from moejax.training.text import Text
from sharding.distributed import say

__all__ = ["AnomalyLog", "Dump", "read_dump"]


class AnomalyLog:
    """Says what was unusual about steps, and keeps their batches.

    Attributes:
        stopped: why the run ends, None while it goes on; the same in all processes.
    """

    def __init__(self, run: RunDir, config: TrainConfig, text: Text):
        self._run, self._config, self._text = run, config, text
        self.stopped: str | None = None

    def note(self, step: int, metrics: dict[str, Any]) -> None:
        """Looks at a step whose line was printed.

        Args:
            step: its number, from 1.
            metrics: of the step, on the host.
        """
        verdict: Verdict | None = metrics["anomaly"]
        if verdict is None or self.stopped is not None or int(verdict.kind) == NONE:
            return
        config, halted = self._config.anomaly, bool(verdict.halted)
        what = self._what(verdict, float(metrics["loss"]), float(metrics["grad_norm"]))
        kept = self._keep(step, what, metrics)
        done = "stops" if halted else "goes on" if bool(verdict.apply) else "skipped"
        say(f"step {step}: {what}: {done}" + (f"; its batch is in {kept}" if kept else ""))
        if not halted:
            return
        if kept:
            run, file = (shlex.quote(str(path)) for path in (self._run.path, kept))
            say(f"to look into it: python train.py --run {run} --replay {file}")
        action = config.nonfinite if int(verdict.kind) == NONFINITE else config.spike
        flag = "nonfinite" if int(verdict.kind) == NONFINITE else "spike"
        if action == "skip":
            why = f"{config.most_in_a_row} steps before it were skipped one after the other"
            remedy = (
                "a lower --optimizer.learning-rate may help, or an earlier checkpoint: remove the "
                "folder of this one"
            )
        else:
            why = f"--anomaly.{flag} stop"
            remedy = f"--anomaly.{flag} skip leaves it out"
        run = shlex.quote(str(self._run.path))
        self.stopped = (
            f"step {step}: {what}: stopped before it ({why}); the checkpoint of step {step - 1} is "
            f"the state before it; to go on: python train.py --run {run}; {remedy}"
        )

    def _what(self, verdict: Verdict, loss: float, norm: float) -> str:
        if int(verdict.kind) == NONFINITE:
            return f"not finite: loss {loss:.6g}, norm of the gradient {norm:.6g}"
        found = []
        names = ("loss", "norm of the gradient")
        for name, value, mean, limit in zip(names, (loss, norm), verdict.mean_2, verdict.limit_2):
            if value > limit:
                found.append(f"{name} {value:.4g}, above {limit:.4g} (mean {mean:.4g})")
        return f"a spike: {', '.join(found)}"

    def _keep(self, step: int, what: str, metrics: dict[str, Any]) -> Path | None:
        """Writes the batch; where it lies, None where enough of them do and the run goes on."""
        folder = self._run.anomalies_path
        path = folder / f"step_{step:08d}.npz"
        there = {file.name for file in folder.glob("step_*.npz")} if self._run.writable else set()
        enough = len(there - {path.name}) >= self._config.anomaly.dumps
        if not self._run.writable or (enough and not bool(metrics["anomaly"].halted)):
            return None
        data, parts = self._config.data, self._config.accumulate
        tokens = self._text.dataset.batch(step - 1, data.batch_size)
        facts = {
            "step": step,
            "what": what,
            "loss": repr(float(metrics["loss"])),
            "grad_norm": repr(float(metrics["grad_norm"])),
            "learning_rate": float(metrics["learning_rate"]),
            "corpus_sha256": self._text.record["corpus_sha256"],
        }
        content = io.BytesIO()
        np.savez_compressed(
            content,
            tokens=tokens.reshape(parts, -1, data.seq_len + 1),
            facts=np.array(json.dumps(facts)),
        )
        with disk_errors(path):
            folder.mkdir(exist_ok=True)
            write_atomically(path, content.getvalue())
        return path


@dataclass(frozen=True)
class Dump:
    """A batch that was kept.

    step: its number, from 1.
    what: what was unusual.
    tokens: int32 [accumulate, examples, S + 1].
    loss, grad_norm: of the step, in float32; NaN and infinities as they were.
    """

    step: int
    what: str
    tokens: np.ndarray
    loss: float
    grad_norm: float


def read_dump(path: str | Path) -> Dump:
    """Reads a file of `anomalies/`.

    Raises:
        UserError: it is not there, or is no such file.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as content:
            tokens, facts = content["tokens"], json.loads(str(content["facts"]))
        if tokens.ndim != 3 or tokens.dtype != np.int32:
            raise ValueError(f"tokens are {tokens.dtype} {tokens.shape}")
        return Dump(
            int(facts["step"]),
            str(facts["what"]),
            tokens,
            float(facts["loss"]),
            float(facts["grad_norm"]),
        )
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: name a file of anomalies/") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no batch that a run has kept ({error})") from None
