"""What a lossy wire costs: the packaged model's held-out bits per byte, by format and columns.

    JAX_PLATFORMS=cpu python benchmarks/wire_quality.py
    JAX_PLATFORMS=cpu python benchmarks/wire_quality.py --windows 8 --name try

Writes benchmarks/results/wire_quality.json. The model runs over a mesh of 4 devices along `expert`
in float32, so that the wire is all that differs; it has the same wire in every layer. `change` is
relative to the exact wire over the same windows, spread evenly over the held-out files;
`fewer_bytes` compares activations of both ways together with bfloat16's. Rows of fewer columns, and
those alone, have `columns` [dispatch, combine]: principal components over `calibration` windows of
the training texts, once as they are and once with int8. The last rows are models trained for
`trained` further steps on those texts, `trained_tokens` in all: with the exact wire, and with half
the columns both ways, where the projections learn, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from typing import Any

from common import beginning, write_results

from moejax.cli import run_main

DEVICES = 4
PARTS = (0.75, 0.5, 0.25)
BATCH = 2  # windows of a training step


def rounded_wires() -> list[Any]:
    """Dispatch and combine rounded alike."""
    from moejax.config import WireConfig

    def both(form: Any, rotate: bool) -> WireConfig:
        return WireConfig(dispatch=form, combine=form, rotate=rotate)

    forms = ("int8", "float8", "int4")
    return [both(form, rotate) for rotate in (False, True) for form in forms]


def narrow_wires(d_model: int) -> list[Any]:
    """Fewer columns one way, the other way, and both, as they are and rounded."""
    from moejax.config import WireConfig

    wires = []
    for form, part in itertools.product(("compute", "int8"), PARTS):
        columns = int(part * d_model)
        for ways in ((columns, None), (None, columns), (columns, columns)):
            wires.append(WireConfig(form, form, dispatch_dim=ways[0], combine_dim=ways[1]))  # type: ignore[arg-type]
    return wires


def with_wire(config: Any, wire: Any) -> Any:
    """The model with another wire in its layers."""
    exchange = dataclasses.replace(config.moe.exchange, mode="all_to_all", wire=wire)
    moe = dataclasses.replace(config.moe, exchange=exchange)
    return dataclasses.replace(config, moe=moe, compute_dtype="float32")


def fewer_bytes(d_model: int, wire: Any) -> float:
    """How many times fewer bytes activations take, both ways together, than bfloat16 ones."""
    from moejax.exchange.codec import encoded_bytes

    widths = zip(wire.widths(d_model), (wire.dispatch, wire.combine), strict=True)
    sent = sum(encoded_bytes(width, "bfloat16", form) for width, form in widths)
    return 2 * encoded_bytes(d_model, "bfloat16", "compute") / sent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--rows", type=int, default=8, help="windows at once")
    parser.add_argument("--calibration", type=int, default=64, help="windows of training text")
    parser.add_argument("--steps", type=int, default=100, help="of further training")
    parser.add_argument("--name", default="wire_quality")
    args = parser.parse_args()
    if args.rows % DEVICES or args.windows % args.rows or args.calibration % args.rows:
        parser.error(
            f"--rows must be a multiple of {DEVICES} and divide --windows and --calibration"
        )
    return args


class Bench:
    """The packaged model, the texts it is judged by and those it learns from."""

    def __init__(self, args: argparse.Namespace) -> None:
        from moejax.config import EXACT_WIRE
        from moejax.data.corpus import split_held_out
        from moejax.data.pipeline import TokenDataset, held_out_windows, tokenize
        from moejax.data.sources import load_standard_library
        from moejax.inference.source import open_model
        from moejax.training.state import Blueprint
        from sharding.mesh import MeshShape, make_mesh

        self.args = args
        source = open_model(None)
        self.config, self.length = source.config, source.config.max_context
        texts, held_out = split_held_out(load_standard_library().documents, 0.05)
        self.texts = TokenDataset(tokenize(texts, source.tokenizer), self.length, seed=0)
        self.windows = held_out_windows(held_out, source.tokenizer, self.length, self.length // 2)
        self.mesh = make_mesh(MeshShape(expert=DEVICES))
        blueprint = Blueprint(with_wire(self.config, EXACT_WIRE), self.mesh)
        self.flat = source.weights(blueprint)
        self.rows: list[dict[str, Any]] = []

    def loaded(self, wire: Any, flat: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Blueprint, parameters and biases."""
        from jax import numpy as jnp

        from moejax.training.state import Blueprint, load_weights

        blueprint = Blueprint(with_wire(self.config, wire), self.mesh)
        return blueprint, *load_weights(flat, blueprint, jnp.float32)

    def measure(self, wire: Any, flat: dict[str, Any], **more: Any) -> None:
        """Adds a row; `more` goes into it."""
        from moejax.training.evaluate import Evaluator

        start = time.perf_counter()
        blueprint, params, biases = self.loaded(wire, flat)
        evaluator = Evaluator(blueprint, self.windows, batch_size=self.args.rows, loss_chunk=16_384)
        bits = float(evaluator.bits_per_byte(params, biases, self.args.windows))
        d_model, times = self.config.d_model, fewer_bytes(self.config.d_model, wire)
        if wire.dispatch_dim or wire.combine_dim:
            more = {"columns": list(wire.widths(d_model)), **more}
        self.rows.append(
            {
                "wire": wire.dispatch,
                "rotate": wire.rotate,
                "bits_per_byte": bits,
                "change": bits / self.rows[0]["bits_per_byte"] - 1 if self.rows else None,
                "fewer_bytes": None if times == 1 else times,
                "windows": self.args.windows,
                "window": self.length,
                "seconds": round(time.perf_counter() - start, 1),
                **more,
            }
        )
        print(self.rows[-1], flush=True)
        write_results(self.args.name, self.rows)

    def moments(self) -> Any:
        """Of the rows that calibration texts bring."""
        from moejax.config import EXACT_WIRE
        from moejax.inference.row_projections import measure_rows

        batches = (
            self.texts.batch(step, self.args.rows)[:, :-1]
            for step in range(self.args.calibration // self.args.rows)
        )
        return measure_rows(*self.loaded(EXACT_WIRE, self.flat), batches)

    def trained(self, wire: Any, flat: dict[str, Any]) -> dict[str, Any]:
        """The weights after some steps on one device, with projections if the wire has any."""
        import jax
        import numpy as np
        from jax import numpy as jnp

        from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig
        from moejax.training.state import Blueprint, to_logical
        from moejax.training.step import make_train_step
        from sharding.mesh import MeshShape, make_mesh

        steps = self.args.steps
        config = TrainConfig(
            model=with_wire(self.config, wire),
            data=DataConfig(seq_len=self.length, batch_size=BATCH),
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0),
            steps=steps,
            loss_chunk=4096,
        )
        blueprint = Blueprint(config.model, make_mesh(MeshShape()))
        state = beginning(flat, blueprint)
        step = make_train_step(blueprint, config)
        for number in range(steps):
            tokens = self.texts.batch(number, BATCH)[None]
            state, metrics = jax.block_until_ready(step(state, jnp.asarray(tokens), None))
            if number % 20 == 0:
                print(number, float(metrics["loss"]), flush=True)
        return {
            name: np.asarray(value)
            for name, value in to_logical(state).items()
            if name.startswith(("params/", "bias/"))
        }


def main() -> None:
    args = parse()
    import jax

    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_num_cpu_devices", DEVICES)
    from moejax.config import EXACT_WIRE, WireConfig
    from moejax.inference.row_projections import add_projections

    bench = Bench(args)
    for wire in [EXACT_WIRE, *rounded_wires()]:
        bench.measure(wire, bench.flat)
    moments, d_model = bench.moments(), bench.config.d_model

    def projected(wire: Any) -> dict[str, Any]:
        return add_projections(bench.flat, with_wire(bench.config, wire), moments)

    more = {"calibration": args.calibration}
    for wire in narrow_wires(d_model):
        bench.measure(wire, projected(wire), **more)
    more = {"trained": args.steps, "trained_tokens": args.steps * BATCH * bench.length}
    if args.steps:
        half = WireConfig(dispatch_dim=d_model // 2, combine_dim=d_model // 2)
        for wire in (EXACT_WIRE, half):
            bench.measure(wire, bench.trained(wire, projected(wire)), **more)


if __name__ == "__main__":
    sys.exit(run_main(main))
