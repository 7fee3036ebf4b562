"""Is a run on a GPU repeatable, and does a stopped and continued one give the same losses?

Three runs of `train.py --deterministic` on one GPU in bfloat16: one to its end, the same again, and
one that gets SIGTERM half-way and is continued. Every loss and gradient norm must be equal in
every bit.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_results

ROOT = Path(__file__).parent.parent
STEPS = 200
FLAGS = (
    "--preset reference --vocab 0 --mesh data=1 --deterministic --data.seq-len 256 "
    "--data.batch-size 16 --eval-every 0 --eval-windows 8 --save-every 0 --keep 1"
)
COMPARED = ("loss", "grad_norm")


def start(run: Path, *more: str) -> subprocess.Popen:
    """One run of train.py in the background, its output in a file beside the run."""
    words = [sys.executable, str(ROOT / "train.py"), *more, "--run", str(run)]
    log = (run.parent / f"{run.name}.log").open("a")
    return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def rows(run: Path) -> list[dict]:
    """The steps that a run has written so far."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finish(process: subprocess.Popen, log: Path, wanted: int = 0) -> None:
    """Waits, and shows the log of a run that failed."""
    if process.wait(timeout=400) != wanted:
        raise SystemExit(f"exit {process.returncode}, not {wanted}:\n{log.read_text()[-3000:]}")


def main() -> None:
    """Runs, compares, writes `gpu_resume.json`."""
    with tempfile.TemporaryDirectory() as folder:
        whole, again, stopped = (Path(folder) / name for name in ("whole", "again", "stopped"))
        flags = [*FLAGS.split(), "--steps", str(STEPS)]
        running = {run: start(run, *flags) for run in (whole, again, stopped)}
        while len(rows(stopped)) < STEPS // 4 and running[stopped].poll() is None:
            time.sleep(0.01)
        running[stopped].send_signal(signal.SIGTERM)
        running[stopped].wait(timeout=400)
        reached = len(rows(stopped))
        for run in (whole, again):
            finish(running[run], run.parent / f"{run.name}.log")
        finish(start(stopped, "--resume"), stopped.parent / "stopped.log")
        print((Path(folder) / "stopped.log").read_text()[-2500:])

        wanted = [[row[name] for name in COMPARED] for row in rows(whole)]
        results = []
        for name, run in (("again", again), ("stopped and continued", stopped)):
            found = [[row[key] for key in COMPARED] for row in rows(run)]
            equal = sum(a == b for a, b in zip(wanted, found, strict=False))
            print(name, len(found), "steps,", equal, "equal")
            row = {"run": name, "steps": len(found), "steps_equal_in_every_bit": equal}
            results.append(row | ({"stopped_after": reached} if run is stopped else {}))
        losses = {"first_loss": wanted[0][0], "last_loss": wanted[-1][0]}
        write_results("gpu_resume", results, compared=list(COMPARED), flags=FLAGS, **losses)
        if any(row["steps_equal_in_every_bit"] != STEPS for row in results):
            raise SystemExit("not equal")


if __name__ == "__main__":
    main()
