"""How the tokens of a row are chosen, as one row of numbers that travels to its device.

Shape letters: B rows, K ids that are forbidden at first, F columns of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax

from moejax.inference.logits import Penalties
from moejax.inference.params import SamplingParams
from moejax.inference.sampling import RowSettings

__all__ = ["EMPTY_CHOICE", "RowChoice", "pack", "unpack"]

_MOST_FORBIDDEN = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowChoice:
    """How the tokens of each row are chosen: what stays the same while a text is continued.

    settings, penalties: arrays [B].
    prompt_B: int32, tokens of the prompt.
    ends_from_B: int32, from this length of the text on its ends may come.
    ends_BK: int32, the ids that may not come before; -1 is none.
    """

    settings: RowSettings
    penalties: Penalties
    prompt_B: Any
    ends_from_B: Any
    ends_BK: Any

    @classmethod
    def packed(
        cls, params: SamplingParams, seed: int, index: int, prompt_len: int, ends: Sequence[int]
    ) -> np.ndarray:
        """One row as int32 [F]; `ends` matters with `min_tokens` only, at most 128 ids."""
        ends_K = np.full(_MOST_FORBIDDEN, -1, np.int32)
        if params.min_tokens:
            ends_K[: len(ends)] = ends
        row = cls(
            RowSettings.of([(params, seed, index)]),
            Penalties.of([params]),
            np.array([prompt_len], np.int32),
            np.array([prompt_len + params.min_tokens], np.int32),
            ends_K[None],
        )
        return pack(row)[0]


EMPTY_CHOICE = RowChoice(
    RowSettings.of([None]),
    Penalties.of([None]),
    *(np.zeros(1, np.int32),) * 2,
    np.full((1, _MOST_FORBIDDEN), -1, np.int32),
)


def pack(tree: Any) -> np.ndarray:
    """Arrays [B] or [B, k] of four bytes an element, side by side: int32 [B, W]."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([a.reshape(len(a), -1).view(np.int32) for a in leaves], axis=1)


def unpack(packed_BW: jax.Array, like: Any) -> Any:
    """The inverse of `pack`, on a device; `like` has the dtypes and the shapes after B."""
    leaves, tree = jax.tree.flatten(like)
    found, at = [], 0
    for leaf in leaves:
        width = leaf[0].size
        piece = lax.bitcast_convert_type(packed_BW[:, at : at + width], leaf.dtype)
        found.append(piece.reshape(-1, *leaf.shape[1:]))
        at += width
    return jax.tree.unflatten(tree, found)
