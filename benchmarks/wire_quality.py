"""What rounding on the wire costs: the packaged model's held-out bits per byte, by wire format.

    JAX_PLATFORMS=cpu python benchmarks/wire_quality.py
    JAX_PLATFORMS=cpu python benchmarks/wire_quality.py --windows 8 --name try

Writes benchmarks/results/wire_quality.json. The model runs over a mesh of 4 devices along `expert`
in float32, so that rounding is all that differs; dispatch and combine have the same format in every
layer. `change` is relative to the exact wire over the same windows, spread evenly over the held-out
files; `fewer_bytes` compares activations with bfloat16's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import Any

from common import write_results

from moejax.cli import run_main

DEVICES = 4


def wires() -> list[Any]:
    from moejax.config import EXACT_WIRE, WireConfig

    def both(form: Any, rotate: bool) -> WireConfig:
        return WireConfig(dispatch=form, combine=form, rotate=rotate)

    forms = ("int8", "float8", "int4")
    return [EXACT_WIRE, *(both(form, rotate) for rotate in (False, True) for form in forms)]


def with_wire(config: Any, wire: Any) -> Any:
    """The model with another wire in its layers."""
    exchange = dataclasses.replace(config.moe.exchange, mode="all_to_all", wire=wire)
    moe = dataclasses.replace(config.moe, exchange=exchange)
    return dataclasses.replace(config, moe=moe, compute_dtype="float32")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8, help="windows at once")
    parser.add_argument("--name", default="wire_quality")
    args = parser.parse_args()
    if args.rows % DEVICES or args.windows % args.rows:
        parser.error(f"--rows must be a multiple of {DEVICES} and divide --windows")
    return args


def main() -> None:
    args = parse()
    import jax

    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_num_cpu_devices", DEVICES)
    import numpy as np
    from jax import numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from moejax.data.corpus import split_held_out
    from moejax.data.pipeline import held_out_windows
    from moejax.data.sources import load_standard_library
    from moejax.exchange.codec import encoded_bytes
    from moejax.inference.source import open_model
    from moejax.training.state import Blueprint, load_weights
    from moejax.training.step import make_eval_step
    from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh

    source = open_model(None)
    _, documents = split_held_out(load_standard_library().documents, 0.05)
    length = source.config.max_context
    windows = held_out_windows(documents, source.tokenizer, length, length // 2)
    chosen = np.linspace(0, len(windows.tokens) - 1, args.windows).round().astype(int)
    share = windows.mask[chosen].sum() / windows.mask.sum()
    mesh = make_mesh(MeshShape(expert=DEVICES))
    rows: list[dict[str, Any]] = []
    for wire in wires():
        start = time.perf_counter()
        config = with_wire(source.config, wire)
        blueprint = Blueprint(config, mesh)
        params, biases = load_weights(source.weights(blueprint), blueprint, jnp.float32)
        step = make_eval_step(blueprint, loss_chunk=16_384)
        sharding, nll = NamedSharding(mesh, P(TOKEN_AXES, None)), 0.0
        for first in range(0, args.windows, args.rows):
            part = chosen[first : first + args.rows]
            arrays = (windows.tokens[part], windows.mask[part])
            nll += float(step(params, biases, *(jax.device_put(a, sharding) for a in arrays)))
        bits = float(windows.bits_per_byte(nll) / share)
        plain = encoded_bytes(config.d_model, jnp.bfloat16, "compute")
        size = encoded_bytes(config.d_model, jnp.bfloat16, wire.dispatch)
        exact = wire.dispatch == "compute"
        rows.append(
            {
                "wire": wire.dispatch,
                "rotate": wire.rotate,
                "bits_per_byte": bits,
                "change": None if exact else bits / rows[0]["bits_per_byte"] - 1,
                "fewer_bytes": None if exact else plain / size,
                "windows": args.windows,
                "window": length,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        print(rows[-1], flush=True)
        write_results(args.name, rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
