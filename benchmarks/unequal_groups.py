"""Gradients of experts' weights when experts have unequal numbers of tokens.

    python benchmarks/unequal_groups.py           # one Hopper GPU
    python benchmarks/unequal_groups.py --tiny    # a rehearsal; writes nothing

Writes benchmarks/results/unequal_groups.json. Experts' popularities are lognormal, `skew` being the
deviation of the logarithm; every token chooses K of them without repetition (Gumbel, top K), and
rows are random. A row for a shape, a skew and a kernel: `largest` is the largest expert's rows over
the mean, `ms` of tiles dealt out largest first (`moejax`'s own), `ms_in_order` of those dealt out
in the experts' order, medians of rounds in one process; `even_ms`, the time for experts of equal
size with the same number of rows in all, is what perfect shares would take.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import numpy as np
from common import write_results
from ep_timing import Rounds
from jax import numpy as jnp

from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.interpreting import interpreted

SHAPES = {  # tokens, width, hidden, experts, experts of a token
    "small": (32768, 1024, 512, 64, 8),
    "qwen3-30b": (32768, 2048, 768, 128, 8),
    "mixtral": (16384, 4096, 14336, 8, 2),
}
TINY = {"tiny": (64, 128, 128, 8, 2)}
SKEWS = (0.0, 0.5, 1.0)
SEED = 0


def loads(rng: np.random.Generator, tokens: int, experts: int, top_k: int, skew: float) -> Any:
    """Rows of each expert."""
    popular = skew * rng.normal(size=experts)
    drawn = popular + rng.gumbel(size=(tokens, experts))
    chosen = np.argpartition(-drawn, top_k - 1, axis=1)[:, :top_k]
    return np.bincount(chosen.reshape(-1), minlength=experts)


def in_order(sizes_G: jax.Array) -> jax.Array:
    """What the kernels did before: groups as they come."""
    return jnp.arange(sizes_G.shape[0], dtype=jnp.int32)


def programs(rows: Any, cts: Any, wide: Any, sizes: Any, order: Any) -> dict[str, Any]:
    """The two kernels, compiled with this order of the groups."""
    original = products.largest_first
    products.largest_first = order
    try:
        made = {}
        for name, operands in {
            "w_in_gradient": (rows, wide),
            "w_out_gradient": (cts, rows),
        }.items():
            call = jax.jit(partial(products.weights_gradient, name=name))
            compiled = call.lower(*operands, sizes).compile()
            made[name] = partial(compiled, *operands, sizes)
        return made
    finally:
        products.largest_first = original


def measure(shape: str, sizes: tuple[int, ...], skew: float, rounds: int) -> list[dict[str, Any]]:
    """The rows of one shape and skew."""
    tokens, width, hidden, experts, top_k = sizes
    rng = np.random.default_rng(SEED)
    counts = {"": loads(rng, tokens, experts, top_k, skew)}
    counts["even"] = np.full(experts, tokens * top_k // experts)
    places = tokens * top_k + experts * ROWS

    def random(key: int, columns: int) -> jax.Array:
        shape = (places, columns)
        return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)

    operands = random(1, width), random(2, hidden), random(3, 2 * hidden)
    calls, results = {}, {}
    for kind, of_experts in counts.items():
        padded = jnp.asarray(-(-of_experts // ROWS) * ROWS, jnp.int32)
        for name, order in {"ours": products.largest_first, "order": in_order}.items():
            if kind and name == "order":
                continue
            for kernel, call in programs(*operands, padded, order).items():
                calls[kernel, kind, name] = call
                results[kernel, kind, name] = call()
    for kernel in ("w_in_gradient", "w_out_gradient"):
        same = jnp.array_equal(results[kernel, "", "ours"], results[kernel, "", "order"])
        assert bool(same), f"{kernel}: another order, another result"
    results.clear()
    timed = Rounds(calls)
    timed.warm_up()
    for _ in range(rounds):
        timed.run()
    assert not timed.errors, timed.errors
    found = []
    for kernel in ("w_in_gradient", "w_out_gradient"):
        ms, plain, even = (
            timed.ms((kernel, *key)) for key in (("", "ours"), ("", "order"), ("even", "ours"))
        )
        row = {"shape": shape, "skew": skew, "kernel": kernel}
        row["largest"] = round(float(counts[""].max() / counts[""].mean()), 3)
        row |= {"ms": round(ms, 4), "ms_in_order": round(plain, 4), "even_ms": round(even, 4)}
        row |= {"over_even": round(ms / even, 3), "in_order_over_even": round(plain / even, 3)}
        print(row, flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal in an interpreter")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        if args.tiny:
            stack.enter_context(interpreted())
        for shape in TINY if args.tiny else args.shapes:
            for skew in SKEWS:
                rows += measure(
                    shape, (TINY | SHAPES)[shape], skew, 1 if args.tiny else args.rounds
                )
                if not args.tiny:
                    write_results("unequal_groups", rows)


if __name__ == "__main__":
    main()
