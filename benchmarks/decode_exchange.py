"""Decoding steps over several devices, with each exchange of the experts' rows.

    python benchmarks/decode_exchange.py
    JAX_PLATFORMS=cpu python benchmarks/decode_exchange.py --tiny    # a rehearsal on fake devices

Writes benchmarks/results/decode_exchange.json, a row for each batch and exchange, after every row.

- Shapes of Qwen3-30B-A3B with --layers layers, random weights in bfloat16, the experts over all
  devices; `batch` texts of all devices together, which begin with 16 random tokens.
- `ms_per_step`: median time of a decoding step of the engine of `infer.py serve`, read back to the
  host. With few layers that may be the time the host takes to prepare it.
- `ms_device`: the same step's program back to back, its rows prepared once; median of groups.
- `mode`: `config` is what the model's configuration gives, with buckets for the expected rows and
  further waves for others; the other modes have room for all rows in one wave.
- `picked`: what `--decode-exchange auto` takes for so many rows, and `ms_layer` what it measured of
  a layer of experts; null where it did not measure this.
- Which programs run what is fixed before anything is timed; nothing compiles in between.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from statistics import median
from typing import Any

import numpy as np
from common import expert_mesh, write_results

MODEL = "qwen3_30b_a3b"
MODES = ("config", "ring", "all_to_all", "remote")
PROMPT = 16  # tokens: a single shape of steps with prompts
PAGE_LEN = 64
_GROUPS = 7


class Captured:
    """The programs of an engine, and what the last step that decoded ran with."""

    def __init__(self, programs: Any):
        self.programs, self.last = programs, None
        start = programs._start

        def noted(rows_BF: Any, where_BW: Any, shape: Any, level: Any) -> Any:
            if not shape.tokens:
                self.last = rows_BF, where_BW, shape
            return start(rows_BF, where_BW, shape, level)

        programs._start = noted

    def device_ms(self, calls: int) -> float:
        """How long the model's program of that step takes, in groups of so many calls."""
        import jax

        from sharding.mesh import in_turn

        programs = self.programs
        assert self.last is not None
        rows_BF, where_BW, shape = self.last
        step = programs._program(programs._forward(shape))
        inputs = jax.device_put((rows_BF, where_BW), programs._rows)
        times = []
        for _ in range(_GROUPS + 1):
            start = time.perf_counter()
            for _ in range(calls):
                programs._layers, logits = step(
                    programs._weights, programs._layers, programs._history_RM, *inputs
                )
                logits = in_turn(programs._blueprint.mesh, logits)
            jax.block_until_ready(logits)
            times.append((time.perf_counter() - start) / calls)
        return 1e3 * median(times[1:])


def make_engine(args: argparse.Namespace) -> Any:
    """The engine with random weights; its mesh holds all devices along `expert`."""
    from inference_models import model_of, random_source

    from moejax.inference.engine import Engine, EngineSettings
    from moejax.serving.start import load_model
    from sharding.mesh import MeshShape

    devices = expert_mesh(args.devices, args.tiny).size
    config = dataclasses.replace(model_of(MODEL, tiny=args.tiny), num_layers=args.layers)
    loaded = load_model(random_source(config), MeshShape(expert=devices), "auto")
    longest = PROMPT + args.steps + 1
    settings = EngineSettings(
        max_rows=max(args.batches),
        page_len=PAGE_LEN,
        prefill_chunk=PROMPT * 64,
        max_len=longest,
        prefix_reuse=False,
    )
    engine = Engine(*loaded, settings=settings)
    engine.expect(1, longest)
    return engine, config, devices


def compile_steps(engine: Any, args: argparse.Namespace, devices: int) -> dict[str, str]:
    """The steps of all batches with all modes; why a mode cannot run."""
    from moejax.errors import UserError
    from moejax.inference.drawing import Level

    shapes, failed = engine._shapes, {}
    each = sorted({-(-batch // devices) for batch in args.batches})
    wanted = [shapes.decode(rows, shapes.pages) for rows in each]
    wanted += [shapes.prefill(rows, PROMPT, shapes.pages) for rows in {min(n, 2) for n in each}]
    for mode in args.modes:
        start = time.perf_counter()
        try:
            engine.pick_exchange(mode)
            engine._programs.compile_all(dict.fromkeys(wanted), levels=[Level.DRAWN])
        except (NotImplementedError, UserError) as why:
            failed[mode] = " ".join(str(why).split())[:300]
        say(f"{mode}: compiled in {time.perf_counter() - start:.0f} s")
    return failed


def measure(args: argparse.Namespace) -> None:
    """All rows."""
    from inference import generate
    from inference_models import random_prompts

    engine, config, devices = make_engine(args)
    start = time.perf_counter()
    picked = engine.pick_exchange("auto")
    say(f"{picked}; after {time.perf_counter() - start:.1f} s")
    failed = compile_steps(engine, args, devices)
    captured, found = Captured(engine._programs), []
    for batch in args.batches:
        rows = engine._shapes.decode(-(-batch // devices), 1).rows
        prompts = random_prompts(config, batch, PROMPT)
        for mode in args.modes:
            head = {"model": MODEL, "devices": devices, "batch": batch, "mode": mode}
            row: dict[str, Any] = {**head, "layers": args.layers, "rows_per_device": rows}
            if mode in failed:
                row |= {"ms_per_step": None, "picked": False, "error": failed[mode]}
            else:
                engine.pick_exchange(mode)
                generate(engine, prompts, 4)
                steps = [generate(engine, prompts, args.steps)[1] for _ in range(args.repeats)]
                layer = picked.seconds.get(rows, {}).get(mode)
                row |= {
                    "ms_per_step": round(1e3 * float(np.median(np.concatenate(steps))), 3),
                    "ms_device": round(captured.device_ms(args.calls), 3),
                    "ms_layer": None if layer is None else round(1e3 * layer, 4),
                    "picked": picked.exchanges[rows] == mode,
                }
            found.append(row)
            print(json.dumps(row), flush=True)
            if args.name:
                write_results(args.name, found)


def say(line: str) -> None:
    """A line for the person who waits."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--devices", type=int, help="default: all")
    parser.add_argument("--steps", type=int, default=40, help="decoding steps of a repeat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--calls", type=int, default=20, help="of a step's program in a group")
    parser.add_argument("--name", default=None, help="result file; nothing for --tiny")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to rehearse anywhere")
    args = parser.parse_args()
    if args.tiny:
        args.batches, args.layers, args.steps, args.repeats, args.calls = [4, 16], 2, 8, 1, 3
    args.name = args.name or ("" if args.tiny else "decode_exchange")
    measure(args)


if __name__ == "__main__":
    main()
