"""Rows through experts with weights of 8 bits, for inference.

Backends are tried in order, as for the grouped matmul; `explain` says which one serves. Shape
letters as in `pallas_kernels.fused_experts.api`.

With bfloat16 rows one kernel reads 8-bit weights and never stores dequantized ones. It is made for
few rows, where the weights' bytes are the time. For many rows all matrices are converted once
(`dequantized.py`); float8 rows are the faster way there, at a cost in accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import backends
from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.fused_experts.api import ROW_ALIGNMENT, check_assignments, sum_places
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.quantized_experts import blocked, dequantized, prefill, reference
from pallas_kernels.quantized_experts.chunks import list_chunks
from pallas_kernels.quantized_experts.decode import product
from pallas_kernels.quantized_experts.decode_config import choose_decode
from pallas_kernels.quantized_experts.format import BLOCK, QuantizedMatrices

__all__ = ["BACKENDS", "ROW_ALIGNMENT", "Case", "Rows", "explain", "quantized_experts", "refusal"]

BACKENDS = ("mosaic_gpu", "blocked", "reference")
Rows = Literal["bfloat16", "float8"]


@dataclass(frozen=True)
class Case:
    """What a backend must know to say whether it serves.

    d_model, hidden: D and H.
    activation: name.
    dtype: of the rows that come in.
    weights: dtype of the weights' values.
    rows: what the rows are multiplied as.
    d_out: columns of the outputs; None: D.
    """

    d_model: int
    hidden: int
    activation: str
    dtype: Any
    weights: Any
    rows: Rows = "bfloat16"
    d_out: int | None = None


def refusal(backend: str, case: Case, *, forced: bool = False) -> str | None:
    """Why a backend cannot serve; None if it can.

    Args:
        backend: one of `BACKENDS`.
        case: what is asked.
        forced: do not look at the device.
    """
    if case.rows not in ("bfloat16", "float8"):
        return f"rows={case.rows!r} is neither 'bfloat16' nor 'float8'"
    if case.activation not in ACTIVATIONS:
        return f"activation {case.activation!r} is none of {', '.join(ACTIVATIONS)}"
    if backend != "mosaic_gpu":
        return None
    sizes = {"d_model": case.d_model, "hidden": case.hidden, "d_out": case.d_out or 0}
    for name, size in sizes.items():
        if size % BLOCK:
            return f"{name}={size} is no multiple of {BLOCK}"
    weights = jnp.dtype(case.weights)
    allowed = (jnp.float8_e4m3fn,) if case.rows == "float8" else (jnp.int8, jnp.float8_e4m3fn)
    if weights not in [jnp.dtype(dtype) for dtype in allowed]:
        return f"weights are {weights.name}, which {case.rows} rows are not multiplied with"
    return hopper_refusal(case.dtype, forced=forced)


def explain(case: Case) -> str:
    """One line: the backend that serves, and why not those before it."""
    return backends.explain(
        "quantized_experts", BACKENDS, lambda name, forced: refusal(name, case, forced=forced)
    )


def _products(x_RD, w_in, w_out, scores_RJ, place_RJ, copy_A, sizes_S, activation):
    """Both products with bfloat16 rows, and the sum over a row's places."""
    slots, parts, _, _ = w_in.values.shape
    assignments, places = place_RJ.size, copy_A.size
    act = ACTIVATIONS[activation]
    config = choose_decode(assignments, slots, parts)
    chunks = list_chunks(
        copy_A < assignments, sizes_S, assignments=assignments, columns=config.columns
    )
    a_AH = product(
        x_RD,
        w_in,
        chunks,
        copy_A,
        copies=place_RJ.shape[1],
        places=places,
        finish=act.value,
        name="quantized_up",
        config=config,
    )
    y_AD = product(
        a_AH,
        jax.tree.map(lambda array: array[:, None], w_out),
        chunks,
        None,
        places=places,
        finish=lambda values: values[0],
        name="quantized_down",
        config=choose_decode(assignments, slots, 1),
    )
    return sum_places(y_AD, scores_RJ, place_RJ, x_RD.dtype, "mosaic_gpu")


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _apply(x_RD, w_in, w_out, scores_RJ, place_RJ, copy_A, sizes_S, options, backend):
    activation, rows, assignments, expected = options
    arrays = (x_RD, w_in, w_out, scores_RJ, place_RJ)
    if backend == "reference":
        source_A = copy_A // place_RJ.shape[1]
        return reference.quantized_experts(
            *arrays, source_A, sizes_S, activation=activation, rows=rows
        )
    if backend == "blocked":
        return blocked.quantized_experts(
            *arrays, copy_A, sizes_S, activation=activation, rows=rows, assignments=assignments
        )
    if rows == "float8":
        return prefill.fp8_experts(*arrays, copy_A, sizes_S, activation=activation)
    if dequantized.pays(expected, sizes_S.shape[0]):
        return dequantized.quantized_experts(
            *arrays, copy_A, sizes_S, activation=activation, assignments=assignments
        )
    return _products(*arrays, copy_A, sizes_S, activation)


