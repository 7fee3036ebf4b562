"""Rows through their experts: gather, two grouped products, activation, weighted sum.

Backends are tried in order, as for the grouped matmul; `explain` says which one serves.

Shape letters: R rows, J assignments of a row, A places (assignments sorted by slot, each slot's
padded), S slots, D model width, N input projections, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import backends
from pallas_kernels.fused_experts import (
    gathered,
    grouped,
    mosaic_gpu,
    mosaic_tpu,
    reference,
    weighted_sum,
)
from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.hopper.config import check_reserve
from pallas_kernels.hopper.tiles import ROWS, TileMap, tile_map

__all__ = [
    "BACKENDS",
    "ROW_ALIGNMENT",
    "Case",
    "Sizing",
    "backward",
    "check_assignments",
    "explain",
    "fused_experts",
    "options_of",
    "refusal",
    "rows_of",
    "sum_places",
]

BACKENDS = ("mosaic_gpu", "mosaic_tpu", "grouped", "reference")
_KERNELS: dict[str, Any] = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
ROW_ALIGNMENT = ROWS
"""The multiple of rows to which slots must be padded for the kernels."""

WIDE = 4096  # hidden width from which rows are gathered before the products
FEW_COPIES = 2**14  # assignments up to which the sum over a row's is unrolled
FEW_ROWS = 64  # assignments a slot, on average, up to which tiles are taken to be nearly empty


@dataclass(frozen=True)
class Case:
    """What a backend must know to say whether it serves: D, H, the activation, dtype and bias.

    d_out: columns of the outputs; None: D.
    """

    d_model: int
    hidden: int
    activation: str
    dtype: Any
    bias: bool = False
    d_out: int | None = None


class Sizing(NamedTuple):
    """What sizes depend on: the most assignments there are, multiprocessors to leave free."""

    assignments: int
    reserve_sms: int


def refusal(backend: str, case: Case, *, forced: bool = False) -> str | None:
    """Why a backend cannot serve; None if it can.

    Args:
        backend: one of `BACKENDS`.
        case: what is asked.
        forced: do not look at the device.
    """
    if case.activation not in ACTIVATIONS:
        return f"activation {case.activation!r} is none of {', '.join(ACTIVATIONS)}"
    if backend not in _KERNELS:
        return None
    if case.bias:
        return "the experts have biases"
    sizes = {"d_model": case.d_model, "hidden": case.hidden}
    if case.d_out is not None:
        sizes["d_out"] = case.d_out
    return backends.kernel_refusal(backend, sizes, case.dtype, forced=forced)


def explain(case: Case) -> str:
    """One line: the backend that serves this layer, and why not those before it."""
    return backends.explain(
        "fused_experts", BACKENDS, lambda name, forced: refusal(name, case, forced=forced)
    )


def sum_places(rows_AD, weights_RJ, place_RJ, dtype, backend):
    """Each row's places, weighted and summed in float32; no gradient."""
    if place_RJ.size <= FEW_COPIES:
        # One after the other a row's reads would each take a memory's latency; side by side, one.
        # A kernel is no faster, and what follows could not be part of it.
        total = jnp.zeros((place_RJ.shape[0], rows_AD.shape[1]), jnp.float32)
        for j in range(place_RJ.shape[1]):
            taken = rows_AD.at[place_RJ[:, j]].get(mode="fill", fill_value=0).astype(jnp.float32)
            total = total + (taken if weights_RJ is None else taken * weights_RJ[:, j : j + 1])
        return total.astype(dtype)
    if backend == "mosaic_gpu" and weighted_sum.refusal(rows_AD, place_RJ, dtype) is None:
        return weighted_sum.sum_places(rows_AD, weights_RJ, place_RJ)
    taken_RJD = rows_AD.at[place_RJ].get(mode="fill", fill_value=0).astype(jnp.float32)
    if weights_RJ is not None:
        taken_RJD = taken_RJD * weights_RJ[..., None]
    return jnp.sum(taken_RJD, axis=1).astype(dtype)


