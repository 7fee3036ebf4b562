"""Rows through their experts: gather, two grouped products, activation, weighted sum.

Backends are tried in order, as for the grouped matmul; `explain` says which one serves.

Shape letters: R rows, J assignments of a row, A places (assignments sorted by slot, each slot's
padded), S slots, D model width, N input projections, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import backends
from pallas_kernels.fused_experts import mosaic_gpu, reference
from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.hopper.tiles import ROWS

__all__ = ["BACKENDS", "ROW_ALIGNMENT", "Case", "explain", "fused_experts", "refusal"]

BACKENDS = ("mosaic_gpu", "reference")
ROW_ALIGNMENT = ROWS
"""The multiple of rows to which slots must be padded for the kernels."""

WIDE = 4096  # hidden width from which rows are gathered before the products
FEW_COPIES = 2**14  # assignments up to which the sum over a row's is unrolled
FEW_ROWS = 64  # assignments a slot, on average, up to which tiles are taken to be nearly empty


@dataclass(frozen=True)
class Case:
    """What a backend must know to say whether it serves: D, H, the activation, dtype and bias."""

    d_model: int
    hidden: int
    activation: str
    dtype: Any
    bias: bool = False


def refusal(backend: str, case: Case, *, forced: bool = False) -> str | None:
    """Why a backend cannot serve; None if it can.

    Args:
        backend: one of `BACKENDS`.
        case: what is asked.
        forced: do not look at the device.
    """
    if case.bias:
        return "the experts have biases"
    if case.activation not in ACTIVATIONS:
        return f"activation {case.activation!r} is none of {', '.join(ACTIVATIONS)}"
    if backend != "mosaic_gpu":
        return None
    for name, size in (("d_model", case.d_model), ("hidden", case.hidden)):
        if size % 64:
            return f"{name}={size} is no multiple of 64"
    return hopper_refusal(case.dtype, forced=forced)


def explain(case: Case) -> str:
    """One line: whether the kernels serve this layer, and why not."""
    reason = refusal("mosaic_gpu", case)
    if reason is None:
        return "fused_experts: mosaic_gpu"
    return f"fused_experts: not mosaic_gpu: {reason}; grouped products and gathers instead"


def _sum_places(rows_AD, weights_RJ, place_RJ, dtype):
    """Each row's places, weighted and summed in float32."""
    if place_RJ.size <= FEW_COPIES:
        # One after the other a row's reads would each take a memory's latency; side by side, one.
        total = jnp.zeros((place_RJ.shape[0], rows_AD.shape[1]), jnp.float32)
        for j in range(place_RJ.shape[1]):
            taken = rows_AD.at[place_RJ[:, j]].get(mode="fill", fill_value=0).astype(jnp.float32)
            total = total + (taken if weights_RJ is None else taken * weights_RJ[:, j : j + 1])
        return total.astype(dtype)
    taken_RJD = rows_AD.at[place_RJ].get(mode="fill", fill_value=0).astype(jnp.float32)
    if weights_RJ is not None:
        taken_RJD = taken_RJD * weights_RJ[..., None]
    return jnp.sum(taken_RJD, axis=1).astype(dtype)


def _rows_of(x_RD, source_A, hidden):
    """(rows, their index or None): gathered beforehand where the experts are wide.

    A gather inside of a product costs about a tenth of it, and one beforehand the bytes of its
    rows, written and read. From this width on the second is less.
    """
    if hidden < WIDE:
        return x_RD, source_A
    return x_RD.at[source_A].get(mode="fill", fill_value=0), None


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _fused(x_RD, w_in, w_out, scores_RJ, place_RJ, copy_A, sizes_S, activation):
    inputs = (x_RD, w_in, w_out, scores_RJ, place_RJ, copy_A, sizes_S)
    return _forward(*inputs, activation, False)[0]


