"""What a step needs of a layer's experts, and what it is given.

Shape letters: E experts, S slots, W experts of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from moejax.offload.store import Expert

__all__ = ["Need", "Wave"]


@dataclass(frozen=True)
class Need:
    """What a step needs of a layer.

    at: the layer, counted among those with experts.
    layer: its index in the model.
    count_E: int64 [E], how often each expert was chosen.
    held, missing: the experts needed that are on the device, and that are not; an expert that is
        there in fewer bits, and on its way as it is, is missing.
    fits: whether all of them fit the slots.
    low: of the missing, those that come in fewer bits.
    """

    at: int
    layer: int
    count_E: Int[np.ndarray, " E"]
    held: tuple[int, ...]
    missing: tuple[int, ...]
    fits: bool
    low: frozenset[int] = frozenset()


@dataclass
class Wave:
    """Some of the experts that a layer needs.

    weights: the slots' arrays [S, …], or those of W experts each by itself.
    slot_E: int32 [E], where each expert is in these weights, −1 for the others.
    stacked: whether the weights are the slots'.
    done: to be set to what is computed from them, so that their memory is not needed again too
        early.
    """

    weights: Expert | tuple[Expert, ...]
    slot_E: jax.Array
    stacked: bool
    done: jax.Array | None = None