def rows_of(x_RD, copy_A, copies, within, tiles=None):
    """(rows, what picks them within a product): gathered beforehand nothing does.

    Gathered ones hold anything beyond the tiles, if those are given.
    """
    if within:
        return x_RD, {"copy_A": copy_A, "copies": copies}
    if tiles is not None and gathered.refusal(x_RD, copy_A) is None:
        return gathered.gather_places(x_RD, copy_A, tiles.count, copies=copies), {}
    return x_RD.at[copy_A // copies].get(mode="fill", fill_value=0), {}


def options_of(layout, hidden, backend, sizing, *, few=False):
    """What the Hopper kernels of rows and of weights are told, and whether these gather rows.

    A gather within a product of many rows costs about a tenth of it, and one beforehand the bytes
    of its rows, written and read: less where experts are wide.
    """
    if backend != "mosaic_gpu":
        return {}, {}, False
    place_RJ, copy_A, sizes_S, tiles = layout
    if tiles is None:
        tiles = tile_map(sizes_S, copy_A.shape[0], copy_A < place_RJ.size)
    options = {"assignments": sizing.assignments, "reserve_sms": sizing.reserve_sms}
    return {"tiles": tiles, **options}, options, few or hidden < WIDE


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _fused(arrays, layout, activation, backend, sizing):
    return _forward(arrays, layout, activation, backend, sizing, keep=False)[0]


def _forward(arrays, layout, activation, backend, sizing, *, keep):
    x_RD, w_in, w_out, scores_RJ = arrays
    place_RJ, copy_A, sizes_S, _ = layout
    kernels = _KERNELS[backend]
    few = not keep and sizing.assignments <= FEW_ROWS * sizes_S.shape[0]
    options, _, within = options_of(layout, w_out.shape[1], backend, sizing, few=few)
    if backend == "mosaic_gpu":
        options["few"] = few
    rows, picked = rows_of(x_RD, copy_A, place_RJ.shape[1], within, options.get("tiles"))
    a_AH, h = kernels.up(rows, w_in, sizes_S, activation=activation, keep=keep, **picked, **options)
    y_AD = kernels.down(a_AH, w_out, sizes_S, **options)
    return sum_places(y_AD, scores_RJ, place_RJ, x_RD.dtype, backend), h


def _fused_fwd(arrays, layout, activation, backend, sizing):
    out, h = _forward(arrays, layout, activation, backend, sizing, keep=True)
    return out, (arrays, layout, h)


def _fused_bwd(activation, backend, sizing, residuals, ct_RD):
    arrays, layout, h = residuals
    x_ct_AD, *others = backward(arrays, layout, h, ct_RD, activation, backend, sizing)
    x_ct_RD = sum_places(x_ct_AD, None, layout[0], arrays[0].dtype, backend)
    return (x_ct_RD, *others), None


def backward(arrays, layout, h, ct_RD, activation, backend, sizing):
    """Cotangents of the copies of rows at their places, of both projections and of the scores."""
    x_RD, w_in, w_out, scores_RJ = arrays
    place_RJ, copy_A, sizes_S, _ = layout
    kernels, copies = _KERNELS[backend], place_RJ.shape[1]
    options, others, within = options_of(layout, w_out.shape[1], backend, sizing)
    scores_A = scores_RJ.reshape(-1).at[copy_A].get(mode="fill", fill_value=0)
    ct_rows, picked = rows_of(ct_RD, copy_A, copies, within, options.get("tiles"))
    h_ct, weighted_AH, partial_sums = kernels.down_backward(
        ct_rows, w_out, h, scores_A, sizes_S, activation=activation, **picked, **options
    )
    x_ct_AD = kernels.rows_gradient(h_ct, w_in, sizes_S, **options)
    rows, _ = rows_of(x_RD, copy_A, copies, within, options.get("tiles"))
    w_in_ct = kernels.w_in_gradient(rows, h_ct, sizes_S, **picked, **others)
    w_out_ct = kernels.w_out_gradient(weighted_AH, ct_rows, sizes_S, **picked, **others)
    scores_ct_A = jnp.sum(partial_sums, axis=0)
    if backend == "mosaic_gpu":
        # Where the scores' cotangents travel, it is by a collective of XLA's. Beside the products
        # it would take multiprocessors and hold up the tiles of those: it waits for all of them.
        held = lax.optimization_barrier((w_in_ct, w_out_ct, scores_ct_A))
        w_in_ct, w_out_ct, scores_ct_A = held
    scores_ct_RJ = scores_ct_A.at[place_RJ].get(mode="fill", fill_value=0)
    return x_ct_AD, w_in_ct.reshape(w_in.shape), w_out_ct, scores_ct_RJ


_fused.defvjp(_fused_fwd, _fused_bwd)


def check_assignments(assignments: int | None) -> None:
    """Raises ValueError unless this is a number of assignments, 1 or more, or None."""
    if assignments is not None and assignments < 1:
        raise ValueError(f"assignments={assignments} must be at least 1, or None")


def _check_operands(
    x_RD: Any, w_in: Any, w_out: Any, scores_RJ: Any, sizes_S: Any, activation: str
) -> None:
    slots, hidden, _ = w_out.shape
    d_model = x_RD.shape[1]
    parts = ACTIVATIONS[activation].parts if activation in ACTIVATIONS else w_in.shape[2]
    if w_in.shape != (slots, d_model, parts, hidden):
        raise ValueError(
            f"rows {list(x_RD.shape)} with projections {list(w_in.shape)} and {list(w_out.shape)}: "
            f"must be [R, D], [S, D, {parts}, H] and [S, H, D'] for {activation}"
        )
    if sizes_S.shape != (slots,):
        raise ValueError(f"sizes of {sizes_S.shape[0]} slots for {slots} matrices")
    if scores_RJ.dtype != jnp.float32:
        raise ValueError(f"scores of {scores_RJ.dtype}: must be float32")
    if not x_RD.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(
            f"rows of {x_RD.dtype} with projections of {w_in.dtype} and {w_out.dtype}: must be of "
            "one dtype"
        )


def fused_experts(
    x_RD: Float[Array, "R D"],
    w_in_SDNH: Float[Array, "S D N H"],
    w_out_SHD: Float[Array, "S H D'"],
    scores_RJ: Float32[Array, "R J"],
    place_RJ: Int32[Array, "R J"],
    copy_A: Int32[Array, " A"],
    sizes_S: Int32[Array, " S"],
    *,
    activation: str,
    b_in_SNH: Float[Array, "S N H"] | None = None,
    b_out_SD: Float[Array, "S D'"] | None = None,
    assignments: int | None = None,
    tiles: TileMap | None = None,
    backend: str | None = None,
    reserve_sms: int = 0,
) -> Float[Array, "R D'"]:
    """Σ_j scores[r, j] · (act(x[r] @ w_in + b_in) @ w_out + b_out)[slot] over a row's assignments.

    Args:
        x_RD: rows.
        w_in_SDNH: input projections, N = 2 for gated activations (the gate first), in x's dtype.
        w_out_SHD: output projections, likewise; outputs may have another width than rows.
        scores_RJ: weights of the assignments.
        place_RJ: the place of each assignment; A for none.
        copy_A: the flat assignment r·J + j of each place; R·J for none, after a slot's others.
        sizes_S: places of each slot, multiples of `ROW_ALIGNMENT` for the kernels.
        activation: `swiglu`, `geglu`, `swiglu_oai`, `gelu` or `relu2`.
        b_in_SNH, b_out_SD: biases in x's dtype, or None; the kernels take none.
        assignments: the most that have a place, which bounds work and memory: were there more, some
            would be lost without a word. None: R·J.
        tiles: of the slots, for the Hopper kernels, as `route.api.sorted_tiles` makes them; None
            makes the list here.
        backend: one of `BACKENDS`; None tries them in order.
        reserve_sms: streaming multiprocessors that the Hopper kernels leave free, the backward's
            too, for communication at the same time. Other backends take what XLA gives them.

    Returns:
        [R, D'] in x's dtype, summed in float32 and rounded once. Gradients for x, the projections,
        the biases and the scores. The kernels' backward keeps only the input projections
        of the forward and recomputes the activation (SonicMoE, arXiv 2512.14080).

    Raises:
        NotImplementedError: no backend serves; the message has each one's reason.
        ValueError: shapes or dtypes do not match; `reserve_sms` is no number of multiprocessors, or
            leaves none.
    """
    check_reserve(reserve_sms)
    check_assignments(assignments)
    _check_operands(x_RD, w_in_SDNH, w_out_SHD, scores_RJ, sizes_S, activation)
    bias = b_in_SNH is not None or b_out_SD is not None
    _, hidden, d_out = w_out_SHD.shape
    case = Case(x_RD.shape[1], hidden, activation, x_RD.dtype, bias, d_out)
    if place_RJ.size == 0 or copy_A.size == 0:
        return jnp.zeros((x_RD.shape[0], d_out), x_RD.dtype)
    chosen = backends.choose(
        "fused_experts",
        BACKENDS,
        backend,
        lambda name, forced: refusal(name, case, forced=forced),
    )
    most = place_RJ.size if assignments is None else min(assignments, place_RJ.size)
    if chosen in _KERNELS:
        differentiable = (x_RD, w_in_SDNH, w_out_SHD, scores_RJ)
        layout = (place_RJ, copy_A, sizes_S, tiles)
        return _fused(differentiable, layout, activation, chosen, Sizing(most, reserve_sms))
    arrays = (x_RD, w_in_SDNH, w_out_SHD, scores_RJ, place_RJ)
    options: dict[str, Any] = {"activation": activation, "b_in_SNH": b_in_SNH, "b_out_SD": b_out_SD}
    if chosen == "reference":
        return reference.fused_experts(*arrays, copy_A // place_RJ.shape[1], sizes_S, **options)
    return grouped.fused_experts(
        *arrays, copy_A, sizes_S, assignments=most, reserve_sms=reserve_sms, **options
    )
