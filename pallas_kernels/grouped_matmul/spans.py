"""Where the rows of each group lie."""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp

__all__ = ["group_spans"]


def group_spans(
    group_sizes: jax.Array, groups: int, group_offset: jax.Array | int | None, rows: int
) -> jax.Array:
    """First row, and the row after the last, of some groups that follow each other.

    Args:
        group_sizes: int32, of all groups; their rows follow each other from row 0 on.
        groups: G, of those that are wanted.
        group_offset: the first of them; None: 0.
        rows: no group ends after these, whatever the sizes say.

    Returns:
        int32 [2, G].
    """
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    spans = jnp.minimum(jnp.stack([ends - group_sizes.astype(jnp.int32), ends]), rows)
    return lax.dynamic_slice_in_dim(spans, 0 if group_offset is None else group_offset, groups, 1)
