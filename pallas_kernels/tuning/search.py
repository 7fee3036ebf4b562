"""The search: programs that each try one cut of every product, checked, then timed in rounds.

A program is the whole operation, so its kernels run in the order and with the neighbours that they
have in use, and one compilation tries a cut of each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from typing import Any, Protocol

import jax
from jax import numpy as jnp

from pallas_kernels.tuning.lookup import recorded, use_table
from pallas_kernels.tuning.product import Cut, Product, candidates
from pallas_kernels.tuning.rounds import Cuts, Finding, Program, Timer, findings_of, timed
from pallas_kernels.tuning.table import Entry, Measured, Table

__all__ = [
    "Finding",
    "Program",
    "Search",
    "Timer",
    "Work",
    "asked_by",
    "first_line",
    "relative_distance",
]

ROUNDING = 1e-3  # most relative distance between a program's output and the heuristic's
ACCURATE = 1e-2  # most relative distance between the heuristic's output and the reference's
URGENT_WORKERS = 4  # compile what is waited for


class Work(Protocol):
    """An operation on one shape."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def function(self, *inputs: Any) -> Any:
        """The operation; its outputs are what is compared."""
        ...

    def shapes(self) -> tuple[Any, ...]:
        """Of the inputs."""
        ...

    def inputs(self) -> tuple[Any, ...]:
        """Arrays."""
        ...

    def errors(self, inputs: tuple[Any, ...], outputs: Any) -> dict[str, float]:
        """Relative distances of the outputs, or samples of them, from the plain reference."""
        ...


@jax.jit
def _norms(got: Any, want: Any) -> tuple[jax.Array, jax.Array]:
    got, want = (a.astype(jnp.float32) for a in (got, want))
    return jnp.linalg.norm((got - want).ravel()), jnp.linalg.norm(want.ravel())


def relative_distance(got: Any, want: Any) -> float:
    """‖got − want‖ / ‖want‖ in float32; NaN where something is."""
    away, size = (float(norm) for norm in _norms(got, want))
    return away / size if size else away


def _trial(cuts: Cuts) -> Table:
    nothing = Measured(1.0, 1.0, "", "", "")
    return Table("", {product: Entry(cut, nothing) for product, cut in cuts.items()})


def asked_by(work: Work) -> dict[Product, Cut]:
    """The products of an operation with the heuristic's cuts; nothing is computed."""
    with use_table(None), recorded() as asked:
        jax.eval_shape(lambda *inputs: work.function(*inputs), *work.shapes())
    return asked


def _compile(work: Work, cuts: Cuts) -> Program:
    with use_table(_trial(cuts)):  # a new function each time: JAX would find the old trace
        lowered = jax.jit(lambda *inputs: work.function(*inputs)).lower(*work.shapes())
    return Program(cuts, lowered.compile())


def _start(pool: Executor, work: Work, cuts: Cuts) -> Future[Program]:
    return pool.submit(copy_context().run, _compile, work, cuts)


def _say(line: str) -> None:
    print(line, flush=True)


