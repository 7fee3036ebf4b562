"""From logits to tokens, compiled apart from the model: few small programs for all that is asked.

A step's program ends with logits. What follows depends on what its rows ask for, which the host
knows: so there is a program for each `Level`, and none of them has to decide on the device. A GPU
would have to ask the host for each decision, and wait for it with the next step.

Shape letters: B rows, V vocabulary, M tokens that a slot's history holds, k most probable ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from moejax.inference.logits import forbid, penalized, top_logprobs
from moejax.inference.params import SamplingParams
from moejax.inference.row_choice import RowChoice
from moejax.inference.sampling import sample
from moejax.model.embedding import PADDING_LOGIT

__all__ = ["Drawn", "Level", "choose", "level_of"]


class Level(IntEnum):
    """What is done to the logits of a step; each does all of those before it.

    GREEDY takes the most probable token; DRAWN draws one, `min_p` included; FILTERED heeds `top_k`
    and `top_p`; ALL has penalties, forbidden ids and log-probabilities.
    """

    GREEDY = 0
    DRAWN = 1
    FILTERED = 2
    ALL = 3


def level_of(rows: Iterable[SamplingParams]) -> Level:
    """The least level that serves these rows."""
    level = Level.GREEDY
    for params in rows:
        if params.has_penalties or params.min_tokens or params.logprobs is not None:
            return Level.ALL
        if params.temperature:
            filtered = params.top_k > 0 or params.top_p < 1
            level = max(level, Level.FILTERED if filtered else Level.DRAWN)
    return level


@dataclass(frozen=True)
class Drawn:
    """What a step will have drawn, packed as `choose` says; `top` is k."""

    packed: jax.Array
    top: int

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Waits for the step.

        Returns:
            the tokens int32 [B], their log-probabilities float32 [B], the most probable ids int32
            [B, k] and theirs float32 [B, k]; zeros below `Level.ALL`.
        """
        packed, k = np.asarray(self.packed), self.top
        if packed.shape[1] == 1:
            packed = np.pad(packed, ((0, 0), (0, 1 + 2 * k)))
        floats = packed.view(np.float32)
        return packed[:, 0], floats[:, 1], packed[:, 2 : 2 + k], floats[:, 2 + k :]


def choose(
    level: Level,
    logits_BV: jax.Array,
    length_B: jax.Array,
    slot_B: jax.Array,
    choice: RowChoice,
    history_RM: jax.Array,
    *,
    num_ids: int,
    top: int,
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row.

    Args:
        level: what may be asked for.
        logits_BV: float32, as the model gives them.
        length_B: int32, tokens of the row's text so far.
        slot_B: int32, of the row in `history_RM`.
        choice: of each row.
        history_RM: int32, the texts of all slots; read at `Level.ALL`.
        num_ids: ids from here on are never chosen.
        top: k.

    Returns:
        int32 [B], and the packed int32 [B, 1] (tokens) or, at `Level.ALL`, [B, 2 + 2k]: tokens,
        log-probabilities, the most probable ids, theirs.
    """
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    logits_BV = jnp.where(ids_V < num_ids, logits_BV, jnp.float32(PADDING_LOGIT))
    changed_BV = logits_BV
    if level == Level.ALL:
        texts_BM = history_RM.at[slot_B].get(mode="fill", fill_value=0)
        changed_BV = penalized(logits_BV, texts_BM, choice.prompt_B, length_B, choice.penalties)
        changed_BV = forbid(changed_BV, choice.ends_BK, length_B < choice.ends_from_B)
    token_B = sample(
        changed_BV,
        length_B,
        choice.settings,
        draws=level >= Level.DRAWN,
        filters=level >= Level.FILTERED,
    )
    if level < Level.ALL:
        return token_B, token_B[:, None]
    logprob_B, ids_Bk, logprobs_Bk = top_logprobs(logits_BV, token_B, top)
    parts = (token_B[:, None], logprob_B[:, None], ids_Bk, logprobs_Bk)
    bits = [lax.bitcast_convert_type(part, jnp.int32) for part in parts]
    return token_B, jnp.concatenate(bits, axis=1)
