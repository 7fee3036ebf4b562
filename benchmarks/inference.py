"""Generation on one GPU: prompts and decoding steps, beside what they must at least take.

    python benchmarks/inference.py
    python benchmarks/inference.py --models olmoe_1b_7b --batches 16 --add
    JAX_PLATFORMS=cpu python benchmarks/inference.py --tiny    # a rehearsal

Writes benchmarks/results/inference_h100.json, a row for each model, format of expert weights, batch
and phase, after every row. Weights are random; so are prompts and drawn tokens (temperature 1).

- The engine of `infer.py serve` runs it all: scheduling, paged cache and sampling included.
  `prefill`: `batch` prompts of --prompt tokens come at once; ms until all have their first token.
  `decode`: they go on together; the time of a step, read back to the host: the mean of a run's,
  since the host reads some steps early and others late, and the median of the runs.
- `roofline_fraction` of decode is `roofline_ms` / ms: the bytes that a step must read (the experts
  it touches, all other weights, the texts' keys and values) at 3.05 TB/s. `experts_touched` of a
  layer are those that the last tokens of the prompts choose.
- `roofline_fraction` of prefill: the FLOPs of active weights and causal attention at 712 TFLOP/s.
- `transformers` is the peer (`inference_torch.py`): bfloat16, `grouped_mm` experts, in a process of
  its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write_results

NAME = "inference_h100"
KEY = ("impl", "model", "weights", "batch", "phase")
MODELS = {"olmoe_1b_7b": ("bf16",), "qwen3_30b_a3b": ("bf16",), "mixtral_8x7b": ("int8", "fp8")}
_TOUCHING = 256  # tokens of a text whose last one is asked which experts it uses
PEERS = ("olmoe_1b_7b", "qwen3_30b_a3b")
_TOO_LARGE = "46.7 billion parameters in bfloat16 are 93 GB, more than the card has"


def make_experts_touched(
    blueprint: Any, params: Any, biases: Any, texts_BS: np.ndarray
) -> Callable[[int], float]:
    """Distinct experts of a layer, mean over layers, that the last tokens of some texts choose.

    Returns:
        a function of the number of texts, the first of those; the model runs once for any number.
    """
    from moejax.placement.record import trace_of

    trace = trace_of(blueprint, params, biases, list(texts_BS))
    last_LBK = np.moveaxis(trace.experts_NLK[np.cumsum(trace.lens) - 1], 1, 0)

    def touched(texts: int) -> float:
        chosen = (layer_BK[:texts] for layer_BK in last_LBK)
        return float(np.mean([np.unique(ids_BK[ids_BK >= 0]).size for ids_BK in chosen]))

    return touched


def measure(name: str, weights: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model with one format of its experts."""
    from inference_models import (
        decode_seconds,
        model_of,
        prefill_seconds,
        random_prompts,
        random_source,
    )

    from moejax.inference.engine import Engine, EngineSettings
    from moejax.serving.start import load_model
    from sharding.mesh import MeshShape

    config = model_of(name, tiny=args.tiny)
    start = time.perf_counter()
    loaded = load_model(
        random_source(config), MeshShape(), "auto", "none" if weights == "bf16" else weights
    )
    _say(f"{name} {weights}: weights after {time.perf_counter() - start:.0f} s")
    longest = args.prompt + args.steps + 1
    texts = np.stack(random_prompts(config, max(args.batches), args.prompt))[:, -_TOUCHING:]
    experts_touched = make_experts_touched(*loaded, texts)
    for batch in args.batches:
        settings = EngineSettings(
            max_rows=batch,
            page_len=args.page_len,
            prefill_chunk=args.chunk,
            max_len=longest,
            prefix_reuse=False,
        )
        engine = Engine(*loaded, settings=settings)
        engine.expect(batch, longest)
        prompts = random_prompts(config, batch, args.prompt)
        start = time.perf_counter()
        compile_steps(engine, batch, args)
        generate(engine, prompts, 2)
        _say(f"{name} {weights} {batch}: compiled in {time.perf_counter() - start:.0f} s")
        prefills, steps = zip(*(generate(engine, prompts, args.steps) for _ in range(args.repeats)))
        del engine
        gc.collect()
        touched = experts_touched(batch)
        context = args.prompt + args.steps // 2
        head = {"impl": "moejax", "model": name, "weights": weights, "batch": batch}
        yield head | row(
            "prefill", prefills, prefill_seconds(config, batch, args.prompt), batch * args.prompt
        )
        least = decode_seconds(config, batch, context, touched, weights)
        found = row("decode", [np.mean(times) for times in steps], least, batch)
        more = {"ms_slowest_tenth": round(1e3 * float(np.quantile(np.concatenate(steps), 0.9)), 3)}
        more |= {"context": context, "experts_touched": round(touched, 1)}
        yield head | found | more


