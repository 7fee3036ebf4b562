"""What the tests of train.py share: a tiny model's flags, a little text, and runs in process."""

import contextlib
import io
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from moejax.training import session

ROOT = Path(__file__).parent.parent
TIMES = ("step_seconds", "tokens_per_second", "memory_bytes", "model_flops_utilisation")

TINY = [
    *("--model.d-model", "32", "--model.num-layers", "2", "--model.max-context", "32"),
    *("--model.attention.head-dim", "8", "--model.moe.experts.hidden", "16"),
    *("--data.seq-len", "32", "--data.batch-size", "8", "--optimizer.warmup-steps", "4"),
    *("--mesh", "data=2,expert=2", "--devices", "8", "--eval-every", "0", "--save-every", "2"),
]


def write_text(folder: Path) -> str:
    """A dozen files of numbered lines; one of them at least is held out."""
    folder.mkdir()
    words = np.random.default_rng(0).permutation(["def", "return", "x", "self", "(", ")", ":", "é"])
    for number in range(12):
        lines = [" ".join(np.roll(words, number * i)[:5]) for i in range(40)]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


@contextlib.contextmanager
def kept_programs(folder: Path):
    """Compiled programs are kept in a folder, since every run builds the same ones."""
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def run(*argv: str) -> tuple[int, str, str]:
    """train.py in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def refused(*argv: str) -> str:
    """The one line with which the script refuses."""
    code, _, err = run(*argv)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM while the step's metrics are written."""
    log = session.Session.log

    def log_and_signal(self, number, *rest):
        log(self, number, *rest)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(session.Session, "log", log_and_signal)


def rows(path: Path) -> list[dict]:
    """metrics.jsonl without what the clock and the memory say."""
    lines = (Path(path) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_rows_close(ones: list[dict], others: list[dict]) -> None:
    """Rows of two programs that compute the same.

    XLA fuses each as it sees fit, so that last bits differ: what has not been rounded alike drifts
    by some 1e-7 a step. Where two experts' scores are as close as that another one may be chosen;
    two such choices in a layer's step are allowed.
    """
    assert len(ones) == len(others)
    for one, other in zip(ones, others):
        assert one.keys() == other.keys()
        for name in ("step", "anomaly", "applied"):
            assert one.get(name) == other.get(name)
        paths = [jax.tree.flatten_with_path(row)[0] for row in (one, other)]
        for (path, a), (same, b) in zip(*paths, strict=True):
            assert path == same and type(a) is type(b)
            if isinstance(a, float):
                assert a == pytest.approx(b, rel=1e-5), (one["step"], path)
            elif isinstance(a, int):
                assert abs(a - b) <= 2, (one["step"], path)
            else:
                assert a == b, (one["step"], path)
