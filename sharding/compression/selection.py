"""The k numbers of largest magnitude, found by their bits and without a sort.

G groups, B numbers of a group, k taken from each.
"""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float32, Int32

__all__ = ["largest"]

DIGIT = 2
"""Bits found in one pass over the numbers; a pass makes 2^DIGIT − 1 comparisons with each."""


def largest(x_GB: Float32[Array, "G B"], k: int) -> Int32[Array, "G k"]:
    """Positions of the k largest magnitudes of each group, ascending; of equal ones the first.

    Magnitudes of float32 are ordered as their bits are when read as integers. So the k-th largest
    is found digit by digit: a digit is the largest with which k numbers are not smaller. That
    takes 16 passes; then those above are taken, and of those equal to it as many as are missing.
    NaN counts as larger than everything: it is sent, and seen.

    Args:
        x_GB: the numbers.
        k: from 1 to B.
    """
    bits_GB = lax.bitcast_convert_type(jnp.abs(x_GB), jnp.int32)

    def one_digit(i: jax.Array, least_G: jax.Array) -> jax.Array:
        shift = jnp.int32(32 - DIGIT) - jnp.int32(DIGIT) * i
        digit_G = jnp.zeros_like(least_G)
        # A sum for each, not one over all: XLA fuses these with the comparison, and stores nothing.
        for digit in range(1, 1 << DIGIT):
            trial_G = least_G + (jnp.int32(digit) << shift)
            count_G = jnp.sum(bits_GB >= trial_G[:, None], axis=-1, dtype=jnp.int32)
            # The first digit has a bit that magnitudes lack: it overflows and is not meant.
            digit_G += ((trial_G > least_G) & (count_G >= k)).astype(jnp.int32)
        return least_G + (digit_G << shift)

    start = jnp.zeros(x_GB.shape[0], jnp.int32)
    kth_G = lax.fori_loop(0, 32 // DIGIT, one_digit, start)

    def places(bits_GB: jax.Array, kth_G1: jax.Array) -> jax.Array:
        above_GB, equal_GB = bits_GB > kth_G1, bits_GB == kth_G1
        missing_G1 = k - jnp.sum(above_GB, axis=-1, keepdims=True, dtype=jnp.int32)
        taken_GB = above_GB | (equal_GB & (_running(equal_GB) <= missing_G1))
        # The j-th that is taken is where the running count reaches j.
        wanted = jnp.arange(1, k + 1, dtype=jnp.int32)
        found = jax.vmap(lambda row: jnp.searchsorted(row, wanted))(_running(taken_GB))
        return found.astype(jnp.int32)

    # Magnitudes have no sign, so this is always so. But XLA does not know, and what enters a loop
    # or a branch lies in memory: the same bits. In a fusion of its own a sum could be computed
    # again and rounded another way, on CPUs behind an optimization_barrier too, and the k-th
    # largest would equal none.
    return lax.cond(
        jnp.all(kth_G >= 0),
        places,
        lambda *_: jnp.zeros((x_GB.shape[0], k), jnp.int32),
        bits_GB,
        kth_G[:, None],
    )


def _running(mask_GB: jax.Array) -> jax.Array:
    return jnp.cumsum(mask_GB, axis=-1, dtype=jnp.int32)
