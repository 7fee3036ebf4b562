"""Which experts of a layer are on the device, and in which slot.

Only the books: the runtime moves weights, a simulation counts. Both use this class.

Shape letters: E experts, S slots.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from moejax.errors import UserError
from moejax.offload.policies import Policy

__all__ = ["SlotCache"]


class SlotCache:
    """The slots of one layer.

    Args:
        slots: S, how many experts are on the device at once; at least 1.
        num_experts: E.
        policy: of this layer alone.
        held: experts that are there from the start, in slots 0, 1, …

    Attributes:
        slots: S.
        policy: says what is given up.
        slot_E: int32 [E], where each expert is; −1 for absent. The array changes in place.

    Raises:
        UserError: there is no slot, or more is held than fits.
    """

    slot_E: Int32[np.ndarray, " E"]

    def __init__(
        self, slots: int, num_experts: int, policy: Policy, held: Iterable[int] = ()
    ) -> None:
        held = tuple(dict.fromkeys(held))
        if slots < 1:
            raise UserError(f"slots={slots}: a layer needs at least 1 slot for its experts")
        if len(held) > slots:
            raise UserError(f"held: {len(held)} experts for {slots} slots; name at most {slots}")
        self.slots = slots
        self.policy = policy
        self.slot_E = np.full(num_experts, -1, np.int32)
        self._held = {expert: slot for slot, expert in enumerate(held)}
        for expert, slot in self._held.items():
            self.slot_E[expert] = slot
        self._free = list(range(slots - 1, len(held) - 1, -1))

    def __contains__(self, expert: int) -> bool:
        return expert in self._held

    @property
    def held(self) -> tuple[int, ...]:
        """The experts on the device."""
        return tuple(self._held)

    def missing(self, experts: Iterable[int]) -> list[int]:
        """Those that are absent, each once, in the order given."""
        return [expert for expert in dict.fromkeys(experts) if expert not in self._held]

    def admit(self, expert: int, keep: Collection[int] = ()) -> int:
        """Gives an expert a slot: its own, a free one, or that of an expert given up.

        Args:
            expert: what comes.
            keep: what must stay.

        Raises:
            ValueError: no slot is free and all that is held must stay.
        """
        if expert in self._held:
            return self._held[expert]
        if self._free:
            slot = self._free.pop()
        else:
            gone = self.policy.victim(self.held, keep)
            slot = self._held.pop(gone)
            self.slot_E[gone] = -1
        self._held[expert] = slot
        self.slot_E[expert] = slot
        return slot

    def used(self, experts: Sequence[int]) -> None:
        """A step has used these, held or not."""
        self.policy.used(experts)