def compile_steps(engine: Any, batch: int, args: argparse.Namespace) -> None:
    """The steps of this load alone, side by side; `Engine.warm_up` would compile all there are."""
    from moejax.inference.drawing import Level

    shapes, pages = engine._shapes, -(-(args.prompt + args.steps + 1) // args.page_len)
    size = min(n for n in shapes.pieces if n >= min(args.prompt, args.chunk))
    wanted = [shapes.decode(batch, pages), shapes.prefill(batch, size, pages, begins=True)]
    engine._programs.compile_all(wanted, levels=[Level.DRAWN])


def row(phase: str, seconds: Any, least: float, tokens: int) -> dict[str, Any]:
    """The figures of one phase, from the times of its runs."""
    median = float(np.median(seconds))
    low, high = np.quantile(seconds, [0.1, 0.9])
    return {
        "phase": phase,
        "tokens_per_s": round(tokens / median, 1),
        "ms_per_step": round(1e3 * median, 3),
        "ms_spread": round(float(high - low) / median, 3),
        "roofline_ms": round(1e3 * least, 3),
        "roofline_fraction": round(least / median, 3),
    }


def generate(engine: Any, prompts: list[np.ndarray], steps: int) -> tuple[float, np.ndarray]:
    """Seconds until all prompts have their first token, and of each decoding step after that."""
    from moejax.inference.params import SamplingParams

    params = SamplingParams(max_tokens=steps + 1, ignore_eos=True, temperature=1.0, seed=1)
    start = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt, params)
    waiting, times = set(range(len(prompts))), []
    first = None
    seen: dict[int, int] = {}
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            seen[event.id] = seen.get(event.id, 0) + len(event.tokens)
        if first is None and len(seen) == len(waiting):
            first = now
        elif first is not None:
            times.append(now)
    assert first is not None
    stamps = np.array([first, *times])
    # Left out: the first steps, which started beside a prompt, and the last, in which texts end.
    return first - start, np.diff(stamps)[2:-2]


def peers(
    args: argparse.Namespace, ours: Callable[[str, int, str], float | None]
) -> Iterator[dict[str, Any]]:
    """Rows of `inference_torch.py`, each with the bound of our row, if there is one.

    Args:
        args: of the command.
        ours: model, batch and phase → `roofline_ms` of our row in bf16.
    """
    if "mixtral_8x7b" in args.models:
        head = {"impl": "transformers", "model": "mixtral_8x7b", "weights": "bf16"}
        for batch in args.batches:
            for phase in ("prefill", "decode"):
                yield head | {"batch": batch, "phase": phase, "error": _TOO_LARGE}
    if not any(m in PEERS for m in args.models):
        return
    words = [
        "--models",
        *(m for m in args.models if m in PEERS),
        "--batches",
        *map(str, args.batches),
    ]
    words += ["--prompt", str(args.prompt), "--steps", str(args.steps), *(["--tiny"] * args.tiny)]
    script = Path(__file__).with_name("inference_torch.py")
    command = [sys.executable, str(script), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                least = ours(found["model"], found["batch"], found["phase"])
                if least is not None:
                    found["roofline_ms"] = least
                    found["roofline_fraction"] = round(least / found["ms_per_step"], 3)
                yield found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--weights", nargs="+", help="default: what fits one H100")
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--steps", type=int, default=64, help="decoding steps of a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of prompts in a step")
    parser.add_argument("--page-len", type=int, default=64)
    parser.add_argument("--impls", nargs="+", default=["moejax", "transformers"])
    parser.add_argument("--name", help=f"result file; default {NAME}, nothing for --tiny")
    parser.add_argument("--add", action="store_true", help="keep the file's other rows")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to rehearse anywhere")
    args = parser.parse_args()
    if args.tiny:
        args.prompt, args.steps, args.batches, args.chunk = 32, 8, [2], 64
    name = args.name or ("" if args.tiny else NAME)
    old: list[dict[str, Any]] = []
    if args.add and name:
        found = json.loads((RESULTS / f"{name}.json").read_text())
        old = [{"commit": found["commit"], **r} for r in found["rows"]]
    rows: list[dict[str, Any]] = []

    def keep(made: Iterator[dict[str, Any]]) -> None:
        for one in made:
            rows.append(one)
            print(json.dumps(one), flush=True)
            keys = [tuple(r[k] for k in KEY) for r in rows]
            if name:
                write_results(name, [r for r in old if tuple(r[k] for k in KEY) not in keys] + rows)

    if "moejax" in args.impls:
        for model in args.models:
            for weights in args.weights or MODELS[model]:
                keep(measure(model, weights, args))
                gc.collect()
    if "transformers" in args.impls:

        def ours(model: str, batch: int, phase: str) -> float | None:
            key = ("moejax", model, "bf16", batch, phase)
            same = [r for r in [*rows, *old] if tuple(r[k] for k in KEY) == key]
            return same[0]["roofline_ms"] if same else None

        keep(peers(args, ours))


if __name__ == "__main__":
    main()
