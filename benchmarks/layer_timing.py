"""Timing, and the rows that the expert-layer benchmark writes; no framework is imported."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from layer_shapes import LIMIT, SHAPES, Inputs, Shape, find_shape, make_inputs

EIGHT_BIT_WEIGHTS = ("moejax_int8", "moejax_e4m3")  # with bf16 rows: decode
EIGHT_BIT = (*EIGHT_BIT_WEIGHTS, "moejax_fp8")  # the last with float8 rows: prompts
JAX_IMPLS = ("moejax", *EIGHT_BIT, "ragged_dot", "jax_pallas_ragged_dot", "tokamax")
IMPL_NAMES = (*JAX_IMPLS, "torch_grouped_mm")
PASSES = ("fwd", "fwdbwd")
Job = tuple[str, str, str]
"""Implementation, shape, pass."""

GROUP_SECONDS = 0.04
LEAST_CALLS = 5
DECODE_LAYERS = 16  # of one program, one after another
LOOP_LAYERS = 64  # of one program, in a loop


@dataclass(frozen=True)
class Timing:
    """Median over groups, in ms a layer, and (largest − smallest) / median."""

    ms: float
    spread: float


def measure(
    call: Callable[[], Any], wait: Callable[[Any], None], groups: int, layers: int = 1
) -> Timing:
    """Times groups of back-to-back calls, long enough that issuing them is hidden.

    Args:
        call: issues the work, already compiled, and returns something to wait for.
        wait: waits for it, and so for all work issued before it.
        groups: at least 5 for a median worth the name.
        layers: that one call computes.
    """

    def group(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        wait(last)
        return time.perf_counter() - start

    group(2)
    estimate = group(3) / 3
    calls = max(1 if layers > 1 else LEAST_CALLS, round(GROUP_SECONDS / max(estimate, 1e-6)))
    group(calls)  # clocks and caches settle
    times = [group(calls) / calls / layers * 1e3 for _ in range(groups)]
    return Timing(median(times), (max(times) - min(times)) / median(times))


class Reporter:
    """Prints rows as JSON lines, which the parent process reads."""

    def __init__(self, impl: str, shape_name: str, shape: Shape, inputs: Inputs, routing: str):
        self.shape, self.inputs = shape, inputs
        self.head = {"impl": impl, "shape": shape_name}
        self.tail = {"routing": routing}

    def _emit(self, row: dict[str, Any]) -> None:
        print("ROW " + json.dumps(row), flush=True)

    def row(self, backward: bool, timing: Timing, **more: Any) -> None:
        """One measurement; 8 bits have half the bytes, and twice the FLOP/s."""
        flops = self.shape.flops(backward)
        floor = self.shape.floor_ms(backward, self.inputs.touched)
        floor = floor / 2 if self.head["impl"] in EIGHT_BIT else floor
        self._emit(
            {
                **self.head,
                "pass": "fwdbwd" if backward else "fwd",
                "ms": round(timing.ms, 5),
                "tflops": round(flops / timing.ms / 1e9, 2),
                "ms_spread": round(timing.spread, 4),
                "share_of_roofline": round(floor / timing.ms, 4),
                **self.tail,
                "roofline_ms": round(floor, 5),
                "experts_touched": self.inputs.touched,
                **more,
            }
        )

    def failed(self, backward: bool, why: BaseException | str) -> None:
        """One measurement that could not be made; one line of reason."""
        if isinstance(why, BaseException):
            text = " ".join(str(why).split()) or "no message"
            why = f"{type(why).__name__}: {text}"
        name = "fwdbwd" if backward else "fwd"
        self._emit({**self.head, "pass": name, **self.tail, "error": str(why)[:300]})


def check(error: float, what: str, limit: float = LIMIT) -> float:
    """Rounds an error for a row.

    Raises:
        ArithmeticError: it is above the limit, or no number.
    """
    if not error <= limit:
        raise ArithmeticError(f"{what}: norm-relative error {error:.3g}, limit {limit}")
    return float(f"{error:.3g}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what to measure; workers take the same."""
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--impls", nargs="+", choices=IMPL_NAMES, default=list(IMPL_NAMES))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--routing", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--repeats", type=int, default=5, help="timed groups of calls")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to rehearse anywhere")


def parse_worker() -> argparse.Namespace:
    """The flags of a worker process; `skip` becomes a set of jobs."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    parser.add_argument("--skip", nargs="*", default=[])
    args = parser.parse_args()
    args.skip = {tuple(text.split("/")) for text in args.skip}
    return args


def jobs(shapes: list[str], impls: list[str], passes: list[str]) -> list[Job]:
    """What is measured, in order: shape by shape; decode and 8 bits have no backward."""

    def there_is(impl: str, shape: str, name: str) -> bool:
        decode = SHAPES[shape].decode
        if impl in EIGHT_BIT and decode != (impl in EIGHT_BIT_WEIGHTS):
            return False
        return name == "fwd" or not (decode or impl in EIGHT_BIT)

    return [
        (impl, shape, name)
        for shape in shapes
        for impl in impls
        for name in PASSES
        if name in passes and there_is(impl, shape, name)
    ]


def work(args: argparse.Namespace) -> Iterator[tuple[list[Job], Shape, Inputs]]:
    """For each shape of a worker that has jobs left: those jobs, the shape, its inputs."""
    for name in args.shapes:
        todo = [j for j in jobs([name], args.impls, args.passes) if j not in args.skip]
        if todo:
            shape = find_shape(name, args.tiny)
            yield todo, shape, make_inputs(shape, args.routing)
