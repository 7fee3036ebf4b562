"""What happens to logits beside drawing: penalties, forbidden ids, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from moejax.inference.params import SamplingParams
from moejax.model.embedding import PADDING_LOGIT

__all__ = ["NEVER", "Penalties", "forbid", "penalized", "top_logprobs"]

NEVER = PADDING_LOGIT / 10
"""A logit from here down is a forbidden id's."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalties:
    """The penalties of each row: arrays float32 [B]; see `SamplingParams`."""

    presence: Float32[Array, " B"]
    frequency: Float32[Array, " B"]
    repetition: Float32[Array, " B"]

    @classmethod
    def of(cls, rows: Sequence[SamplingParams | None]) -> Penalties:
        """Numpy arrays from the params of each row; None is a row without penalties."""
        filled = [row or SamplingParams() for row in rows]
        arrays: list[Any] = [
            np.array([p.presence_penalty for p in filled], np.float32),
            np.array([p.frequency_penalty for p in filled], np.float32),
            np.array([p.repetition_penalty for p in filled], np.float32),
        ]
        return cls(*arrays)


def penalized(
    logits_BV: Float32[Array, "B V"],
    tokens_BL: Int32[Array, "B L"],
    prompt_lengths_B: Int32[Array, " B"],
    lengths_B: Int32[Array, " B"],
    penalties: Penalties,
) -> Float32[Array, "B V"]:
    """Logits after the penalties for tokens that came before, with the meanings of vLLM.

    First the repetition penalty, which counts the prompt too, then frequency and presence, which
    count generated tokens alone. Forbidden ids stay forbidden.

    Args:
        logits_BV: float32.
        tokens_BL: int32, the prompt, then what was generated; what follows is not read.
        prompt_lengths_B: int32.
        lengths_B: int32, of prompt and generated tokens together, at most L.
        penalties: of each row.
    """
    neutral_B = (penalties.presence == 0) & (penalties.frequency == 0) & (penalties.repetition == 1)

    rows, size = logits_BV.shape
    place_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)
    there_BL = place_L < lengths_B[:, None]
    made_BL = there_BL & (place_L >= prompt_lengths_B[:, None])
    row_B1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
    target_BL = jnp.where(there_BL, tokens_BL, size)  # out of range: dropped

    def count(mask_BL: jax.Array) -> jax.Array:
        zeros_BV = jnp.zeros((rows, size), jnp.int32)
        return zeros_BV.at[row_B1, target_BL].add(mask_BL.astype(jnp.int32), mode="drop")

    made_BV, seen_BV = count(made_BL), count(there_BL) > 0
    factor_B1 = penalties.repetition[:, None]
    out_BV = jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
    out_BV = jnp.where(seen_BV, out_BV, logits_BV)
    out_BV -= penalties.frequency[:, None] * made_BV.astype(jnp.float32)
    out_BV -= penalties.presence[:, None] * (made_BV > 0).astype(jnp.float32)
    # An extreme factor must make a logit neither infinite nor forbidden.
    out_BV = jnp.clip(out_BV, NEVER / 10, -NEVER / 10)
    return jnp.where((logits_BV <= NEVER) | neutral_B[:, None], logits_BV, out_BV)


def forbid(
    logits_BV: Float32[Array, "B V"],
    ids: Int32[Array, " K"] | Int32[Array, "B K"],
    active_B: Bool[Array, " B"],
) -> Float32[Array, "B V"]:
    """Logits with some ids forbidden in the rows that are active.

    Args:
        logits_BV: float32.
        ids: int32, of all rows or of each; an id outside of the vocabulary, such as -1, is none.
        active_B: bool.
    """
    rows, size = logits_BV.shape
    valid = (ids >= 0) & (ids < size) & active_B[:, None]
    target_BK = jnp.where(valid, ids, size)  # out of range: dropped
    row_B1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return logits_BV.at[row_B1, target_BK].set(jnp.float32(PADDING_LOGIT), mode="drop")


def top_logprobs(
    logits_BV: Float32[Array, "B V"], token_B: Int32[Array, " B"], k: int
) -> tuple[Float32[Array, " B"], Int32[Array, "B k"], Float32[Array, "B k"]]:
    """Log-probabilities of tokens and of the most probable ones.

    Give the logits as they left the model, before penalties and temperature: the `raw_logprobs` of
    vLLM.

    Args:
        logits_BV: float32.
        token_B: int32, the token of each row.
        k: how many of the most probable; 0: none.

    Returns:
        natural logarithms float32 [B] of `token_B`, the most probable ids int32 [B, k], of equals
        the lowest first, and their logarithms float32 [B, k].
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    own_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]
    best_Bk, ids_Bk = lax.top_k(logprobs_BV, k)
    return own_B, ids_Bk.astype(jnp.int32), best_Bk
