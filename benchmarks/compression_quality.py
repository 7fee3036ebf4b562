"""What compressed gradients cost a model in quality, on ranks simulated on one device.

    python benchmarks/compression_quality.py
    python benchmarks/compression_quality.py --methods exact int8 --add
    python benchmarks/compression_quality.py --tiny --name try

Writes benchmarks/results/compression_quality.json after every method. Each has the same optimizer,
chosen for exact gradients only, the same weights to begin with and the same data in the same order;
the seeds decide both, and are trained side by side. `final_loss` is the mean over all tokens of the
standard library's held-out files, in nats; a method's delta is relative to exact gradients with the
same seed. `exact_again` begins with weights that differ by a part in a million: what it loses or
gains is chance, and no method can be told from exact more closely.

`bytes_ratio` compares what a rank sends for the gradients that are compressed with their exact sum
in bfloat16; `bytes_ratio_all` counts, on both sides, those that stay float32, too. `curve` has the
loss on a part of the held-out windows, `training` the mean loss since the point before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import jax
import numpy as np
from common import RESULTS, write_results
from compression_methods import METHODS, RATE, TINY, Sizes, bytes_ratios, run_config
from jax import numpy as jnp
from simulated_ranks import RankState, SimulatedRanks, plain_backends

from moejax.training.config import TrainConfig
from moejax.training.text import prepare_text
from sharding.compression.config import GradCompression

NAME = "compression_quality"
NOISE = 1e-6  # of the weights that `exact_again` begins with
ROWS = 8  # held-out windows of a rank at once

Windows = tuple[jax.Array, jax.Array]
"""Tokens int32 [batches, R, ROWS, L + 1], and which of their targets count."""


class Texts:
    """The standard library's tokens: of all steps and seeds, and the held-out windows.

    Args:
        config: the run.
        sizes: of it.
        seeds: one order of the examples each.
    """

    def __init__(self, config: TrainConfig, sizes: Sizes, seeds: Sequence[int]) -> None:
        texts = [prepare_text(replace(config, seed=seed)) for seed in seeds]
        self._datasets = [text.dataset for text in texts]
        self._sizes, self._batch = sizes, config.data.batch_size
        self._windows, self.record = texts[0].windows, texts[0].record

    def steps(self, first: int, count: int) -> jax.Array:
        """Tokens int32 [count, S, R, B, L + 1]."""
        batches = [
            [dataset.batch(step, self._batch) for dataset in self._datasets]
            for step in range(first, first + count)
        ]
        sizes = self._sizes
        shape = (count, len(self._datasets), sizes.ranks, sizes.examples, sizes.length + 1)
        return jnp.asarray(np.array(batches, np.int32).reshape(shape))

    def held_out(self, limit: int | None) -> list[Windows]:
        """Held-out windows, spread evenly, in parts of `Sizes.on_the_way`."""
        count, sizes = len(self._windows.tokens), self._sizes
        chosen = np.arange(count)
        if limit is not None and limit < count:
            chosen = np.linspace(0, count - 1, limit).round().astype(int)
        fill = -len(chosen) % sizes.on_the_way
        parts = (len(chosen) + fill) // sizes.on_the_way

        def cut(x: np.ndarray) -> np.ndarray:
            x = np.pad(x[chosen], ((0, fill), (0, 0)))
            return x.reshape(parts, -1, sizes.ranks, ROWS, x.shape[1])

        tokens, mask = cut(self._windows.tokens), cut(self._windows.mask)
        return [(jnp.asarray(t), jnp.asarray(m)) for t, m in zip(tokens, mask, strict=True)]


class Bench:
    """The text, and the programs of all methods, which compile beside each other.

    Args:
        args: the flags.
        sizes: how much is trained.
    """

    def __init__(self, args: argparse.Namespace, sizes: Sizes) -> None:
        self._args, self._sizes = args, sizes
        config = run_config(sizes, args.steps, args.learning_rate)
        with clock("text"):
            text = Texts(config, sizes, args.seeds)
            firsts = range(0, args.steps, args.every)
            self._batches = [text.steps(first, args.every) for first in firsts]
            self._some, self._all = text.held_out(sizes.on_the_way), text.held_out(sizes.held_out)
        self.record = text.record
        self._pool = ThreadPoolExecutor(args.compile_at_once)
        self._ranks = {
            name: SimulatedRanks(replace(config, grad_compression=METHODS[name]), sizes.ranks)
            for name in args.methods
        }
        self._steps: dict[GradCompression, Future] = {}
        with clock("tracing"), plain_backends():
            self._evaluation = self._compile_evaluation()
            for name in args.methods:
                if METHODS[name] not in self._steps:
                    self._steps[METHODS[name]] = self._compile_steps(name)

    def _state(self, name: str) -> RankState:
        return self._ranks[name].begin(self._args.seeds, NOISE if name == "exact_again" else 0.0)

    def _compile_steps(self, name: str) -> Future:
        state = jax.eval_shape(lambda: self._state(name))
        lowered = self._ranks[name].make_steps().lower(state, self._batches[0], jnp.int32(0))
        return self._pool.submit(lowered.compile)

    def _compile_evaluation(self) -> Future:
        name = self._args.methods[0]  # masters are alike in all of them
        state = jax.eval_shape(lambda: self._state(name))
        program = self._ranks[name].make_evaluation()
        return self._pool.submit(program.lower(state.masters, state.biases, *self._some[0]).compile)

    def loss(self, state: RankState, windows: Sequence[Windows]) -> list[float]:
        """Mean loss of the windows' tokens, nats, of each seed."""
        evaluate = self._evaluation.result()
        nll = [np.asarray(evaluate(state.masters, state.biases, *part), float) for part in windows]
        counted = sum(int(jnp.sum(mask)) for _, mask in windows)
        return [float(total) for total in np.sum(nll, axis=0) / counted]

    def train(self, name: str) -> dict[str, Any]:
        """A row, of all seeds of a method, without what compares it with others."""
        with clock(f"{name}: compiling, as far as it was not done"):
            steps, _ = self._steps[METHODS[name]].result(), self._evaluation.result()
        state, start = self._state(name), time.perf_counter()
        curve, training = [], []
        for part, tokens in enumerate(self._batches):
            first = part * self._args.every
            state, losses = steps(state, tokens, jnp.int32(first))
            training.append(list(map(float, np.asarray(losses, float).mean(axis=0))))
            curve.append(self.loss(state, self._some))
            seconds = time.perf_counter() - start
            print(f"{name:>22} {first + len(tokens):5d} {seconds:6.1f} s {curve[-1]}", flush=True)
        exact = METHODS[name].method == "none"
        config = self._ranks[name].config
        return {
            "method": name,
            "settings": asdict(METHODS[name]),
            # Its sums are float32.
            **({"bytes_ratio": 0.5} if exact else bytes_ratios(config, self._sizes.ranks)),
            "final_loss": self.loss(state, self._all),
            "steps": [(part + 1) * self._args.every for part in range(len(curve))],
            "curve": curve,
            "training": training,
            "seconds": round(seconds, 1),
        }


