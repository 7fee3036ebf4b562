"""The fewest misses that any policy can have, known only afterwards.

Shape letters: T steps, K uses of a step, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from moejax.errors import UserError

__all__ = ["fewest_misses"]


def fewest_misses(
    trace_TK: Int[np.ndarray, "T K"], num_experts: int, slots: int, held: Iterable[int] = ()
) -> int:
    """Misses of one layer when what is given up is what is used again last.

    A step uses a set of experts. All of them have to be held for it, so each that is absent is
    fetched, one miss, and none that the step uses is given up for it.

    No schedule fetches less (L. A. Belady, IBM Systems Journal 5, 1966, for single uses). Fetching
    only what is missing, when it is, is no loss: an earlier fetch can be put off until it is used,
    and needs no slot until then. So take a best schedule that fetches late, and the first step at
    which it gives up an expert a where this one gives up b, both held and neither used by the step;
    b's next use is not before a's. Let a second schedule give up b there and do what the best one
    does from then on. It holds a and lacks b, the rest is the same, until one of these happens:

    1. The best gives up b. The second gives up a, and they hold the same.
    2. The best fetches a, for its next use. The second has it. If the best gives up b for it, they
       hold the same, and the second has fetched once less. If it gives up c, the second gives up c
       and fetches b: as many fetches, and they hold the same. If b is used by this step, too, that
       fetch is the miss that the best did not have, and the best's fetch of a is the one that the
       second did not have.

    b is not used before, as its next use does not come before a's. So the second schedule is as
    good, and goes along with this one for an expert more; and so on to the end. Fetching ahead can
    move misses to earlier but cannot make fetches fewer.

    Args:
        trace_TK: experts of each step; −1 for none; the same one twice counts once.
        num_experts: E.
        slots: how many experts are held at once.
        held: before the first step.

    Raises:
        UserError: a step uses more experts than there are slots, or more are held.
    """
    trace_TK = np.asarray(trace_TK)
    uses_TE = np.zeros((len(trace_TK), num_experts + 1), bool)
    np.put_along_axis(uses_TE, trace_TK.astype(np.int64), True, axis=1)
    uses_TE = uses_TE[:, :num_experts]  # −1 is the last column
    most = int(uses_TE.sum(1).max(initial=0))
    held_E = np.zeros(num_experts, bool)
    held_E[list(held)] = True
    if max(most, int(held_E.sum())) > slots:
        raise UserError(
            f"slots={slots}: a step uses {most} experts and {held_E.sum()} are held at first; the "
            "bound is of caches that hold them all"
        )
    next_TE = _next_uses(uses_TE)
    misses = 0
    for uses_E, next_E in zip(uses_TE, next_TE):
        missing_E = uses_E & ~held_E
        misses += int(missing_E.sum())
        held_E |= uses_E
        over = int(held_E.sum()) - slots
        if over > 0:
            free = np.flatnonzero(held_E & ~uses_E)
            last = free[np.argsort(-next_E[free], kind="stable")[:over]]
            held_E[last] = False
    return misses


def _next_uses(uses_TE: np.ndarray) -> np.ndarray:
    """The step after each step at which an expert is used next, T for never; int64 [T, E]."""
    steps = len(uses_TE)
    next_TE = np.full(uses_TE.shape, steps, np.int64)
    for step in range(steps - 2, -1, -1):
        next_TE[step] = np.where(uses_TE[step + 1], step + 1, next_TE[step + 1])
    return next_TE
