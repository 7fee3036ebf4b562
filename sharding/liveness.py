"""How many bytes of a traced training step are alive at once in its backward.

Counts the traced program, in which nothing is fused: what a compiler prefers to compute twice is
counted as kept. What is only seen in another way (cast, transposed) is not counted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from jax.extend.core import Literal

from sharding.traffic import inner_jaxprs, where

__all__ = ["kept_for_backward", "most_in_backward", "recomputed_at_once"]

CALLS = {"jit", "pjit", "closed_call"}
"""Primitives that only call a jaxpr."""

KERNELS = {"core_map", "mpmd_map", "pallas_call"}
"""Primitives that hold a kernel, whose values lie in its own memories."""

ALIASES = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "name",
    "reshape",
    "squeeze",
    "transpose",
}
"""Primitives whose result a compiler need not store beside their operand."""


def kept_for_backward(jaxpr: Any, scores: int | None = None) -> int:
    """Bytes computed in the forward of a step and read in its backward, weights left out.

    Args:
        jaxpr: of the step.
        scores: S, where values of S × S for each head are never stored; None counts them.
    """
    level = _with_backward(jaxpr)
    return 0 if level is None else _crossing_bytes(level, _before, scores)


def most_in_backward(jaxpr: Any, scores: int | None = None, *, growth: float = 1.0) -> int:
    """Most bytes alive at once in the backward of a step: kept for it, on the way, and its results.

    Equations are taken in the order of the program. What the forward kept is alive until its last
    use, a gradient of a weight from where it is made until the end, and all else in between. A
    loop, and a piece that is computed again, need the most that is alive inside.

    Args:
        jaxpr: of the step.
        scores: as for `kept_for_backward`.
        growth: bytes that stand for each byte of a gradient once it is made.
    """
    level = _with_backward(jaxpr)
    if level is None:
        return 0
    return _most_alive(level, _before, scores, growth)


def recomputed_at_once(jaxpr: Any, scores: int | None = None) -> int:
    """What `kept_for_backward` says of the largest piece that the backward computes again.

    Pieces are a rematerialised layer or chunk of the loss, and a further wave of an exchange.
    """
    return max((_crossing_bytes(*piece, scores) for piece in _pieces(jaxpr)), default=0)


def _pieces(jaxpr: Any) -> Iterator[tuple[Any, Callable[[str], bool]]]:
    """Levels of pieces that are computed again, with what tells that from their backward."""
    outermost = True
    for level in _levels(jaxpr):
        stacks = [stack for stack, _ in _called(level)]
        if any(_again(stack) for stack in stacks):
            yield level, _again
        elif not all(_before(stack) for stack in stacks):
            if not outermost:
                yield level, _before
            outermost = False


def _again(stack: str) -> bool:
    """Whether an equation computes something once more."""
    return "rematted_computation" in stack


def _before(stack: str) -> bool:
    """Whether an equation is none of the backward."""
    return "transpose(" not in stack


def _with_backward(jaxpr: Any) -> Any:
    """The outermost level that has a backward; None if there is none."""
    for level in _levels(jaxpr):
        if not all(_before(stack) for stack, _ in _called(level)):
            return level
    return None


def _called(jaxpr: Any, outside: str = "") -> Iterator[tuple[str, Any]]:
    """The equations of a jaxpr with their name stacks; in the place of a call those it calls."""
    for eqn in jaxpr.eqns:
        stack = f"{outside}/{eqn.source_info.name_stack}"
        if eqn.primitive.name in CALLS:
            yield from _called(next(inner_jaxprs(eqn)), stack)
        else:
            yield stack, eqn


def _levels(jaxpr: Any) -> list[Any]:
    """A jaxpr and all it holds, outer ones first; what is only called belongs to its caller."""
    levels, next_ = [], [jaxpr]
    while next_:
        levels += next_
        next_ = [
            inner for level in next_ for _, eqn in _called(level) for inner in inner_jaxprs(eqn)
        ]
    return levels


@dataclass(eq=False)
class _Made:
    """A value that an equation makes: where a chain of aliases starts.

    size: its bytes.
    shape: of it.
    early: whether an early equation makes it.
    born: the number of late equations before the one that makes it, -1 if that one is early.
    last: the same of the late equation that reads it last; -1: none.
    read: most bytes of it that a late equation reads.
    given: of a late value, most bytes that an equation which is not late reads, or a result has.
    """

    size: int
    shape: tuple[int, ...]
    early: bool
    born: int
    last: int = -1
    read: int = 0
    given: int = 0

    def is_square(self, side: int | None) -> bool:
        """Whether it has so many rows and columns for each head."""
        return len(self.shape) >= 4 and self.shape[-2:] == (side, side)


def _nothing(_: str) -> bool:
    """Of a piece that is all late."""
    return False


def _crossing_bytes(jaxpr: Any, early: Callable[[str], bool], scores: int | None) -> int:
    """Bytes of distinct values that early equations make and the others read."""
    values, _ = _follow(jaxpr, early)
    return sum(made.read for made in values if made.early and not made.is_square(scores))


def _most_alive(jaxpr: Any, early: Callable[[str], bool], scores: int | None, growth: float) -> int:
    """Most bytes of a level that are alive at one of its late equations; see `most_in_backward`."""
    followed, inside = _follow(jaxpr, early)
    values = [made for made in followed if not made.is_square(scores)]
    end = 1 + max((max(made.born, made.last) for made in values), default=0)
    end = max(end, 1 + max(inside, default=0))
    changes = [0.0] * (end + 1)
    for made in values:
        size, until = float(made.size), made.last + 1
        if made.early:
            size = made.read  # nothing if it never is
        elif made.given:
            size, until = growth * made.given, end
        begin = max(made.born, 0)
        changes[begin] += size
        changes[max(until, begin + 1)] -= size
    for at, eqn in inside.items():
        most = max(_most_inside(inner, scores) for inner in inner_jaxprs(eqn))
        changes[at] += most
        changes[at + 1] -= most
    return math.ceil(max(accumulate(changes)))


def _most_inside(jaxpr: Any, scores: int | None) -> int:
    """The same of what an equation of the backward holds; its results count outside."""
    stacks = [stack for stack, _ in _called(jaxpr)]
    early: Callable[[str], bool] = _nothing
    if any(_again(stack) for stack in stacks):
        early = _again
    elif not all(_before(stack) for stack in stacks):
        early = _before
    return _most_alive(jaxpr, early, scores, 0.0)


def _follow(jaxpr: Any, early: Callable[[str], bool]) -> tuple[list[_Made], dict[int, Any]]:
    """What the equations of a level make, gathered weights left out; what is called is in place.

    Also the late equations that hold others, by the number of late ones before them. What is inside
    a kernel does not count.

    Args:
        jaxpr: the level.
        early: of an equation's name stack; the others are late.
    """
    values: list[_Made] = []
    holding: dict[int, Any] = {}
    count = 0  # late equations so far

    def walk(jaxpr: Any, made: dict[Any, _Made], outside: str) -> None:
        """Notes what is made; `made` has it by variable, nothing for values from outside."""
        nonlocal count

        def known(variables: Sequence[Any]) -> list[_Made | None]:
            return [None if isinstance(v, Literal) else made.get(v) for v in variables]

        for eqn in jaxpr.eqns:
            stack = f"{outside}/{eqn.source_info.name_stack}"
            if eqn.primitive.name in CALLS:
                inner = next(inner_jaxprs(eqn))
                pairs = zip(inner.invars, known(eqn.invars), strict=True)
                inside = {v: source for v, source in pairs if source is not None}
                walk(inner, inside, stack)
                for outer, var in zip(eqn.outvars, inner.outvars, strict=True):
                    if not isinstance(var, Literal) and var in inside:
                        made[outer] = inside[var]
                continue
            is_early = early(stack)
            for var, source in zip(eqn.invars, known(eqn.invars), strict=True):
                if source is None:
                    continue
                size = min(_size(var), source.size)
                if not is_early:
                    source.read, source.last = max(source.read, size), count
                elif not source.early:
                    source.given = max(source.given, size)
            alias = eqn.primitive.name in ALIASES
            for var in [] if where(eqn) == "weight gather" else eqn.outvars:
                source = known(eqn.invars[:1])[0] if alias else None
                if not alias:
                    source = _Made(_size(var), var.aval.shape, is_early, -1 if is_early else count)
                    values.append(source)
                if source is not None:
                    made[var] = source
            if not is_early and eqn.primitive.name not in KERNELS and any(inner_jaxprs(eqn)):
                holding[count] = eqn
            count += not is_early
        if jaxpr is level:
            for var, source in zip(jaxpr.outvars, known(jaxpr.outvars), strict=True):
                if source is not None and not source.early:
                    source.given = max(source.given, min(_size(var), source.size))

    level = jaxpr
    walk(level, {}, "")
    return values, holding


def _size(var: Any) -> int:
    # A mask is a comparison away from what it was made of, so it is made again.
    return 0 if var.aval.dtype == bool else var.aval.size * var.aval.dtype.itemsize