@contextlib.contextmanager
def clock(what: str) -> Iterator[None]:
    """Prints how long something took."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their deltas in percent against the exact one, if there is one.

    Args:
        rows: with `final_loss`, a number for each seed.
    """
    exact = next((row for row in rows if row["method"] == "exact"), None)
    if exact is None:
        return list(rows)
    found = []
    for row in rows:
        delta_S = 100 * (np.array(row["final_loss"]) / np.array(exact["final_loss"]) - 1)
        error = np.std(delta_S, ddof=1) / math.sqrt(len(delta_S)) if len(delta_S) > 1 else None
        more = {
            "final_loss_delta_pct": round(float(delta_S.mean()), 4),
            "final_loss_delta_pct_by_seed": [round(float(delta), 4) for delta in delta_S],
            "standard_error": None if error is None else round(float(error), 4),
        }
        found.append(row | more)
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; a rehearsal must not go where results are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=100, help="steps between points of the curve")
    parser.add_argument("--learning-rate", type=float, default=RATE)
    parser.add_argument("--compile-at-once", type=int, default=4, help="methods, in threads")
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--add", action="store_true", help="keep other methods' rows of the file")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: a smaller model")
    args = parser.parse_args(arguments)
    if args.tiny and args.name == NAME:
        parser.error(f"--tiny rehearses: name another file than {NAME} with --name")
    if args.steps < 1 or args.every < 1 or args.steps % args.every:
        parser.error(f"--steps {args.steps} --every {args.every}: the one must divide the other")
    if args.compile_at_once < 1 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--compile-at-once must be at least 1, and --seeds must differ")
    args.methods = sorted(set(args.methods), key=list(METHODS).index)
    return args


def kept(args: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the file that stay: of other methods.

    Raises:
        SystemExit: they were made with other settings, and cannot be compared.
    """
    path = RESULTS / f"{args.name}.json"
    if not args.add or not path.is_file():
        return []
    content = json.loads(path.read_text())
    if content["settings"] != settings:
        raise SystemExit(f"--add: {path} was made with other settings; name another file")
    return [row for row in content["rows"] if row["method"] not in args.methods]


def main() -> None:
    args = parse()
    sizes = TINY if args.tiny else Sizes()
    given = {name: vars(args)[name] for name in ("seeds", "steps", "every", "learning_rate")}
    settings = asdict(sizes) | given
    rows = kept(args, settings)
    bench = Bench(args, sizes)
    for name in args.methods:
        rows.append(bench.train(name))
        rows.sort(key=lambda row: list(METHODS).index(row["method"]))
        rows = compared(rows)
        write_results(args.name, rows, settings=settings, text=bench.record)
        new = next(row for row in rows if row["method"] == name)
        print(name, new["final_loss"], new.get("final_loss_delta_pct_by_seed"), flush=True)


if __name__ == "__main__":
    main()