def _forward(x_RD, w_in, w_out, scores_RJ, place_RJ, copy_A, sizes_S, activation, keep):
    hidden = w_out.shape[1]
    wanted_A = None
    if not keep and place_RJ.size <= FEW_ROWS * sizes_S.shape[0]:
        wanted_A = copy_A < place_RJ.size
    rows, index = _rows_of(x_RD, copy_A // place_RJ.shape[1], hidden)
    a_AH, h_AM = mosaic_gpu.up(
        rows, w_in, index, sizes_S, activation=activation, keep=keep, wanted_A=wanted_A
    )
    y_AD = products.grouped_matmul(a_AH, w_out, sizes_S, wanted_M=wanted_A, name="experts_down")
    return _sum_places(y_AD, scores_RJ, place_RJ, x_RD.dtype), h_AM


def _fused_fwd(x_RD, w_in, w_out, scores_RJ, place_RJ, copy_A, sizes_S, activation):
    inputs = (x_RD, w_in, w_out, scores_RJ, place_RJ, copy_A, sizes_S)
    out, h_AM = _forward(*inputs, activation, True)
    return out, (inputs, h_AM)


def _fused_bwd(activation, residuals, ct_RD):
    (x_RD, w_in, w_out, scores_RJ, place_RJ, copy_A, sizes_S), h_AM = residuals
    slots, d_model, parts, hidden = w_in.shape
    source_A = copy_A // place_RJ.shape[1]
    scores_A = scores_RJ.reshape(-1).at[copy_A].get(mode="fill", fill_value=0)
    ct_rows, ct_index = _rows_of(ct_RD, source_A, hidden)
    h_ct, weighted_AH, partial_sums = mosaic_gpu.down_backward(
        ct_rows, w_out, h_AM, scores_A, ct_index, sizes_S, activation=activation
    )
    x_ct_AD = products.grouped_matmul(
        h_ct,
        w_in.reshape(slots, d_model, parts * hidden),
        sizes_S,
        transpose_rhs=True,
        name="rows_gradient",
    )
    rows, index = _rows_of(x_RD, source_A, hidden)
    gather_lhs, gather_ct = ("", "") if index is None else ("lhs", "rhs")
    w_in_ct = products.weights_gradient(
        rows, h_ct, sizes_S, index_M=index, gather=gather_lhs, name="w_in_gradient"
    )
    w_out_ct = products.weights_gradient(
        weighted_AH, ct_rows, sizes_S, index_M=ct_index, gather=gather_ct, name="w_out_gradient"
    )
    scores_ct_A = jnp.sum(partial_sums, axis=0)
    return (
        _sum_places(x_ct_AD, None, place_RJ, x_RD.dtype),
        w_in_ct.reshape(w_in.shape),
        w_out_ct,
        scores_ct_A.at[place_RJ].get(mode="fill", fill_value=0),
        None,
        None,
        None,
    )


_fused.defvjp(_fused_fwd, _fused_bwd)


def fused_experts(
    x_RD: Float[Array, "R D"],
    w_in_SDNH: Float[Array, "S D N H"],
    w_out_SHD: Float[Array, "S H D"],
    scores_RJ: Float32[Array, "R J"],
    place_RJ: Int32[Array, "R J"],
    copy_A: Int32[Array, " A"],
    sizes_S: Int32[Array, " S"],
    *,
    activation: str,
    backend: str | None = None,
) -> Float[Array, "R D"]:
    """Σ_j scores[r, j] · act(x[r] @ w_in[slot]) @ w_out[slot] over a row's assignments.

    Args:
        x_RD: rows.
        w_in_SDNH: input projections, N = 2 for gated activations (the gate first), in x's dtype.
        w_out_SHD: output projections, likewise.
        scores_RJ: weights of the assignments.
        place_RJ: the place of each assignment; A for none.
        copy_A: the flat assignment r·J + j of each place; R·J for none.
        sizes_S: places of each slot, multiples of `ROW_ALIGNMENT` for the kernels.
        activation: `swiglu`, `geglu`, `gelu` or `relu2`.
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        [R, D] in x's dtype, summed in float32 and rounded once. Gradients for x, the projections
        and the scores; the backward keeps only the input projections [A, N·H] of the forward and
        recomputes the activation (SonicMoE, arXiv 2512.14080).

    Raises:
        NotImplementedError: no backend serves; the message has each one's reason.
    """
    case = Case(x_RD.shape[1], w_out_SHD.shape[1], activation, x_RD.dtype)
    if place_RJ.size == 0 or copy_A.size == 0:
        return jnp.zeros_like(x_RD)
    chosen = backends.choose(
        "fused_experts",
        BACKENDS,
        backend,
        lambda name, forced: refusal(name, case, forced=forced),
    )
    if chosen == "mosaic_gpu":
        return _fused(x_RD, w_in_SDNH, w_out_SHD, scores_RJ, place_RJ, copy_A, sizes_S, activation)
    source_A = copy_A // place_RJ.shape[1]
    return reference.fused_experts(
        x_RD,
        w_in_SDNH,
        w_out_SHD,
        scores_RJ,
        place_RJ,
        source_A,
        sizes_S,
        activation=activation,
    )
