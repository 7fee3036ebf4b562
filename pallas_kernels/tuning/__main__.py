"""Measures sizes of tiles on this GPU, and stores those that beat the heuristic's.

    python -m pallas_kernels.tuning --shape 32768,2048,768,128,8
    python -m pallas_kernels.tuning --shape 1,2048,768,128,8 --tokens 16 256
    python -m pallas_kernels.tuning --product 32768,4096,4096,16 --output mine.json

--shape is a layer of experts: tokens T, model width D, expert width H, experts E, of a token K.
Of so few tokens that the forward treats tiles as nearly empty, only the forward is tuned.
--product is a grouped matmul: rows M, contraction K, columns N, groups G. An entry takes the place
of an earlier one for the same product. After Ctrl-C the shapes that were done are in the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pallas_kernels.tuning.lookup import device_kind, package_table
from pallas_kernels.tuning.product import Product, candidates
from pallas_kernels.tuning.search import Finding, Program, Search, Timer, Work, asked_by
from pallas_kernels.tuning.table import Entry, Measured, Table, read_table, store_table
from pallas_kernels.tuning.works import Layer, Products

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
WORKERS = 16


def _numbers(count: int, names: str):
    def parse(text: str) -> tuple[int, ...]:
        words = text.split(",")
        if len(words) != count or not all(w.isdecimal() and int(w) > 0 for w in words):
            raise argparse.ArgumentTypeError(f"{text!r}: {count} positive integers {names}")
        return tuple(map(int, words))

    return parse


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    layer, product = _numbers(5, "T,D,H,E,K"), _numbers(4, "M,K,N,G")
    parser.add_argument("--shape", type=layer, nargs="+", default=[], metavar="T,D,H,E,K")
    parser.add_argument("--product", type=product, nargs="+", default=[], metavar="M,K,N,G")
    parser.add_argument("--tokens", type=int, nargs="+", help="in the place of the shapes' T")
    parser.add_argument("--activation", default="swiglu", help="of the experts; default swiglu")
    parser.add_argument(
        "--alignment",
        type=int,
        default=128,
        choices=(1, 128),
        help="of a product's groups; with 1 they have any size",
    )
    parser.add_argument("--passes", nargs="+", choices=("fwd", "fwdbwd"), default=["fwdbwd", "fwd"])
    parser.add_argument("--most", type=int, default=10, help="cuts to try of each product")
    parser.add_argument("--rounds", type=int, default=5, help="each times every program once")
    parser.add_argument("--output", type=Path, help="table; in a checkout by default its own")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be tried")
    args = parser.parse_args(argv)
    if not args.shape and not args.product:
        parser.error("nothing to tune: give a --shape or a --product")
    for name in ("most", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    if any(tokens < 1 for tokens in args.tokens or []):
        parser.error(f"--tokens {min(args.tokens)}: at least 1")
    return args


def _works(args: argparse.Namespace) -> list[Work]:
    from jax.numpy import bfloat16

    from pallas_kernels.fused_experts import api as fused

    for tokens, d_model, hidden, experts, top_k in args.shape:
        case = fused.Case(d_model, hidden, args.activation, bfloat16)
        reason = fused.refusal("mosaic_gpu", case, forced=True)
        if top_k > experts:
            reason = f"{top_k} experts a token, and there are {experts}"
        if reason is not None:
            shape = ",".join(map(str, (tokens, d_model, hidden, experts, top_k)))
            raise ValueError(f"--shape {shape}: {reason}")

    works: list[Work] = []
    for which in args.passes:
        backward = which == "fwdbwd"
        for tokens, d_model, hidden, experts, top_k in args.shape:
            for count in args.tokens or [tokens]:
                if backward and count * top_k <= fused.FEW_ROWS * experts:
                    continue  # a step of decoding
                sizes = (d_model, hidden, experts, top_k, backward, args.activation)
                works.append(Layer(count, *sizes))
        for rows, contraction, columns, groups in args.product:
            works.append(Products(rows, contraction, columns, groups, backward, args.alignment))
    return works


def _output(args: argparse.Namespace, device: str) -> Path:
    if args.output is not None:
        return args.output
    if not (ROOT / "pyproject.toml").is_file():
        raise ValueError("--output FILE is needed: this library is installed, not checked out")
    return package_table(device)


def _commit() -> str:
    """The checked-out commit, with + when files differ from it; "unknown" without git."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def _merged(table: Table, findings: Mapping[Product, Finding]) -> Table:
    """The table with these findings in the place of what it had for their products."""
    import jax
    import jaxlib

    versions = (jax.__version__, jaxlib.__version__, _commit())
    entries = {p: entry for p, entry in table.entries.items() if p not in findings}
    for product, found in findings.items():
        if found.cut is not None:
            times = (round(found.ms, 5), round(found.heuristic_ms, 5))
            entries[product] = Entry(found.cut, Measured(*times, *versions))
    return Table(table.device, entries)


def _show(product: Product, found: Finding) -> None:
    if found.cut is None:
        print(f"  {product}: {found.heuristic_ms:.4f} ms, the heuristic's", flush=True)
        return
    gain = 1 - found.ms / found.heuristic_ms
    times = f"{found.heuristic_ms:.4f} → {found.ms:.4f} ms, {gain:.1%} less"
    print(f"  {product}: {times}: {found.cut}", flush=True)


def run(works: Sequence[Work], output: Path, device: str, *, timer: Timer, most: int, rounds: int):
    """Tunes all, and stores the table after each."""
    table = read_table(output, device) if output.exists() else Table(device, {})
    known: set[Product] = set()
    searches = []
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    pool = ThreadPoolExecutor(min(WORKERS, there))
    try:
        for work in works:  # all of them: compiling goes on while others are timed
            searches.append(Search(work, pool, most=most, known=known))
            known |= searches[-1].plain.keys()
        while searches:
            search = searches.pop(0)
            print(search.work.name, flush=True)
            findings = search.finish(timer=timer, rounds=rounds)
            for product, found in findings.items():
                _show(product, found)
            table = _merged(table, findings)
            store_table(table, output)
    except KeyboardInterrupt:
        print("interrupted; what was found before is kept", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"{output}: {len(table.entries)} entries")


def _dry_run(works: Sequence[Work], most: int) -> None:
    seen: set[Product] = set()
    for work in works:
        print(work.name)
        for product, heuristic in asked_by(work).items():
            if product in seen:
                continue
            seen.add(product)
            print(f"  {product}\n    {heuristic} (the heuristic's)")
            for cut in candidates(product, heuristic, most):
                print(f"    {cut}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; ends with one line on what is asked wrongly."""
    args = _parse(argv)
    import jax

    from pallas_kernels.hopper.compat import hopper_refusal
    from pallas_kernels.tuning.timing import measure_kernels

    def timer(program: Program, inputs, kernels):
        return measure_kernels(program.call, inputs, kernels)

    try:
        works = _works(args)
        if args.dry_run:
            _dry_run(works, args.most)
            return
        reason = hopper_refusal(jax.numpy.bfloat16, forced=False)
        if reason is not None:
            raise ValueError(f"no Hopper GPU here: {reason}; --dry-run says what would be tried")
        device = device_kind()
        run(works, _output(args, device), device, timer=timer, most=args.most, rounds=args.rounds)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        sys.exit(f"tuning: {str(error).strip().splitlines()[0]}")


if __name__ == "__main__":
    main()
