"""Processes of training runs are killed at random moments; the rest must end, and runs continue.

    JAX_PLATFORMS=cpu python benchmarks/faults.py --kills 50

Writes benchmarks/results/faults.json. A run of `train.py --distributed` over two processes is
started again and again; each time one process, drawn at random, gets SIGKILL at a random moment
between its start and the time that a whole run takes, so that joining, compiling, steps,
checkpoints and the end are all hit. Every third run is continued by one process alone on half of
the devices now and then.

- a row with `kill`: which process died and when, `steps` written by then, `others_ended_s` until
  the last of the others was gone, their exit codes, and what they said (`message`); `was_over`
  where these had come to their end before.
- a row with `run`: one that came to its end: how many `attempts` it took, and how many of its
  `steps` have a loss and a gradient norm equal in every bit to those of a run that nobody killed;
  `largest_difference` of the losses, relative.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import write_results

ROOT = Path(__file__).parents[1]
LIMIT = 60.0  # seconds in which the others end
PATIENCE = 300.0  # for a whole run
COMPARED = ("loss", "grad_norm")
FLAGS = (
    "--model.d-model 32 --model.num-layers 2 --model.max-context 32 --model.attention.head-dim 8 "
    "--model.moe.experts.hidden 16 --data.seq-len 32 --data.batch-size 8 --eval-every 0 "
    "--eval-windows 8 --optimizer.warmup-steps 4 --save-every 5 --keep 3"
)
JOIN_SECONDS = 40


@dataclass
class Case:
    """What all attempts share.

    folder: for runs and what processes say.
    text: what is trained on.
    steps: of a run.
    rng: draws who is killed and when.
    """

    folder: Path
    text: Path
    steps: int
    rng: random.Random
    attempts: int = field(default=0)

    def start(self, run: Path, processes: int) -> list[subprocess.Popen]:
        """The processes of one attempt; two have a mesh of 4 devices, one has 2."""
        self.attempts += 1
        mesh = ["--mesh", f"data={processes},expert=2", "--devices", str(2 * processes)]
        words = [sys.executable, str(ROOT / "train.py"), "--run", str(run), "--steps"]
        words += [str(self.steps), *FLAGS.split(), "--data", str(self.text), *mesh]
        if processes > 1:
            words += ["--distributed", "--coordinator", f"127.0.0.1:{_free_port()}"]
            words += ["--join-timeout", str(JOIN_SECONDS)]
            words += ["--processes", str(processes), "--process"]
        started = []
        for number in range(processes):
            command = [*words, str(number)] if processes > 1 else words
            with self.said(number).open("wb") as out:
                started.append(
                    subprocess.Popen(
                        command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=_environment()
                    )
                )
        return started

    def said(self, number: int) -> Path:
        """Where a process of the latest attempt writes."""
        return self.folder / f"attempt{self.attempts}_{number}.log"


def write_text(folder: Path) -> Path:
    """A dozen files of lines that are alike and not the same."""
    folder.mkdir()
    words = ["def", "return", "x", "self", "(", ")", ":", "[", "]", "not", "in", "yield"]
    for number in range(12):
        lines = (words[i % 12 :] + words[: i % 12] for i in range(number, number + 60))
        (folder / f"{number}.txt").write_text("\n".join(" ".join(line[:6]) for line in lines))
    return folder


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "JOBSET"))}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def rows(run: Path) -> dict[int, list[float]]:
    """What is compared of each step that the run has written."""
    path = run / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line may be half written
            row = json.loads(line)
            found[row["step"]] = [row[name] for name in COMPARED]
    return found


def wait(started: Sequence[subprocess.Popen], seconds: float) -> bool:
    """Whether all end in time; those that do not are killed."""
    end = time.monotonic() + seconds
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.01, end - time.monotonic()))
    late = [process for process in started if process.poll() is None]
    for process in late:
        process.kill()
        process.wait()
    return not late


def whole(case: Case, processes: int) -> tuple[dict[int, list[float]], float]:
    """A run that nobody kills: its rows, and how long it takes."""
    run, begin = case.folder / f"whole{processes}", time.monotonic()
    started = case.start(run, processes)
    if not wait(started, PATIENCE) or any(process.returncode for process in started):
        raise SystemExit(f"a run that nobody killed failed:\n{case.said(0).read_text()[-3000:]}")
    return rows(run), time.monotonic() - begin


def kill_one(case: Case, run: Path, processes: int, longest: float) -> dict[str, Any] | None:
    """One attempt: its row, or None where it came to its end before."""
    started = case.start(run, processes)
    begin, moment = time.monotonic(), case.rng.uniform(0.0, longest)
    victim = case.rng.randrange(processes)
    while time.monotonic() - begin < moment and any(p.poll() is None for p in started):
        time.sleep(0.01)
    if started[victim].poll() is not None:
        if not wait(started, PATIENCE) or any(process.returncode for process in started):
            raise SystemExit(f"nobody was killed:\n{case.said(victim).read_text()[-3000:]}")
        return None
    started[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    started[victim].wait()
    others = [process for i, process in enumerate(started) if i != victim]
    in_time = wait(others, LIMIT)
    message = ""
    for number in range(processes):
        if number != victim:
            message = _last_line(case.said(number)).replace(socket.gethostname(), "HOST")
    codes = [process.returncode for process in others]
    return {
        "kill": case.attempts,
        "run": run.name,
        "processes": processes,
        "killed": victim,
        "moment_s": round(moment, 2),
        "steps": max(rows(run), default=0),
        "others_ended_s": round(time.monotonic() - killed, 2) if others else None,
        "others_in_time": in_time,
        "exit_codes": codes,
        "was_over": codes == [0] and max(rows(run), default=0) == case.steps,
        "message": message,
    }


def _last_line(path: Path) -> str:
    """The reason that a process gives; libraries may say more after it."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("error:")]
    return (reasons or lines or [""])[-1].strip()


