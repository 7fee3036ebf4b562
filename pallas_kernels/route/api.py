"""Route: top-k of the router's scores, and the sorted layout of assignments.

Backends are tried in order; one that cannot serve a case raises NotImplementedError with the
reason. `explain_top_k` and `explain_sorted_places` say which was chosen and why others were not.
Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import backends
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.route import mosaic_gpu, reference

__all__ = ["BACKENDS", "explain_sorted_places", "explain_top_k", "sorted_places", "top_k"]

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
    refusal = _refusal(mosaic_gpu.top_k_refusal(tokens, experts, k, dtype))
    return backends.explain("top_k", BACKENDS, refusal)


def explain_sorted_places(rows: int, copies: int, groups: int) -> str:
    """One line: the backend that serves this shape, and why those before it do not."""
    refusal = _refusal(mosaic_gpu.sorted_places_refusal(rows, copies, groups))
    return backends.explain("sorted_places", BACKENDS, refusal)


def top_k(
    scores_TE: Float[Array, "T E"], k: int, *, backend: str | None = None
) -> Int32[Array, "T k"]:
    """Ids of the k best experts of each token, descending; of equal scores the lower id first.

    Args:
        scores_TE: scores; -inf for experts that must not be chosen while k others are left.
        k: at most E.
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        int32 [T, k], distinct ids in a row even where scores are -inf or NaN. No gradient.

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
        ValueError: k is more than E.
    """
    tokens, experts = scores_TE.shape
    if not 0 < k <= experts:
        raise ValueError(f"top_k: k={k} must lie between 1 and the {experts} experts")
    refusal = _refusal(mosaic_gpu.top_k_refusal(tokens, experts, k, scores_TE.dtype))
    scores_TE = lax.stop_gradient(scores_TE)
    if backends.choose("top_k", BACKENDS, backend, refusal) == "mosaic_gpu":
        return mosaic_gpu.top_k(scores_TE, k)
    return reference.top_k(scores_TE, k)


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
        ids_RJ: int32, the group of each assignment, at least 0; `groups` or more for none. The
            groups of a row are distinct.
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
    refusal = _refusal(mosaic_gpu.sorted_places_refusal(rows, copies, groups))
    chosen = backends.choose("sorted_places", BACKENDS, backend, refusal)
    module = mosaic_gpu if chosen == "mosaic_gpu" else reference
    return module.sorted_places(ids_RJ, groups=groups, alignment=alignment, places=places)
