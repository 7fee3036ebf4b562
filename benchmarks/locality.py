"""Routing that knows where experts are: traffic against held-out loss, on the packaged model.

    JAX_PLATFORMS=cpu python benchmarks/locality.py
    JAX_PLATFORMS=cpu python benchmarks/locality.py --tiny --name try

Writes benchmarks/results/locality.json; `python docs/draw_locality.py` draws it. The model runs in
float32 over 8 devices along `expert`, a window on each, windows dealt in turn; the layer counts
what is sent, and where it is served. Held out are 5 % of the standard library, at most `--windows`
windows of `--window` tokens of a document; experts are placed by other documents, and copies fill
two further slots of each device. `loss_increase` and its standard error over documents compare with
contiguous placement and routing that knows nothing of places: of the weights as they are, and of
the same further training without such routing (`loss_increase_tuned`), since `--steps` steps on
the rest of the library lower the loss by themselves. Rows of such weights are `finetuned`;
`trained_penalty` and `trained_max_devices` say how that training routed.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import write_results
from locality_tuning import tuned

from moejax.cli import run_main

DEVICES = 8
TUNED_PENALTY = 0.3
SEQ_LEN = 256  # tokens of a window of training
NAME = "locality"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; None: those of this process."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `command` looks for --keep
    )
    parser.add_argument("--windows", type=int, default=2, help="of a held-out document, at most")
    parser.add_argument("--window", type=int, default=512, help="tokens of one")
    parser.add_argument("--steps", type=int, default=60, help="of further training")
    parser.add_argument("--tune", type=int, nargs="*", default=[3, 2], help="at most M devices")
    parser.add_argument("--keep", type=Path, help="a folder for trained weights, taken from there")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: few windows, one step")
    parser.add_argument("--name", default=NAME, help="of the results")
    args = parser.parse_args(words)
    if args.tiny:
        if args.name == NAME:
            parser.error(f"--tiny would write over the results of {NAME}: give another --name")
        args.windows, args.window, args.steps, args.tune = 1, 64, 1, [2]
    return args


def command(words: Sequence[str]) -> str:
    """The command that a results file names: all arguments but --keep, which saves only time."""
    left, skip = [], False
    for word in words:
        if not (skip or word == "--keep" or word.startswith("--keep=")):
            left.append(word)
        skip = word == "--keep"
    return shlex.join(["python", "benchmarks/locality.py", *left])


def untrained() -> list[tuple[Any, tuple[str, ...]]]:
    """What is measured with the weights as they are: routing, and the placements for it."""
    from moejax.config import LocalityConfig

    def known(**settings: Any) -> Any:
        return LocalityConfig(**settings)

    every, one = ("contiguous", "planned", "copies"), ("copies",)
    found = [(known(), every)]
    found += [(known(max_devices=3), every), (known(max_devices=2), every)]
    found += [
        (known(max_devices=m, device_penalty=p), one)
        for m, p in ((3, 0.3), (2, 0.3), (3, 0.5), (2, 0.15))
    ]
    found += [(known(device_penalty=p), every) for p in (0.3, 0.6)]
    found += [(known(max_devices=m), one) for m in (4, 1)]
    found += [(known(local_threshold=t), one) for t in (0.01, 0.02)]
    found += [(known(device_penalty=0.6, weights="scaled"), one)]
    return found


class Bench:
    """The sweep, and the models trained further."""

    def __init__(self, args: argparse.Namespace) -> None:
        from moejax.data.pipeline import TokenDataset, tokenize
        from moejax.placement.sweep_config import SweepConfig
        from moejax.placement.sweep_texts import open_texts, prepare

        config = SweepConfig(devices=DEVICES, window=args.window, windows=args.windows)
        if args.tiny:
            config = dataclasses.replace(config, plan_tokens=2048)
        source, judged, planned = open_texts(config)
        if args.tiny:
            judged = judged[:DEVICES]
        self.args = args
        self.sweep, self.flat = prepare(config, source, judged, planned, print)
        self.texts = TokenDataset(tokenize(planned, source.need_tokenizer()), SEQ_LEN, seed=0)
        self.rows: list[dict[str, Any]] = []
        self.command = command(sys.argv[1:])

    def add(self, rows: Any) -> None:
        """Keeps, prints and writes rows."""
        for row in rows:
            row.pop("seconds", None)
            self.rows.append(row)
            print(row, flush=True)
            write_results(self.args.name, self.rows, self.command)

    def tune(self) -> None:
        """Trains without and with penalties, the latter with copies, and measures."""
        from moejax.config import LocalityConfig
        from moejax.placement.judge import relative_increase

        off = LocalityConfig()
        control = self.trained(off, None)
        base = self.sweep.judge(control, off, "contiguous")

        def rows(flat: dict[str, Any], locality: Any, name: str, told: Any) -> Any:
            judged = self.sweep.judge(flat, locality, name)
            increase, error = relative_increase(judged.nll_D, base.nll_D)
            yield {
                **self.sweep.row(judged, locality, name),
                "training": "finetuned",
                "trained_penalty": told.device_penalty,
                "trained_max_devices": told.max_devices,
                "loss_increase_tuned": round(increase, 5),
                "loss_increase_tuned_error": round(error, 5),
                "steps": self.args.steps,
                "trained_tokens": self.args.steps * DEVICES * SEQ_LEN,
            }

        self.add(rows(control, off, "contiguous", off))
        for limit in self.args.tune:
            locality = LocalityConfig(device_penalty=TUNED_PENALTY, max_devices=limit)
            flat = self.trained(locality, "copies")
            self.add(rows(flat, locality, "copies", locality))
            self.add(rows(control, locality, "copies", off))

    def trained(self, locality: Any, name: str | None) -> dict[str, Any]:
        """Weights trained further, under a way of routing and a placement."""
        model = self.sweep.with_locality(locality)
        placement = None if name is None else self.sweep.arrays(name)
        return tuned(
            self.flat,
            model,
            self.sweep.mesh,
            self.texts,
            placement,
            steps=self.args.steps,
            keep=self.args.keep,
        )


def main() -> None:
    args = parse()
    import jax

    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_num_cpu_devices", DEVICES)
    bench = Bench(args)
    for locality, names in untrained()[: 2 if args.tiny else None]:
        bench.add(bench.sweep.rows(bench.flat, [locality], names, training="none"))
    if args.steps:
        bench.tune()


if __name__ == "__main__":
    sys.exit(run_main(main))