def compare(wanted: dict[int, list[float]], found: dict[int, list[float]]) -> dict[str, Any]:
    """How near a run is to one that nobody killed."""
    steps = sorted(wanted)
    pairs = [(wanted[step], found.get(step, [float("nan")])) for step in steps]
    apart = [abs(a[0] - b[0]) / abs(a[0]) for a, b in pairs]
    return {
        "steps": len(found),
        "steps_equal_in_every_bit": sum(a == b for a, b in pairs),
        "largest_difference": max(apart),
    }


def measure(case: Case, kills: int, *, smaller: bool = True) -> list[dict[str, Any]]:
    """Kills so many times.

    Args:
        case: what attempts share.
        kills: how many.
        smaller: whether every third run is also continued on half of the devices.

    Returns:
        rows, see above.
    """
    wanted, longest = whole(case, 2)
    if sorted(wanted) != list(range(1, case.steps + 1)):
        raise SystemExit(f"a whole run wrote {len(wanted)} rows of {case.steps}")
    found: list[dict[str, Any]] = []
    number, deaths = 0, 0
    while deaths < kills:
        number += 1
        run, begun, meshes = case.folder / f"run{number}", case.attempts, {2}
        while True:
            alone = smaller and number % 3 == 0 and case.attempts > begun
            processes = case.rng.choice((1, 2)) if alone else 2
            if deaths < kills:
                row = kill_one(case, run, processes, longest)
            else:
                row = finish(case, run, processes)
            meshes.add(processes)
            if row is None:
                break
            deaths += 1
            found.append(row)
            print(row, flush=True)
        near = compare(wanted, rows(run))
        about = {"run": run.name, "attempts": case.attempts - begun, "smaller": 1 in meshes}
        found.append(about | near)
        print(found[-1], flush=True)
    return found


def finish(case: Case, run: Path, processes: int) -> None:
    """The last attempt, which nobody kills."""
    started = case.start(run, processes)
    if not wait(started, PATIENCE) or any(process.returncode for process in started):
        raise SystemExit(f"could not be finished:\n{case.said(0).read_text()[-3000:]}")


def wrong(found: Sequence[dict[str, Any]]) -> list[str]:
    """What must not be, in words."""
    told = []
    for row in found:
        if "kill" in row:
            name = f"process {row['killed']}"
            if not row["others_in_time"]:
                told.append(f"kill {row['kill']}: others went on for more than {LIMIT:g} s")
            if row["processes"] == 1 or row["was_over"]:
                continue
            if row["killed"] == 0 and row["exit_codes"] == [-signal.SIGABRT]:
                continue  # JAX's service, which is part of process 0, was the first to notice
            if not all(code > 0 for code in row["exit_codes"]):
                told.append(f"kill {row['kill']}: others ended with {row['exit_codes']}")
            if name not in row["message"]:
                told.append(f"kill {row['kill']}: {row['message']!r} does not name {name}")
        elif not row["largest_difference"] <= (1e-5 if row["smaller"] else 0):
            told.append(f"{row['run']}: losses differ by {row['largest_difference']:.3g}")
        elif not row["smaller"] and row["steps_equal_in_every_bit"] != row["steps"]:
            told.append(f"{row['run']}: {row['steps_equal_in_every_bit']} of {row['steps']} equal")
    return told


def main() -> None:
    """Kills, compares, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder) / "text")
        case = Case(Path(folder), text, args.steps, random.Random(args.seed))
        found = measure(case, args.kills)
    write_results("faults", found, flags=FLAGS, limit_s=LIMIT)
    for line in wrong(found):
        print(line)
    sys.exit(bool(wrong(found)))


if __name__ == "__main__":
    main()
