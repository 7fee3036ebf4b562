"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p.

What survives the three filters is always a beginning of the ids sorted by probability, so one sort
serves them all. Numbers are drawn for (seed, request, position): the text of a request depends
neither on the other requests of its batch nor on the mesh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float32, Int32

from moejax.errors import UserError

__all__ = ["SamplingArrays", "SamplingConfig", "sample"]


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. The filters apply to the probabilities after temperature, in order.

    temperature: divides the logits; 0 takes the most probable token, always.
    top_k: only the k most probable tokens; 0: all (arXiv 1805.04833).
    top_p: only the fewest most probable tokens whose mass, among those left by `top_k`, is at
        least p (arXiv 1904.09751).
    min_p: only tokens at least this times as probable as the most probable (arXiv 2407.01082).
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

    def arrays(self) -> SamplingArrays:
        """The settings as scalars for `sample`: another setting compiles nothing anew."""
        values: list[Any] = [
            np.float32(self.temperature),
            np.int32(self.top_k),
            np.float32(self.top_p),
            np.float32(self.min_p),
            np.uint32(self.seed),
        ]
        return SamplingArrays(*values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """A `SamplingConfig` as arrays: float32, int32, float32, float32, uint32; each []."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array


def sample(
    logits_BV: Float32[Array, "B V"],
    requests_B: Int32[Array, " B"],
    positions_B: Int32[Array, " B"],
    settings: SamplingArrays,
) -> Int32[Array, " B"]:
    """Draws one token for each row.

    Args:
        logits_BV: float32; ids that must not come have -1e30.
        requests_B: int32, the number that tells a request from others with the same seed.
        positions_B: int32, the position in its text that the token will have.
        settings: see `SamplingConfig`.

    Returns:
        int32 [B]. Of equal logits the lowest id counts as the more probable.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        return _draw(logits_BV, requests_B, positions_B, settings)

    return lax.cond(jnp.asarray(settings.temperature) > 0, draw, lambda: greedy_B)


def _draw(
    logits_BV: jax.Array,
    requests_B: jax.Array,
    positions_B: jax.Array,
    settings: SamplingArrays,
) -> jax.Array:
    size = logits_BV.shape[-1]
    # The largest is subtracted first: dividing by a tiny temperature may overflow.
    shifted_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    shifted_BV = shifted_BV / settings.temperature
    ids_BV = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), logits_BV.shape)
    descending_BV, ids_BV = lax.sort((-shifted_BV, ids_BV), num_keys=1, is_stable=True)
    sorted_BV = -descending_BV

    ranks_V = jnp.arange(size, dtype=jnp.int32)
    kept_BV = (ranks_V < settings.top_k) | (jnp.asarray(settings.top_k) == 0)
    weight_BV = jnp.where(kept_BV, jnp.exp(sorted_BV), 0.0)
    mass_BV = jnp.cumsum(weight_BV, axis=-1)
    before_BV = mass_BV - weight_BV
    # A sum that rounding left below 1 must not drop the last tokens of `top_p=1`.
    within_BV = before_BV < settings.top_p * mass_BV[:, -1:]
    kept_BV &= within_BV | (jnp.asarray(settings.top_p) >= 1)
    kept_BV &= jnp.exp(sorted_BV) >= settings.min_p  # the largest is exp(0)
    kept_BV |= ranks_V == 0

    def noise(request: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(settings.seed), request)
        return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)

    # One number for each id, not for each rank: rounding that swaps two ranks swaps no others.
    noise_BV = jnp.take_along_axis(jax.vmap(noise)(requests_B, positions_B), ids_BV, axis=-1)
    chosen_B = jnp.argmax(jnp.where(kept_BV, sorted_BV + noise_BV, -jnp.inf), axis=-1)
    return jnp.take_along_axis(ids_BV, chosen_B[:, None], axis=-1)[:, 0]
