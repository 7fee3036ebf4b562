"""Route in plain JAX: exact, on any platform."""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp

__all__ = ["sorted_places", "top_k"]


def top_k(
    scores_TE: jax.Array, values_TE: jax.Array, k: int, *, softmax: bool
) -> tuple[jax.Array, jax.Array]:
    """Ids of the k best experts, descending, the lower id first among equal scores; their values.

    Args:
        scores_TE: float.
        values_TE: float.
        k: at most E.
        softmax: of the chosen values, instead of themselves.

    Returns:
        int32 [T, k], and of the values' dtype [T, k].
    """
    # lax.top_k orders -0.0 below 0.0; they are equal scores.
    scores_TE = jnp.where(scores_TE == 0, jnp.zeros_like(scores_TE), scores_TE)
    ids_Tk = lax.top_k(scores_TE, k)[1].astype(jnp.int32)
    chosen_Tk = jnp.take_along_axis(values_TE, ids_Tk, axis=1, mode="promise_in_bounds")
    return ids_Tk, jax.nn.softmax(chosen_Tk, axis=-1) if softmax else chosen_Tk


def sorted_places(
    ids_RJ: jax.Array, *, groups: int, alignment: int, places: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Places for assignments, sorted by group, each group padded to the alignment; by sorting.

    Args:
        ids_RJ: int32, the group of each assignment; `groups` or more for none.
        groups: G.
        alignment: what each group's size is a multiple of.
        places: M, room for all groups.

    Returns:
        int32 [R, J], the place of each assignment, M for none; int32 [G], the groups' sizes with
        padding; int32 [M], the flat assignment r·J + j at each place, R·J for none.
    """
    id_A = ids_RJ.reshape(-1)
    order_A = jnp.argsort(id_A, stable=True).astype(jnp.int32)
    sorted_A = id_A[order_A]
    counts_G = jnp.zeros((groups,), jnp.int32).at[id_A].add(1, mode="drop")
    sizes_G = -(-counts_G // alignment) * alignment
    shift_G = (jnp.cumsum(sizes_G) - sizes_G) - (jnp.cumsum(counts_G) - counts_G)
    place_A = jnp.arange(id_A.size, dtype=jnp.int32) + shift_G[jnp.minimum(sorted_A, groups - 1)]
    place_A = jnp.where(sorted_A < groups, place_A, places)
    place_A = jnp.zeros_like(id_A).at[order_A].set(place_A)
    copy_M = jnp.full((places,), id_A.size, jnp.int32)
    copy_M = copy_M.at[place_A].set(jnp.arange(id_A.size, dtype=jnp.int32), mode="drop")
    return place_A.reshape(ids_RJ.shape), sizes_G, copy_M
