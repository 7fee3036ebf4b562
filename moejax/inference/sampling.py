"""Choosing the next token from logits, each row by settings of its own.

Numbers are drawn for (seed, index, position): the text of a row depends neither on the other rows
of its batch nor on the mesh. Nothing is sorted. What survives the filters is always a beginning of
the ids sorted by probability, so a filter is a threshold, and a search over the bits of a float32
finds it in 19 passes over the vocabulary; of equals the lowest ids come first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from moejax.errors import UserError
from moejax.inference.logits import NEVER
from moejax.inference.params import SamplingParams

__all__ = ["RowSettings", "SamplingConfig", "sample"]

_LOWEST_KEY = -(2**31) + 1

Row = tuple[SamplingParams, int, int]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSettings:
    """How the token of each row is drawn: arrays [B]; see `SamplingParams`.

    temperature: float32, 0 for the most probable token. top_k: int32, 0 for all.
    top_p, min_p: float32. seed: uint32. index: int32, which of the texts of one request.
    """

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    seed: UInt32[Array, " B"]
    index: Int32[Array, " B"]

    @classmethod
    def of(cls, rows: Sequence[Row | None]) -> RowSettings:
        """Numpy arrays from (params, seed, index) of each row; None is a greedy row.

        The seed may have 64 bits. One below 2³² is taken as it is, others are hashed.
        """
        filled = [row or _GREEDY_ROW for row in rows]
        params = [row[0] for row in filled]
        arrays: list[Any] = [
            np.array([_temperature(p) for p in params], np.float32),
            np.array([p.top_k for p in params], np.int32),
            np.array([_mass(p) for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
            np.array([_seed32(seed) for _, seed, _ in filled], np.uint32),
            np.array([index for _, _, index in filled], np.int32),
        ]
        return cls(*arrays)


_GREEDY_ROW: Row = (SamplingParams(temperature=0), 0, 0)


def _temperature(params: SamplingParams) -> float:
    # A float64 that float32 would round to 0 still draws.
    smallest = float(np.finfo(np.float32).tiny)
    return max(params.temperature, smallest) if params.temperature else 0.0


def _mass(params: SamplingParams) -> float:
    return max(params.top_p, float(np.finfo(np.float32).tiny))


def _seed32(seed: int) -> int:
    if 0 <= seed < 2**32:
        return seed
    return int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])


@dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of a `Generator` are drawn: see `SamplingParams`, but greedy by default.

    seed: of the random numbers, below 2³².
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "must be 0 (greedy) or a greater finite number",
            ),
            "top_k": (0 <= self.top_k < 2**31, "must be 0 (all tokens) or a number of tokens"),
            "top_p": (0 < self.top_p <= 1, "must be greater than 0 and at most 1 (all tokens)"),
            "min_p": (0 <= self.min_p <= 1, "must lie between 0 (all tokens) and 1"),
            "seed": (0 <= self.seed < 2**32, "must lie between 0 and 4294967295"),
        }
        for name, (fine, rule) in rules.items():
            if not fine:
                raise UserError(f"{name}={getattr(self, name)}: {rule}")


def sample(
    logits_BV: Float32[Array, "B V"],
    positions_B: Int32[Array, " B"],
    settings: RowSettings,
    *,
    draws: bool = True,
    filters: bool = True,
) -> Int32[Array, " B"]:
    """Draws one token for each row.

    Args:
        logits_BV: float32; ids that must not come have -1e30.
        positions_B: int32, the position in its text that the token will have.
        settings: of each row.
        draws: whether any row has a temperature; False takes the most probable token of all.
        filters: whether any row has `top_k` or `top_p`; False does not look at them.

    Returns:
        int32 [B]. Of equal logits the lowest id counts as the more probable.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if not draws:
        return greedy_B
    draws_B = settings.temperature > 0
    drawn_B = _draw(logits_BV, positions_B, settings, draws_B, filters=filters)
    return jnp.where(draws_B, drawn_B, greedy_B)


def _draw(
    logits_BV: jax.Array,
    positions_B: jax.Array,
    settings: RowSettings,
    draws_B: jax.Array,
    *,
    filters: bool,
) -> jax.Array:
    size = logits_BV.shape[-1]
    # The largest is subtracted first: dividing by a tiny temperature may overflow.
    scaled_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = scaled_BV / jnp.where(draws_B, settings.temperature, 1.0)[:, None]
    weight_BV = jnp.exp(scaled_BV)  # the largest is exp(0)
    kept_BV = (weight_BV >= settings.min_p[:, None]) & (logits_BV > NEVER)

    if filters:
        kept_BV = _filtered(scaled_BV, weight_BV, kept_BV, settings, draws_B)

    def noise(seed: jax.Array, index: jax.Array, position: jax.Array) -> jax.Array:
        # Of another generator than this the numbers would depend on the other rows.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
        return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)

    noise_BV = jax.vmap(noise)(settings.seed, settings.index, positions_B)
    chosen_B = jnp.argmax(jnp.where(kept_BV, scaled_BV + noise_BV, -jnp.inf), axis=-1)
    return chosen_B.astype(jnp.int32)


