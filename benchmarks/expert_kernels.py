"""Where one MoE layer of the library spends its time on an H100, kernel by kernel.

    python benchmarks/expert_kernels.py
    python benchmarks/expert_kernels.py --shapes mixtral_b16 qwen3_b16 --add
    JAX_PLATFORMS=cpu python benchmarks/expert_kernels.py --tiny    # a rehearsal, times made up

Writes benchmarks/results/expert_kernels_h100.json, first with the predictions alone (`ms` null),
then again after each measurement.

- `predicted_ms` is the larger of useful FLOPs (no padding) over 720 TFLOP/s, what `jnp.dot` reaches
  in bf16 at 8192³, and of the bytes that must move over 3.0 TB/s; `bound` says which of the two,
  `gb` how many bytes. It is null for what need not be there at all.
- `ms` is the sum of a kernel's launches in one call of the layer, by CUPTI: the median over runs
  back to back, after half a second of calls without a pause, so that the clocks are those of
  sustained work. `tflops` is the useful FLOPs over it. Null: no launch had this name.
- The library's kernels keep their names. All others are XLA's, and are put together: products (the
  router's; for few tokens XLA makes none of it, and it counts as routing), the largest reduce of
  each direction (the sum over a token's experts), what takes as long as a gather of all rows, what
  else runs before the experts, and the rest.
- Layer, inputs and routing (uniform) are those of `expert_layer.py`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

from common import write_results
from expert_layer import earlier_rows
from layer_shapes import SHAPES, Inputs, Shape, find_shape, make_inputs
from layer_timing import PASSES, jobs

PEAK_FLOPS = 720e12  # bf16, measured: jnp.dot, 8192×8192×8192 on an H100
PEAK_BYTES = 3.0e12  # bytes/s
WARM_UP_SECONDS = 0.5
RUNS = 5

UP, DOWN, PLACES = "experts_up", "experts_down", "sorted_places"
PRODUCT, SUM = "router product", "sum over a token's experts"
GATHER, ROUTING, OTHER = "gather of rows", "rest of routing", "other"
GRADIENTS = ("rows_gradient", "w_in_gradient", "w_out_gradient")
# A name that contains another comes first.
PALLAS = ("experts_down_backward", UP, DOWN, *GRADIENTS, "top_k", PLACES)
NAMES = {"router_product": PRODUCT, "sum_places": SUM}  # kernels of classes of several
GEMMS = ("nvjet", "gemm", "dot", "cutlass")  # in the names of cuBLAS's and XLA's products

Launch = tuple[str, float]
"""Name of a kernel, ms."""


@dataclass(frozen=True)
class Cost:
    """What a kernel must do at least."""

    flops: float
    bytes: float

    @property
    def bound(self) -> str:
        """The unit that takes longer."""
        busy = self.flops / PEAK_FLOPS > self.bytes / PEAK_BYTES
        return "matrix units" if busy else "memory"

    @property
    def ms(self) -> float:
        """The prediction."""
        return max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES) * 1e3


def costs(shape: Shape, touched: int, backward: bool) -> dict[str, Cost]:
    """FLOPs and bytes of each kernel, in the order in which they run.

    Rows are bf16. Every assignment's row counts as read, though a token's rows may still be in the
    cache. Of the weights only the touched experts' are read; gradients of all are written.
    """
    tokens, d_model, hidden = shape.tokens, shape.d_model, shape.hidden
    places = tokens * shape.top_k
    flops = 2.0 * places * d_model * hidden  # of one projection
    wide, narrow = 2.0 * places * d_model, 2.0 * places * hidden  # bytes of rows
    matrix = 2.0 * d_model * hidden  # bytes of one projection of an expert
    read, written = touched * matrix, shape.experts * matrix
    # The router's product is three in bf16, and has two gradients of that size.
    router_passes = 3 if backward else 1
    router_flops = 2.0 * tokens * d_model * 3 * shape.experts
    found = {
        PRODUCT: Cost(router_passes * router_flops, router_passes * 2.0 * tokens * d_model),
        "top_k": Cost(0, 4.0 * tokens * (shape.experts + shape.top_k)),
        PLACES: Cost(0, 4.0 * 2 * places),
        # The backward wants both input projections kept.
        UP: Cost(2 * flops, wide + 2 * read + narrow * (3 if backward else 1)),
        DOWN: Cost(flops, narrow + read + wide),
        SUM: Cost(0, (wide + 2.0 * tokens * d_model) * (2 if backward else 1)),
    }
    if backward:
        found |= {
            "experts_down_backward": Cost(flops, wide + read + 2 * narrow + 2 * narrow + narrow),
            "rows_gradient": Cost(2 * flops, 2 * narrow + 2 * read + wide),
            "w_in_gradient": Cost(2 * flops, wide + 2 * narrow + 2 * written),
            "w_out_gradient": Cost(flops, narrow + wide + written),
        }
    return found


def by_kernel(launches: list[Launch], shape: Shape, backward: bool) -> dict[str, float]:
    """Ms of each kernel and class of kernels in one run, given in the order of the launches."""
    found: dict[str, float] = defaultdict(float)
    after: list[Launch] = []
    # Half the time of reading and writing every assignment's row.
    all_rows = shape.tokens * shape.top_k * shape.d_model * 2 / PEAK_BYTES * 1e3
    for name, ms in launches:
        kernel = next((kernel for kernel in PALLAS if kernel in name), None)
        kernel = kernel or next((NAMES[part] for part in NAMES if part in name), None)
        counting = ("top_k" in found or PLACES in found) and UP not in found
        if kernel is None and any(word in name for word in GEMMS) and not counting:
            kernel = PRODUCT
        long = not shape.decode and ms > all_rows
        if kernel is None and long and "reduce" not in name:
            kernel = GATHER
        if kernel is None and UP not in found:
            kernel = ROUTING
        if kernel is None:
            after.append((name, ms))
        else:
            found[kernel] += ms
    # For few tokens the sum is unrolled, and no reduce; then it is the longest of what remains.
    sums = [launch for launch in after if "reduce" in launch[0]] or (after if shape.decode else [])
    sums = [] if SUM in found else sums  # a kernel of ours was the sum
    for launch in sorted(sums, key=lambda launch: -launch[1])[: 2 if backward else 1]:
        found[SUM] += launch[1]
        after.remove(launch)
    for _, ms in after:
        found[OTHER] += ms
    return dict(found)


def profile(call: Callable, arguments: tuple, runs: int) -> list[list[Launch]]:
    """The launches of each of some runs back to back, by CUPTI, after a warm-up."""
    import jax
    from jax.experimental.mosaic.gpu import profiler

    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        last = [call(*arguments) for _ in range(RUNS)][-1]
        jax.block_until_ready(last)
        del last
    try:
        return profiler.measure(call, aggregate=False, iterations=runs)(*arguments)[1] or []
    except RuntimeError:  # kernels that overlap may change their order from run to run
        one = profiler.measure(call, aggregate=False)
        return [one(*arguments)[1] for _ in range(runs)]


def made_up(shape: Shape, touched: int, backward: bool) -> list[Launch]:
    """Launches for a rehearsal, a quarter slower than predicted."""
    names = {PRODUCT: "nvjet_made_up", SUM: "loop_reduce_fusion"}
    found = [("input_fusion", 1e-3)]
    for kernel, cost in costs(shape, touched, backward).items():
        times = 2 if kernel == SUM and backward else 1
        name = names.get(kernel, f"{kernel}_mosaic_gpu_kernel")
        found += [(name, 1.25 * cost.ms / times)] * times
    return [*found, ("loop_convert_fusion", 2e-3)]


def layer(shape: Shape, inputs: Inputs, backward: bool) -> tuple[Callable, tuple]:
    """The layer as a compiled function, and its arguments."""
    import jax
    from jax import numpy as jnp
    from layer_jax import expert_weights
    from layer_moejax import build, layer_config

    config = layer_config(shape.hidden, shape.experts, shape.top_k)
    call = jax.jit(build(shape.d_model, config, biased=False)[int(backward)])
    rows = [inputs.x_TD, inputs.ct_TD] if backward else [inputs.x_TD]
    rows = [jnp.asarray(array.astype(jnp.bfloat16)) for array in rows]
    return call, (expert_weights(shape, inputs), None, *rows)


def measure(
    shape: Shape, inputs: Inputs, backward: bool, args: argparse.Namespace
) -> dict[str, float]:
    """Median ms of each kernel and class."""
    import jax

    call, arguments = layer(shape, inputs, backward)
    jax.block_until_ready(call(*arguments))
    if args.tiny:
        runs = [made_up(shape, inputs.touched, backward)] * args.runs
    else:
        runs = profile(call, arguments, args.runs)
    if not runs or not all(runs):
        print("CUPTI saw no kernels: another profiler may hold it", flush=True)
        return {}
    total = sum(ms for _, ms in runs[0])
    for name, ms in runs[0]:
        if ms > 0.01 * total:
            print(f"    {ms:9.4f} ms {name}")
    tables = [by_kernel(launches, shape, backward) for launches in runs]
    return {kernel: median(t.get(kernel, 0.0) for t in tables) for kernel in set().union(*tables)}


def predicted_rows(name: str, which: str, shape: Shape, touched: int) -> list[dict[str, Any]]:
    """The rows of one shape and pass before anything is measured."""
    found = costs(shape, touched, which == "fwdbwd")
    head = {"shape": name, "pass": which}
    rows = [
        {
            **head,
            "kernel": kernel,
            "ms": None,
            "predicted_ms": round(cost.ms, 5),
            "bound": cost.bound,
            "tflops": None,
            "gb": float(f"{cost.bytes / 1e9:.4g}"),
        }
        for kernel, cost in found.items()
    ]
    nothing = {"ms": None, "predicted_ms": None, "bound": None, "tflops": None, "gb": None}
    return [*rows, *({**head, "kernel": kernel, **nothing} for kernel in (GATHER, ROUTING, OTHER))]


def fill(rows: list[dict[str, Any]], found: dict[str, float], flops: dict[str, Cost]) -> None:
    """Writes what was measured into the rows of a shape and pass."""
    for row in rows:
        ms = found.get(row["kernel"])
        if not ms:
            continue
        row["ms"] = round(ms, 5)
        cost = flops.get(row["kernel"])
        if cost is not None and cost.flops:
            row["tflops"] = round(cost.flops / ms / 1e9, 1)


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    ms, predicted = (
        " " * 9 if row[key] is None else f"{row[key]:9.4f}" for key in ("ms", "predicted_ms")
    )
    rate = "" if row["tflops"] is None else f"{row['tflops']:6.1f} TFLOP/s"
    head = "{shape:14} {pass:7} {kernel:27}".format(**row)
    print(f"{head} predicted {predicted} ms, measured {ms} ms {rate}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--runs", type=int, default=RUNS, help="profiled calls")
    parser.add_argument("--name", help="result file; default expert_kernels_h100, none for --tiny")
    parser.add_argument("--add", action="store_true", help="keep the file's other rows")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to rehearse anywhere")
    args = parser.parse_args()
    if args.runs < RUNS:
        parser.error(f"--runs {args.runs}: at least {RUNS} are needed for a median")
    if args.name is None and not args.tiny:
        args.name = "expert_kernels_h100"
    return args


def main() -> None:
    args = parse()
    import jax

    if jax.devices()[0].platform == "cpu" and not args.tiny:
        raise SystemExit("no accelerator here: --tiny rehearses on the CPU")
    shapes = {name: find_shape(name, args.tiny) for name in args.shapes}
    inputs = {name: make_inputs(shape, "uniform") for name, shape in shapes.items()}
    rows = {
        (name, which): predicted_rows(name, which, shapes[name], inputs[name].touched)
        for _, name, which in jobs(args.shapes, ["moejax"], args.passes)
    }

    kept = earlier_rows(args.name, jax.__version__) if args.add and args.name else []
    kept = [row for row in kept if (row["shape"], row["pass"]) not in rows]

    def write() -> None:
        if args.name is not None:
            write_results(args.name, [*kept, *chain.from_iterable(rows.values())])

    write()
    for (name, which), of_job in rows.items():
        shape, touched, backward = shapes[name], inputs[name].touched, which == "fwdbwd"
        found = measure(shape, inputs[name], backward, args)
        fill(of_job, found, costs(shape, touched, backward))
        # What need not be there and is not has no row.
        of_job[:] = [r for r in of_job if r["ms"] is not None or r["predicted_ms"] is not None]
        for row in of_job:
            show(row)
        write()
        jax.clear_caches()


if __name__ == "__main__":
    main()
