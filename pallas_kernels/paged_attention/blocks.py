"""Tables whose pages are read by blocks."""

from __future__ import annotations

import jax
from jax import numpy as jnp

__all__ = ["widen_tables"]


def widen_tables(tables_BN: jax.Array, multiple: int) -> jax.Array:
    """Tables of a multiple of so many pages; what is added is the row's first page again."""
    missing = -tables_BN.shape[1] % multiple
    if not missing:
        return tables_BN
    added_BN = jnp.broadcast_to(tables_BN[:, :1], (tables_BN.shape[0], missing))
    return jnp.concatenate([tables_BN, added_BN], axis=1)
