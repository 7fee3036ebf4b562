"""Tunes what is asked, and keeps what is found in the table."""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from pallas_kernels.tuning.arguments import parse, works_of
from pallas_kernels.tuning.lookup import device_kind, package_table
from pallas_kernels.tuning.product import Product, candidates
from pallas_kernels.tuning.search import Finding, Program, Search, Timer, Work, asked_by
from pallas_kernels.tuning.table import Entry, Measured, Table, read_table, store_table

__all__ = ["execute", "run"]

ROOT = Path(__file__).parents[2]
WORKERS = 16


def _checked_out() -> bool:
    """Whether this is this project's own tree, and not installed or copied into another."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return project.get("project", {}).get("name") == "moejax"


def _output(given: Path | None, device: str) -> Path:
    if given is not None:
        return given
    if not _checked_out():
        raise ValueError("--output FILE is needed: this library is installed, not checked out")
    return package_table(device)


@cache
def _commit() -> str:
    """The checked-out commit, with + when files differ from it; "unknown" without one.

    A repository that this tree only lies in has commits too, which say nothing about it.
    """

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not _checked_out() or Path(git("rev-parse", "--show-toplevel")) != ROOT.resolve():
        return "unknown"
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


def _keep(output: Path, device: str, findings: Mapping[Product, Finding]) -> int:
    """Stores findings; how many entries there are.

    The file is read each time: another process may have stored its own since.
    """
    table = read_table(output, device) if output.exists() else Table(device, {})
    table = _merged(table, findings)
    try:
        store_table(table, output)
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror or error}") from None
    return len(table.entries)


def _show(product: Product, found: Finding) -> None:
    if found.cut is None:
        print(f"  {product}: {found.heuristic_ms:.4f} ms, the heuristic's", flush=True)
        return
    gain = 1 - found.ms / found.heuristic_ms
    times = f"{found.heuristic_ms:.4f} → {found.ms:.4f} ms, {gain:.1%} less"
    print(f"  {product}: {times}: {found.cut}", flush=True)


def run(
    works: Sequence[Work], output: Path, device: str, *, timer: Timer, most: int, rounds: int
) -> None:
    """Tunes all. What is found is stored after each work's first timing, and after its last.

    Raises:
        ValueError: the table cannot be read or written; known before anything is compiled.
    """
    count = _keep(output, device, {})

    def keep(findings: Mapping[Product, Finding]) -> None:
        nonlocal count
        count = _keep(output, device, findings)

    known: set[Product] = set()
    searches = []
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    pool = ThreadPoolExecutor(min(WORKERS, there))
    try:
        for work in works:  # all of them: compiling goes on while others are timed
            searches.append(Search(work, pool, most=most, known=known))
            known |= searches[-1].plain.keys()
        for number in range(len(works)):
            search = searches.pop(0)  # with its programs
            print(f"{search.work.name} ({number + 1}/{len(works)})", flush=True)
            findings = search.finish(timer=timer, rounds=rounds, keep=keep)
            keep(findings)
            for product, found in findings.items():
                _show(product, found)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        print(f"{output}: {count} entries", flush=True)


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


def execute(argv: Sequence[str] | None) -> None:
    """The command, but for how it ends; see `pallas_kernels.tuning.__main__`.

    Raises:
        ValueError, NotImplementedError: what is asked cannot be done; the first line says why.
        RuntimeError: an operation's result is wrong, or cannot be timed.
    """
    args = parse(argv)
    import jax

    from pallas_kernels.hopper.compat import hopper_refusal
    from pallas_kernels.tuning.timing import measure_kernels

    def timer(program: Program, inputs, kernels):
        return measure_kernels(program.call, inputs, kernels)

    works, skipped = works_of(args)
    for line in skipped:
        print(line, flush=True)
    if args.dry_run:
        _dry_run(works, args.most)
        return
    reason = hopper_refusal(jax.numpy.bfloat16, forced=False)
    if reason is not None:
        raise ValueError(f"no Hopper GPU here: {reason}; --dry-run says what would be tried")
    device = device_kind()
    output = _output(args.output, device)
    run(works, output, device, timer=timer, most=args.most, rounds=args.rounds)
