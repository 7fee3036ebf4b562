"""Grouped matmul: rows sorted by group, one matrix a group, with its own gradients.

Backends are tried in order; one that cannot serve a case raises NotImplementedError with the
reason. `explain` says which was chosen and why others were not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import backends
from pallas_kernels.grouped_matmul import blocked, mosaic_gpu, reference
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.hopper.tiles import ROWS

__all__ = ["BACKENDS", "Case", "explain", "grouped_matmul", "row_alignment"]

BACKENDS = ("mosaic_gpu", "blocked", "reference")


@dataclass(frozen=True)
class Case:
    """What a backend must know to say whether it serves.

    rows: M. contraction: K. columns: N. alignment: of the groups' sizes. dtype: of the operands.
    """

    rows: int
    contraction: int
    columns: int
    alignment: int
    dtype: Any

    @property
    def aligned(self) -> bool:
        """Whether the rows are whole blocks."""
        return self.rows % self.alignment == 0


def row_alignment(rows: int, groups: int, contraction: int, columns: int, dtype: Any) -> int:
    """The multiple to which groups should be padded for the preferred backend.

    Args:
        rows: assignments that are expected.
        groups: G.
        contraction, columns: K and N.
        dtype: of the operands.
    """
    case = Case(ROWS, contraction, columns, ROWS, dtype)
    if _refusal("mosaic_gpu", case, forced=False) is None:
        return ROWS
    return blocked.block_size(rows, groups)


def _refusal(backend: str, case: Case, *, forced: bool) -> str | None:
    if backend == "blocked" and not case.aligned:
        return f"{case.rows} rows are no multiple of the alignment {case.alignment}"
    if backend != "mosaic_gpu":
        return None
    if case.alignment % ROWS or not case.aligned:
        return f"groups aligned to {case.alignment} rows, not {ROWS}"
    for name, size in (("contraction", case.contraction), ("columns", case.columns)):
        if size % 64:
            return f"{name} of {size}, no multiple of 64"
    return hopper_refusal(case.dtype, forced=forced)


def explain(case: Case) -> str:
    """One line: the backend that serves this shape, and why those before it do not."""
    return backends.explain(
        "grouped_matmul", BACKENDS, lambda name, forced: _refusal(name, case, forced=forced)
    )


def _inside(rows_MN: jax.Array, sizes: jax.Array) -> jax.Array:
    """The rows with those past the last group zero: the kernel leaves them unwritten."""
    index_M = jnp.arange(rows_MN.shape[0], dtype=jnp.int32)
    return jnp.where((index_M < jnp.sum(sizes))[:, None], rows_MN, jnp.zeros((), rows_MN.dtype))


def _forward(lhs, rhs, sizes, alignment, backend, *, transpose_rhs=False):
    if backend == "mosaic_gpu":
        out = mosaic_gpu.grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs)
        return _inside(out, sizes)
    rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    if backend == "blocked":
        return blocked.grouped_matmul(lhs, rhs, sizes, alignment)
    return reference.grouped_matmul(lhs, rhs, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(lhs, rhs, sizes, alignment, backend):
    return _forward(lhs, rhs, sizes, alignment, backend)


def _grouped_fwd(lhs, rhs, sizes, alignment, backend):
    return _forward(lhs, rhs, sizes, alignment, backend), (lhs, rhs, sizes)


def _grouped_bwd(alignment, backend, residuals, ct):
    lhs, rhs, sizes = residuals
    lhs_ct = _forward(ct, rhs, sizes, alignment, backend, transpose_rhs=True)
    if backend == "mosaic_gpu":
        rhs_ct = mosaic_gpu.weights_gradient(lhs, ct, sizes, dtype=rhs.dtype)
    elif backend == "blocked":
        rhs_ct = blocked.weights_gradient(lhs, ct, sizes, alignment, rhs.dtype)
    else:
        rhs_ct = reference.weights_gradient(lhs, ct, sizes, rhs.dtype)
    return lhs_ct, rhs_ct, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def grouped_matmul(
    lhs_MK: Float[Array, "M K"],
    rhs_GKN: Float[Array, "G K N"],
    group_sizes_G: Int32[Array, " G"],
    *,
    alignment: int = 1,
    backend: str | None = None,
) -> Float[Array, "M N"]:
    """out[m] = lhs[m] @ rhs[group of m].

    Args:
        lhs_MK: rows, sorted by group; rows past the last group must be zero.
        rhs_GKN: one matrix for each group, same dtype.
        group_sizes_G: int32, each a multiple of `alignment`, sum at most M.
        alignment: what the caller guarantees; `row_alignment` says what is wanted.
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        [M, N] in lhs's dtype, accumulated in float32. Gradients likewise, the matrices' in
        rhs's dtype; exactly zero for empty groups.

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
    """
    (rows, contraction), columns = lhs_MK.shape, rhs_GKN.shape[2]
    case = Case(rows, contraction, columns, alignment, lhs_MK.dtype)
    chosen = backends.choose(
        "grouped_matmul",
        BACKENDS,
        backend,
        lambda name, forced: _refusal(name, case, forced=forced),
    )
    return _grouped(lhs_MK, rhs_GKN, group_sizes_G, alignment, chosen)