def first_line(error: BaseException) -> str:
    """Of its message, or its type's name where that is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _fault(program: Program, inputs: tuple[Any, ...], expected: Any) -> str | None:
    """How a program's result differs from the heuristic's beyond rounding."""
    pairs = zip(jax.tree.leaves(program.call(*inputs)), jax.tree.leaves(expected), strict=True)
    distances = [relative_distance(*pair) for pair in pairs]
    wrong = [distance for distance in distances if not distance <= ROUNDING]
    return f"results differ by {wrong[0]:.1e}" if wrong else None


def _side_by_side(options: Mapping[Product, Sequence[Cut]]) -> list[Cuts]:
    most = max(map(len, options.values()), default=0)
    return [{p: cuts[i] for p, cuts in options.items() if i < len(cuts)} for i in range(most)]


class Search:
    """Looks for better cuts of an operation's products; compiles from the start, in a pool.

    A cut that looks better is timed once more, in a program of all such cuts beside the
    heuristic's: the best of many is partly luck.
    """

    def __init__(
        self,
        work: Work,
        pool: Executor,
        *,
        most: int,
        known: Iterable[Product] = (),
        say: Callable[[str], None] = _say,
    ) -> None:
        """Starts compiling.

        Args:
            work: the operation.
            pool: of threads.
            most: cuts to try of each product.
            known: products that are not looked at again.
            say: takes lines.
        """
        self.work, self.say = work, say
        asked, known = asked_by(work), set(known)
        names = Counter(product.kernel for product in asked)
        self.plain = {p: c for p, c in asked.items() if p not in known and names[p.kernel] == 1}
        self.unclear = [product for product in asked if names[product.kernel] > 1]
        options = {p: candidates(p, cut, most) for p, cut in self.plain.items()}
        attempts = [{}, *_side_by_side(options)] if self.plain else []
        self.started = [(cuts, _start(pool, work, cuts)) for cuts in attempts]

    def finish(
        self,
        *,
        timer: Timer,
        rounds: int,
        keep: Callable[[Mapping[Product, Finding]], None] = lambda findings: None,
    ) -> dict[Product, Finding]:
        """What came of each product.

        Args:
            timer: of programs.
            rounds: each runs all programs.
            keep: takes what the first timing found, before what looks better is timed once more.

        Raises:
            RuntimeError: the heuristic's result is not the reference's.
        """
        for product in self.unclear:
            self.say(f"  left out: {product}: two products are called so")
        if not self.plain:
            self.say("  nothing that was not tuned before")
            return {}
        inputs = self.work.inputs()
        (_, first), *others = self.started
        plain = first.result()
        self.say("  the heuristic's program is compiled")
        expected = plain.call(*inputs)
        errors = self.work.errors(inputs, expected)
        if not all(error <= ACCURATE for error in errors.values()):
            raise RuntimeError(f"{self.work.name}: the heuristic's result is wrong: {errors}")
        self.say("  its result is right")
        pool = ThreadPoolExecutor(URGENT_WORKERS)
        try:
            programs = self._good(others, pool, inputs, expected)
            self.say(f"  {len(programs) + 1} programs, {rounds} rounds")
            times = timed([plain, *programs], inputs, self.plain, rounds, timer, self.say)
            findings = findings_of(times, self.plain)
            better = {p: found.cut for p, found in findings.items() if found.cut is not None}
            if not better:
                return findings
            keep(findings)
            self.say(f"  {len(better)} look better, {rounds} rounds more")
            again = [(better, _start(pool, self.work, better))]
            programs = self._good(again, pool, inputs, expected)
        finally:  # without waiting: after Ctrl-C there may be much under way
            pool.shutdown(wait=False, cancel_futures=True)
        if not programs:
            return {
                p: replace(found, cut=None, ms=found.heuristic_ms) for p, found in findings.items()
            }
        times = timed([plain, *programs], inputs, self.plain, rounds, timer, self.say)
        return findings_of(times, self.plain)

    def _good(
        self,
        started: Sequence[tuple[Cuts, Future[Program]]],
        pool: Executor,
        inputs: tuple[Any, ...],
        expected: Any,
    ) -> list[Program]:
        """The programs that compile and agree. One that does not is split into its cuts."""
        pending, found = list(started), []
        done, count = 0, len(pending)
        while pending:
            cuts, future = pending.pop(0)
            try:
                program = future.result()
                reason = _fault(program, inputs, expected)
            except Exception as error:  # whatever a compiler or a launch has to say
                reason = first_line(error)
            done += 1
            self.say(f"  candidates compiled {done}/{count}")
            if reason is None:
                found.append(program)
            elif len(cuts) > 1:
                alone: list[Cuts] = [{product: cut} for product, cut in cuts.items()]
                pending += [(one, _start(pool, self.work, one)) for one in alone]
                count += len(alone)
            else:
                (product, cut), *_ = cuts.items()
                self.say(f"  left out: {product}: {cut}: {reason}")
        return found
