"""Which expert of a layer leaves the device when another needs its slot.

A policy belongs to one layer. A step is one pass through that layer: a token when one is decoded,
several tokens in a batch.

Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float

from moejax.errors import UserError

__all__ = ["DECAY", "POLICIES", "Policy", "PolicyName", "make_policy"]

PolicyName = Literal["lru", "lfu", "predicted"]
POLICIES: tuple[PolicyName, ...] = ("lru", "lfu", "predicted")
DECAY = 0.98
"""Of `lfu`, a step: uses of 34 steps ago count half."""


class Policy(Protocol):
    """Chooses what to give up."""

    def used(self, experts: Sequence[int]) -> None:
        """A step has used these."""

    def expect(self, guess_E: Float[np.ndarray, " E"] | None) -> None:
        """How likely each expert is wanted next: higher is likelier, only the order counts."""

    def victim(self, held: Sequence[int], keep: Collection[int]) -> int:
        """The expert to give up.

        Args:
            held: what is on the device.
            keep: what stays.

        Raises:
            ValueError: all that is held must stay.
        """


def make_policy(name: PolicyName, num_experts: int, *, decay: float = DECAY) -> Policy:
    """A policy for one layer.

    Args:
        name: `lru` gives up what was used longest ago; `lfu` what was used least, where a use
            counts less with each step since; `predicted` what is least expected, and does as `lru`
            without a guess.
        num_experts: E.
        decay: of `lfu`: what is left of a use's count after each step, above 0, at most 1.

    Raises:
        UserError: there is no such policy, or the decay is out of range.
    """
    made = {"lru": _Recent, "lfu": _Frequent, "predicted": _Expected}.get(name)
    if made is None:
        raise UserError(f"policy {name!r}: must be one of {', '.join(POLICIES)}")
    if not 0 < decay <= 1:
        raise UserError(f"decay={decay}: must be above 0 and at most 1")
    return made(num_experts, decay)


class _Recent:
    """`lru`: the other policies break ties as this one does."""

    def __init__(self, num_experts: int, decay: float) -> None:
        self._step = 0
        self._last_use = [-1] * num_experts  # never used: the first to go

    def used(self, experts: Sequence[int]) -> None:
        self._step += 1
        for expert in experts:
            self._last_use[expert] = self._step

    def expect(self, guess_E: Float[np.ndarray, " E"] | None) -> None:
        pass

    def victim(self, held: Sequence[int], keep: Collection[int]) -> int:
        free = [expert for expert in held if expert not in keep]
        if not free:
            raise ValueError(f"all {len(held)} experts that are held must stay")
        return min(free, key=self._worth)

    def _worth(self, expert: int) -> tuple[float, ...]:
        """Whatever is worth least goes; equal ones by their number, so that runs repeat."""
        return self._last_use[expert], expert


class _Frequent(_Recent):
    """`lfu`."""

    def __init__(self, num_experts: int, decay: float) -> None:
        super().__init__(num_experts, decay)
        self._decay = decay
        self._count_E = np.zeros(num_experts)

    def used(self, experts: Sequence[int]) -> None:
        super().used(experts)
        self._count_E *= self._decay
        for expert in set(experts):
            self._count_E[expert] += 1.0

    def _worth(self, expert: int) -> tuple[float, ...]:
        return float(self._count_E[expert]), *super()._worth(expert)


class _Expected(_Recent):
    """`predicted`."""

    def __init__(self, num_experts: int, decay: float) -> None:
        super().__init__(num_experts, decay)
        self._guess_E: np.ndarray | None = None

    def expect(self, guess_E: Float[np.ndarray, " E"] | None) -> None:
        self._guess_E = guess_E

    def _worth(self, expert: int) -> tuple[float, ...]:
        likely = 0.0 if self._guess_E is None else float(self._guess_E[expert])
        return likely, *super()._worth(expert)
