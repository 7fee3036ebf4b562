"""The exchange in plain JAX, on any platform: whole buckets travel, filled or not."""

from __future__ import annotations

import jax
from jax import lax

__all__ = ["exchange_buckets", "exchange_counts"]


def exchange_counts(counts_G: jax.Array, axis: str) -> jax.Array:
    """How many rows come from each device; int32 [G].

    Args:
        counts_G: int32, how many go to each device.
        axis: mesh axis of size G.
    """
    return lax.all_to_all(counts_G, axis, split_axis=0, concat_axis=0)


def exchange_buckets(
    rows_GCW: jax.Array, counts_G: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    """As `api.exchange_buckets`, but received rows from the count on hold what the source had.

    Args:
        rows_GCW: of any dtype.
        counts_G: int32, from 0 to C.
        axis: mesh axis of size G.
    """
    received = lax.all_to_all(rows_GCW, axis, split_axis=0, concat_axis=0)
    return received, exchange_counts(counts_G, axis)
