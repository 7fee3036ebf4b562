"""Route: top-k of the router's scores, and the sorted layout of assignments.

Backends are tried in order; one that cannot serve a case raises NotImplementedError with the
reason. The functions named `explain_…` say which was chosen and why others were not. No gradient
passes through a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import backends
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.hopper.tiles import ROWS, TileMap, tile_map
from pallas_kernels.route import block_layout, grid_layout, reference, warp_top_k

__all__ = [
    "BACKENDS",
    "explain_sorted_places",
    "explain_sorted_tiles",
    "explain_top_k",
    "sorted_places",
    "sorted_tiles",
    "top_k",
]

BACKENDS = ("mosaic_gpu", "reference")


def _refusal(shape_refusal: str | None) -> Callable[[str, bool], str | None]:
    """What the kernels refuse: a shape, or the device."""

    def refusal(backend: str, forced: bool) -> str | None:
        if backend != "mosaic_gpu":
            return None
        return shape_refusal or hopper_refusal(jnp.bfloat16, forced=forced)

    return refusal


def explain_top_k(tokens: int, experts: int, k: int, dtype: Any = jnp.float32) -> str:
    """One line: the backend that serves this shape, and why those before it do not."""
    refusal = _refusal(warp_top_k.refusal(tokens, experts, k, dtype))
    return backends.explain("top_k", BACKENDS, refusal)


def explain_sorted_places(rows: int, copies: int, groups: int) -> str:
    """One line: the backend that serves this shape, and why those before it do not."""
    refusal = _refusal(grid_layout.refusal(rows, copies, groups))
    return backends.explain("sorted_places", BACKENDS, refusal)


def explain_sorted_tiles(rows: int, copies: int, groups: int, places: int) -> str:
    """One line: what lays the assignments out, and why not something faster."""
    refusal = _refusal(block_layout.refusal(rows, copies, groups, places))
    line = backends.explain("sorted_tiles", BACKENDS, refusal)
    if refusal("mosaic_gpu", False) is None:
        return line
    return f"{line}; {explain_sorted_places(rows, copies, groups)}"


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _chosen(
    values_TE: jax.Array, ids_Tk: jax.Array, chosen_Tk: jax.Array, softmax: bool
) -> jax.Array:
    """The chosen values or their softmax, which are known; the gradient goes to the values."""
    return chosen_Tk


@_chosen.defjvp
def _chosen_jvp(softmax, primals, tangents):
    chosen_Tk = _chosen(*primals, softmax)  # as a function of the values, for second derivatives
    ids_Tk = primals[1]
    rows = jnp.arange(ids_Tk.shape[0], dtype=jnp.int32)[:, None]
    # Ids are distinct within a row: the transpose adds in any order, on a GPU fast and
    # deterministic.
    tangent_Tk = tangents[0].at[rows, ids_Tk].get(unique_indices=True, mode="promise_in_bounds")
    if softmax:
        mean_T1 = jnp.sum(chosen_Tk * tangent_Tk, axis=-1, keepdims=True)
        tangent_Tk = chosen_Tk * (tangent_Tk - mean_T1)
    return chosen_Tk, tangent_Tk


def top_k(
    scores_TE: Float[Array, "T E"],
    k: int,
    *,
    values_TE: Float32[Array, "T E"] | None = None,
    softmax: bool = False,
    backend: str | None = None,
) -> tuple[Int32[Array, "T k"], Float[Array, "T k"]]:
    """The k best experts of each token, descending; of equal scores the lower id first.

    Args:
        scores_TE: scores; -inf for experts that must not be chosen while k others are left.
        k: at most E.
        values_TE: what is returned of the chosen; None: the scores.
        softmax: returns the softmax of the chosen values instead of themselves.
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        int32 ids [T, k], distinct in a row even where scores are -inf or NaN; their values [T, k],
        or the softmax of these. Gradients pass to the values, not through the choice.

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
        ValueError: k is more than E.
    """
    tokens, experts = scores_TE.shape
    if not 0 < k <= experts:
        raise ValueError(f"top_k: k={k} must lie between 1 and the {experts} experts")
    values_TE = scores_TE if values_TE is None else values_TE
    refusal = _refusal(warp_top_k.refusal(tokens, experts, k, scores_TE.dtype, values_TE.dtype))
    name = backends.choose("top_k", BACKENDS, backend, refusal)
    function = warp_top_k.top_k if name == "mosaic_gpu" else reference.top_k
    fixed = lax.stop_gradient((scores_TE, values_TE))
    ids, chosen = function(*fixed, k, softmax=softmax)
    return ids, _chosen(values_TE, ids, chosen, softmax)


def sorted_places(
    ids_RJ: Int32[Array, "R J"],
    *,
    groups: int,
    alignment: int,
    places: int,
    backend: str | None = None,
) -> tuple[Int32[Array, "R J"], Int32[Array, " G"], Int32[Array, " M"]]:
    """Places for assignments, sorted by group, each group padded to a multiple of the alignment.

    Within a group, assignments keep the order of r·J + j. All backends give the same bits.

    Args:
        ids_RJ: int32, the group of each assignment, from 0 to G − 1; others for none. The groups
            of a row are distinct.
        groups: G.
        alignment: what each group's size is a multiple of.
        places: M, room for all groups with their padding: A assignments to at most B groups that
            are not empty need no more than A + B · (alignment − 1).
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        int32 [R, J], the place of each assignment, M for none; int32 [G], the groups' sizes with
        padding; int32 [M], the flat assignment r·J + j at each place, R·J for none.

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
    """
    rows, copies = ids_RJ.shape
    refusal = _refusal(grid_layout.refusal(rows, copies, groups))
    chosen = backends.choose("sorted_places", BACKENDS, backend, refusal)
    module = grid_layout if chosen == "mosaic_gpu" else reference
    ids_RJ = jnp.where(ids_RJ < 0, groups, ids_RJ)
    return module.sorted_places(ids_RJ, groups=groups, alignment=alignment, places=places)


def sorted_tiles(
    ids_RJ: Int32[Array, "R J"], *, groups: int, places: int, backend: str | None = None
) -> tuple[Int32[Array, "R J"], Int32[Array, " G"], Int32[Array, " M"], TileMap]:
    """`sorted_places` for the Hopper kernels, with their list of tiles.

    Args:
        ids_RJ: as for `sorted_places`.
        groups: G.
        places: M, as for `sorted_places` with the alignment `tiles.ROWS`.
        backend: `mosaic_gpu` lays few assignments out by one kernel, `reference` takes whatever
            `sorted_places` takes; None tries them in order.

    Returns:
        Those of `sorted_places`, and the tiles.

    Raises:
        NotImplementedError: the backend cannot serve this.
    """
    rows, copies = ids_RJ.shape
    refusal = _refusal(block_layout.refusal(rows, copies, groups, places))
    if backends.choose("sorted_tiles", BACKENDS, backend, refusal) == "mosaic_gpu":
        return block_layout.layout(ids_RJ, groups=groups, places=places)
    place_RJ, sizes_G, copy_M = sorted_places(ids_RJ, groups=groups, alignment=ROWS, places=places)
    return place_RJ, sizes_G, copy_M, tile_map(sizes_G, places, copy_M < ids_RJ.size)
