"""Flags, one-line errors and exit codes, and stopping by signals."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from moejax.cli import parse, run_main
from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.training.interrupt import Interrupt

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Shape:
    """One flag: it reads its own text."""

    x: int = 1
    y: int = 1

    @staticmethod
    def parse(text: str) -> Shape:
        try:
            x, y = map(int, text.split("x"))
        except ValueError:
            raise UserError(f"shape {text!r}: write 2x3") from None
        return Shape(x, y)

    def __str__(self) -> str:
        return f"{self.x}x{self.y}"


@dataclass(frozen=True)
class Train:
    """Trains a model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: Shape = field(default_factory=Shape)
    schedule: Literal["cosine", "wsd"] = "cosine"
    steps: int = 10
    rate: float = 1e-3
    data: tuple[str, ...] = ()
    run_dir: str | None = None
    dry_run: bool = False
    resume: bool = True


def read(*argv: str) -> Train:
    return parse(Train(), list(argv), prog="train.py")


def test_flags_reach_every_level():
    assert read() == Train()
    config = read(
        *("--model.num-layers", "6", "--model.moe.router.top-k=4", "--mesh", "2x4"),
        *("--schedule", "wsd", "--rate", "1e-4", "--data", "a", "b"),
        *("--run-dir", "r", "--dry-run", "--no-resume", "--model.attention.num_kv_heads", "4"),
        *("--model.moe.exchange.bucket-rows", "64", "--model.moe.exchange.bucket-slack", "inf"),
    )
    assert (config.model.num_layers, config.model.moe.router.top_k) == (6, 4)
    assert config.mesh == Shape(2, 4)
    assert (config.schedule, config.rate, config.data) == ("wsd", 1e-4, ("a", "b"))
    assert (config.run_dir, config.dry_run, config.resume) == ("r", True, False)
    assert config.model.attention.num_kv_heads == 4
    assert config.model.moe.exchange.bucket_rows == 64
    assert config.model.moe.exchange.bucket_slack == float("inf")
    assert read("--run-dir", "None").run_dir is None


def test_defaults_come_from_the_instance():
    default = Train(model=ModelConfig(num_layers=9), steps=77, mesh=Shape(5, 6))
    assert parse(default, ["--model.d-model", "64"], prog="p") == Train(
        model=ModelConfig(num_layers=9, d_model=64), steps=77, mesh=Shape(5, 6)
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--stepz", "3"], ["--stepz", "no such flag", "--steps"]),
        (["--num-layers", "3"], ["--num-layers", "--model.num-layers"]),
        (["--model.num-layer=3"], ["--model.num-layer:", "--model.num-layers"]),
        (["--model.num_layerz", "3"], ["--model.num_layerz", "--model.num-layers"]),
        (["--no-resum"], ["--no-resum", "--no-resume"]),
        (["--zzzzzz"], ["--zzzzzz", "no such flag"]),
        (["stray"], ["'stray'", "no flag"]),
        (["--dry-run", "yes"], ["'yes'"]),
        (["--steps", "x"], ["--steps", "'x'", "INT"]),
        (["--steps=1.5"], ["--steps", "'1.5'", "INT"]),
        (["--steps"], ["--steps"]),
        (["--rate", "fast"], ["--rate", "'fast'", "FLOAT"]),
        (["--schedule", "linear"], ["--schedule", "'linear'", "cosine", "wsd"]),
        (["--model.remat", "all"], ["--model.remat", "'all'", "dots"]),
        (["--model.top-k-by-layer", "1", "x"], ["--model.top-k-by-layer", "x"]),
    ],
)
def test_bad_flags_are_told_in_one_line(argv, words):
    with pytest.raises(UserError) as error:
        read(*argv)
    text = str(error.value)
    for word in [*words, "see train.py --help"]:
        assert word in text, text
    assert not set(text) & set("\n╭╮╰╯│─\x1b"), text
    assert "  " not in text


def test_values_that_the_configuration_refuses():
    with pytest.raises(UserError, match=r"top_k=0"):
        read("--model.moe.router.top-k", "0")
    with pytest.raises(UserError, match="shape '2': write 2x3"):
        read("--mesh", "2")


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--model.moe.router.top-k" in out and "Trains a model." in out
    assert "--mesh SHAPE" in out and "--mesh.x" not in out


def _raise(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    "main, code, err",
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (_raise(UserError("a\nb  c")), 2, "error: a b c\n"),
        (_raise(KeyboardInterrupt()), 130, "interrupted\n"),
        (
            _raise(OSError(errno.ENOSPC, "No space left on device", "x")),
            2,
            "error: the disk is full ([Errno 28] No space left on device: 'x'): "
            "free some space and start again\n",
        ),
    ],
)
def test_run_main(main, code, err, capsys):
    assert run_main(main) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", err)


def test_run_main_lets_mistakes_of_the_program_through():
    with pytest.raises(ZeroDivisionError):
        run_main(_raise(ZeroDivisionError()))
    with pytest.raises(SystemExit):
        run_main(_raise(SystemExit(4)))


SCRIPT = """
import sys
from moejax.cli import parse, run_main
from moejax.config import ModelConfig

def main():
    config = parse(ModelConfig(), prog="train.py")
    for _ in range(config.num_layers):
        print(config.d_model, flush=True)

code = run_main(main)
assert "jax" not in sys.modules
sys.exit(code)
"""


def script(*argv: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *argv]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_as_a_program():
    good = script("--num-layers", "2", "--d-model", "64")
    assert (good.returncode, good.stdout, good.stderr) == (0, "64\n64\n", "")
    for argv in (["--num-layerz", "2"], ["--num-layers", "two"], ["--num-layers", "0"]):
        bad = script(*argv)
        assert bad.returncode == 2 and bad.stdout == ""
        assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
        assert "Traceback" not in bad.stderr
    helped = script("--help")
    assert helped.returncode == 0 and "--num-layers" in helped.stdout and helped.stderr == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_message_does_not_depend_on_the_encoding(encoding):
    bad = script("--num-layers", "two", encoding=encoding)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: --num-layers: invalid literal for int() with base 10:")
    assert bad.stderr.endswith("write --num-layers INT; see train.py --help\n")


def test_reader_of_the_output_goes_away():
    command = [sys.executable, "-c", SCRIPT, "--num-layers", "100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


# ── signals ──────────────────────────────────────────────────────────────────


def test_signals_ask_and_a_second_ctrl_c_insists(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it more than once
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert capfd.readouterr().err == "\nSIGTERM: finishing this step, then saving\n"

    with Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert "Ctrl-C again" in capfd.readouterr().err


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Interrupt():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_handlers_outside_the_main_thread():
    seen = []

    def work():
        with Interrupt() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