def _filtered(
    scaled_BV: jax.Array,
    weight_BV: jax.Array,
    kept_BV: jax.Array,
    settings: RowSettings,
    draws_B: jax.Array,
) -> jax.Array:
    """What `top_k` and then `top_p` leave of the ids that are kept."""

    def beginning(weight_BV: jax.Array, limit_B: jax.Array) -> jax.Array:
        weight_BV = jnp.where(kept_BV, weight_BV, 0.0)
        return kept_BV & _beginning(scaled_BV, weight_BV, limit_B)

    by_rank_B = draws_B & (settings.top_k > 0) & (settings.top_k < scaled_BV.shape[-1])
    ranks_B = jnp.where(by_rank_B, settings.top_k.astype(jnp.float32), jnp.inf)
    kept_BV = beginning(jnp.ones_like(weight_BV), ranks_B)
    mass_B = jnp.sum(jnp.where(kept_BV, weight_BV, 0.0), axis=-1)
    by_mass_B = draws_B & (settings.top_p < 1)
    return beginning(weight_BV, jnp.where(by_mass_B, settings.top_p * mass_B, jnp.inf))


def _beginning(
    values_BV: Float32[Array, "B V"],
    weight_BV: Float32[Array, "B V"],
    limit_B: Float32[Array, " B"],
) -> Bool[Array, "B V"]:
    """Of the ids sorted by value, the largest first, those before which lies less than a limit.

    Args:
        values_BV: float32, none above 0; of equals the lowest id is first.
        weight_BV: float32, not negative, alike for equal values but 0 for ids that are not there.
        limit_B: float32, more than 0: an id stays while the weights before it sum to less.
    """
    bits_BV = lax.bitcast_convert_type(values_BV, jnp.int32)
    # The bits of a negative float, inverted below the sign, are ordered as it is.
    keys_BV = jnp.where(values_BV == 0, 0, bits_BV ^ jnp.int32(0x7FFFFFFF))
    # In memory: made again in another fusion, and rounded another way, none may equal the cut.
    keys_BV = lax.optimization_barrier(keys_BV)
    cut_B = _cut(keys_BV, weight_BV, limit_B, _LOWEST_KEY)[:, None]
    above_BV, ties_BV = keys_BV > cut_B, (keys_BV == cut_B) & (weight_BV > 0)

    # Of the last value's ids only so many as stay below the limit.
    rest_B = limit_B - jnp.sum(jnp.where(above_BV, weight_BV, 0.0), axis=-1)
    one_B = jnp.max(jnp.where(ties_BV, weight_BV, 0.0), axis=-1)
    room_B = jnp.maximum(jnp.ceil(rest_B / one_B), 1.0)
    place_BV = jnp.cumsum(ties_BV, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    return above_BV | (ties_BV & (place_BV <= room_B[:, None]))


def _cut(
    keys_BV: jax.Array, weight_BV: jax.Array, limit_B: jax.Array, lowest: int
) -> Int32[Array, " B"]:
    """The least key from `lowest` to 0 with weights of larger keys that sum to less than a limit.

    Sums of non-negative numbers in a fixed order are monotone even when rounded, so that the
    search is exact.
    """

    def narrow(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        quarter_B = (high_B - low_B) // 4
        # Three sums cost one reading of the vocabulary.
        for times in (1, 2, 3):
            middle_B = bounds[0] + times * quarter_B
            sums_B = jnp.sum(jnp.where(keys_BV > middle_B[:, None], weight_BV, 0.0), axis=-1)
            below_B = sums_B < limit_B
            low_B = jnp.where(below_B, low_B, middle_B + 1)
            high_B = jnp.where(below_B, jnp.minimum(high_B, middle_B), high_B)
        return low_B, high_B

    rows = keys_BV.shape[:1]
    bounds = (jnp.full(rows, lowest, jnp.int32), jnp.zeros(rows, jnp.int32))
    rounds, width = 0, -lowest
    while width:  # most that can be left: the last part, with the remainder of the division
        rounds, width = rounds + 1, min(width // 4 + 2, width - 1)
    return lax.fori_loop(0, rounds, narrow, bounds)[1]
