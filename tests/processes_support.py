"""What tests over several processes share: start them, wait with a limit, read what they say."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What gloo prints, in the middle of lines, and in pieces where threads print at once.
_PIECES = (
    r"\[Gloo\] Rank ",
    " is connected to ",
    r" peer ranks\. ",
    "Expected number of connected peer ranks is : ",
)
GLOO = re.compile(rf"\[Gloo\] Rank (?:[\d\n]*(?:{'|'.join(_PIECES)}))*(?:\d*\n)*")
LIMIT = 240.0  # seconds; a hang must not outlive its test


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class Ended:
    """What a process left; gloo's own lines are left out of its output."""

    code: int
    out: str
    err: str
    seconds: float


class Processes:
    """So many processes that join each other; each writes into files of a folder."""

    def __init__(self, folder: Path, what: str, argvs: Sequence[Sequence[str]]):
        folder.mkdir(parents=True, exist_ok=True)
        port, number = free_port(), len(argvs)
        self.folder = folder
        flags = os.environ.get("XLA_FLAGS", "")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.running = []
        for i, argv in enumerate(argvs):
            command = [sys.executable, str(ROOT / "tests" / "many_processes.py"), what]
            command += [str(word) for word in argv]
            command += ["--distributed", "--coordinator", f"127.0.0.1:{port}"]
            command += ["--processes", str(number), "--process", str(i), "--join-timeout", "60"]
            with open(folder / f"out{i}", "wb") as out, open(folder / f"err{i}", "wb") as err:
                self.running.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        cwd=ROOT,
                        env=environment | {"XLA_FLAGS": flags},
                    )
                )

    def wait_for_step(self, run: Path, step: int, limit: float = LIMIT) -> None:
        """Until the run's metrics have so many rows."""
        end = time.monotonic() + limit
        path = run / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < step:
            assert all(p.poll() is None for p in self.running), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def wait(self, limit: float = LIMIT) -> list[Ended]:
        """Until all have ended."""
        start, took = time.monotonic(), []
        for process in self.running:
            process.wait(timeout=max(0.1, start + limit - time.monotonic()))
            took.append(time.monotonic() - start)
        return [
            Ended(p.returncode, self.read(f"out{i}"), self.read(f"err{i}"), seconds)
            for i, (p, seconds) in enumerate(zip(self.running, took, strict=True))
        ]

    def read(self, name: str) -> str:
        return GLOO.sub("", (self.folder / name).read_text(errors="replace"))

    def said(self) -> str:
        """All of it, for the message of a test that fails."""
        names = sorted(path.name for path in self.folder.glob("[oe]*[0-9]"))
        return "\n".join(f"--- {name}\n{self.read(name)[-3000:]}" for name in names)


@contextlib.contextmanager
def processes(folder: Path, what: str, *argvs: Sequence[str]) -> Iterator[Processes]:
    """Processes that are gone afterwards, whatever happens."""
    group = Processes(folder, what, argvs)
    try:
        yield group
    except subprocess.TimeoutExpired:
        raise AssertionError(f"a process has not ended:\n{group.said()}") from None
    finally:
        for process in group.running:
            if process.poll() is None:
                process.kill()
            process.wait()


def together(folder: Path, what: str, number: int, argv: Sequence[str]) -> list[Ended]:
    """Runs processes with the same arguments; all have to end well."""
    with processes(folder, what, *[argv] * number) as group:
        ended = group.wait()
        assert [process.code for process in ended] == [0] * number, group.said()
    return ended