def _refuse_gradient(*_):
    raise NotImplementedError(
        "quantized_experts has no gradient: 8-bit weights are for inference; train with "
        "fused_experts on the weights they were quantized from"
    )


_apply.defvjp(_refuse_gradient, _refuse_gradient)


def quantized_experts(
    x_RD: Float[Array, "R D"],
    w_in: QuantizedMatrices,
    w_out: QuantizedMatrices,
    scores_RJ: Float32[Array, "R J"],
    place_RJ: Int32[Array, "R J"],
    copy_A: Int32[Array, " A"],
    sizes_S: Int32[Array, " S"],
    *,
    activation: str,
    rows: Rows = "bfloat16",
    assignments: int | None = None,
    expected: int | None = None,
    backend: str | None = None,
) -> Float[Array, "R D'"]:
    """Σ_j scores[r, j] · act(x[r] @ w_in[slot]) @ w_out[slot] over a row's assignments.

    Args:
        x_RD: rows.
        w_in: input projections, values [S, N, H, D], scales [S, N, H/128, D/128]: what `quantize`
            makes of [S, N, D, H]; N = 2 for gated activations (the gate first).
        w_out: output projections, values [S, D', H], scales [S, D'/128, H/128]: of [S, H, D'];
            outputs may have another width than rows.
        scores_RJ: weights of the assignments.
        place_RJ: the place of each assignment; A for none.
        copy_A: the flat assignment r·J + j of each place; R·J for none.
        sizes_S: places of each slot, multiples of `ROW_ALIGNMENT` for the kernels.
        activation: `swiglu`, `geglu`, `swiglu_oai`, `gelu` or `relu2`.
        rows: what rows and hidden activations are multiplied as. `bfloat16`, or x's own dtype where
            no kernel serves, is exact but for the weights' quantization; `float8` quantizes them,
            too, by blocks of 128 (e4m3).
        assignments: the most that have a place, which bounds the work of some backends: were there
            more, some would be lost without a word. None: R·J.
        expected: as many have a place on average, which says whether rows are many. None: the most.
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        [R, D'] in x's dtype, summed in float32 and rounded once.

    Raises:
        NotImplementedError: no backend serves; the message has each one's reason. Also when
            differentiated.
    """
    _, d_out, hidden = w_out.values.shape
    dtypes = (x_RD.dtype, w_in.values.dtype)
    case = Case(x_RD.shape[1], hidden, activation, *dtypes, rows, d_out)
    chosen = backends.choose(
        "quantized_experts",
        BACKENDS,
        backend,
        lambda name, forced: refusal(name, case, forced=forced),
    )
    if place_RJ.size == 0 or copy_A.size == 0:
        return jnp.zeros((x_RD.shape[0], d_out), x_RD.dtype)
    check_assignments(assignments)
    most = place_RJ.size if assignments is None else min(assignments, place_RJ.size)
    arrays = (x_RD, w_in, w_out, scores_RJ, place_RJ, copy_A, sizes_S)
    likely = most if expected is None else min(expected, most)
    return _apply(*arrays, (activation, rows, most, likely), chosen)
