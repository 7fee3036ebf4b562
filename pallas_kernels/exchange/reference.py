"""The exchange in plain JAX, on any platform: everything travels, buckets filled or not."""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp

__all__ = ["exchange_buckets", "exchange_counts", "push_rows"]


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


def push_rows(x_NW: jax.Array, entries_M: jax.Array, axis: str, tokens: int) -> jax.Array:
    """As `push.push_rows`; rows that nobody sent are NaN, or an integer's largest value.

    So who reads one of them finds out, on a CPU, too.

    Args:
        x_NW, entries_M, axis, tokens: as there.
    """
    devices, width = lax.axis_size(axis), x_NW.shape[1]
    rows = devices * tokens
    inside_M = (entries_M >= 0) & (entries_M < rows)
    sent_R = jnp.zeros((rows,), bool)
    sent_R = sent_R.at[jnp.where(inside_M, entries_M, rows)].set(True, mode="drop")
    inexact = jnp.issubdtype(x_NW.dtype, jnp.inexact)
    nothing = jnp.asarray(jnp.nan if inexact else jnp.iinfo(x_NW.dtype).max, x_NW.dtype)
    x_RW = jnp.tile(x_NW, (rows // x_NW.shape[0], 1))  # row r mod N
    x_GTW = jnp.where(sent_R[:, None], x_RW, nothing).reshape(devices, tokens, width)
    received = lax.all_to_all(x_GTW, axis, split_axis=0, concat_axis=0)
    return received.reshape(rows, width)
