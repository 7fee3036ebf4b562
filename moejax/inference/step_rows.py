"""What the host says of a step's rows, in two int32 arrays: a transfer for each small array would
take longer than a small step.

Shape letters: B rows (of all devices on the host, of this one inside the shard_map), S tokens of a
row, N pages of its table, W and F columns of packed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Int32

from moejax.inference.drawing import Level
from moejax.inference.row_choice import EMPTY_CHOICE, RowChoice, pack, unpack
from moejax.inference.scheduler import Plan
from moejax.inference.shapes import Shape

__all__ = [
    "COLUMNS",
    "StepRows",
    "choices_of",
    "pages_and_tokens",
    "rows_of",
    "step_tokens",
    "write_rows",
]

_OWN = 3  # count, length, slot
_NO_CHOICE_1F = pack(EMPTY_CHOICE)

COLUMNS: int = _OWN + _NO_CHOICE_1F.shape[1]
"""F, of `StepRows.rows_BF`."""


@dataclass(frozen=True)
class StepRows:
    """A step's rows, for the devices.

    rows_BF: int32, tokens that a row appends, tokens that it has, the slot of its text if it draws,
        and what its text asks for.
    where_BW: int32, its pages, −1 for none, and its tokens in steps with prompts.
    level: what the rows need of drawing.
    """

    rows_BF: np.ndarray
    where_BW: np.ndarray
    level: Level


def write_rows(plan: Plan, devices: int, slots: int) -> StepRows:
    """Packs a plan.

    Args:
        plan: of a step.
        devices: that rows are split over.
        slots: texts of each device; this number stands for no slot.
    """
    shape = plan.shape
    count = devices * shape.rows
    own_BW = np.zeros((count, _OWN), np.int32)
    own_BW[:, 2] = slots  # none
    choice_BF = np.repeat(_NO_CHOICE_1F, count, axis=0)
    table_BN = np.full((count, shape.pages), -1, np.int32)
    tokens_BS = np.zeros((count, shape.tokens), np.int32)
    level = Level.GREEDY
    for device, works in enumerate(plan.rows):
        for row, work in enumerate(works, device * shape.rows):
            text = work.text
            own_BW[row] = work.count, work.start, text.slot if work.draws else slots
            if work.draws:
                level = max(level, text.level)
            choice_BF[row] = text.row
            pages = text.pages[: shape.pages]
            table_BN[row, : len(pages)] = pages
            if shape.tokens:
                piece = text.tokens[work.start : work.start + work.count]
                tokens_BS[row, : work.count] = piece
    rows_BF = np.concatenate([own_BW, choice_BF], axis=1)
    return StepRows(rows_BF, np.concatenate([table_BN, tokens_BS], axis=1), level)


def rows_of(rows_BF: Int32[Array, "B F"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens appended, tokens before, slots; int32 [B] each."""
    return rows_BF[:, 0], rows_BF[:, 1], rows_BF[:, 2]


def choices_of(rows_BF: Int32[Array, "B F"]) -> RowChoice:
    """What the rows' texts ask for."""
    return unpack(rows_BF[:, _OWN:], EMPTY_CHOICE)


def pages_and_tokens(
    where_BW: Int32[Array, "B W"], shape: Shape
) -> tuple[jax.Array, jax.Array | None]:
    """Tables [B, N]; tokens [B, S], None where each row appends the one drawn last."""
    tokens_BS = where_BW[:, shape.pages :] if shape.tokens else None
    return where_BW[:, : shape.pages], tokens_BS


def step_tokens(
    tokens_BS: jax.Array | None, history_RM: jax.Array, rows_BF: Int32[Array, "B F"]
) -> Int32[Array, "B S"]:
    """The tokens that a step appends: those it was given, or the one drawn last for each row.

    The host may not know the latter yet.

    Args:
        tokens_BS: as from `pages_and_tokens`.
        history_RM: int32, the texts of all slots.
        rows_BF: the step's rows.
    """
    if tokens_BS is not None:
        return tokens_BS
    _, length_B, slot_B = rows_of(rows_BF)
    return history_RM.at[slot_B, length_B].get(mode="fill", fill_value=0)[:, None]
