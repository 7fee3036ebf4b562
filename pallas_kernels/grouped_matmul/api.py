"""Grouped matmul: rows sorted by group, one matrix a group, with its own gradients.

Backends are tried in order; one that cannot serve a case raises NotImplementedError with the
reason. `explain` says which was chosen and why others were not.
"""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.grouped_matmul import blocked, reference

__all__ = ["BACKENDS", "explain", "grouped_matmul", "row_alignment"]

BACKENDS = ("blocked", "reference")


def row_alignment(rows: int, groups: int) -> int:
    """The multiple to which groups should be padded for the preferred backend.

    Args:
        rows: assignments that are expected.
        groups: G.
    """
    return blocked.block_size(rows, groups)


def _refusal(backend: str, rows: int, alignment: int) -> str | None:
    if backend == "blocked" and rows % alignment:
        return f"{rows} rows are no multiple of the alignment {alignment}"
    if backend not in BACKENDS:
        return f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}"
    return None


def _choose(rows: int, alignment: int, backend: str | None) -> str:
    reasons = []
    for name in BACKENDS if backend is None else (backend,):
        reason = _refusal(name, rows, alignment)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError("grouped_matmul: " + "; ".join(reasons))


def explain(rows: int, alignment: int) -> str:
    """One line: the backend that serves this shape, and why those before it do not."""
    lines: list[str] = []
    for name in BACKENDS:
        reason = _refusal(name, rows, alignment)
        if reason is None:
            return "; ".join([f"grouped_matmul: {name}", *lines])
        lines.append(f"not {name}: {reason}")
    return "; ".join(lines)


def _forward(lhs, rhs, sizes, alignment, backend):
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
    lhs_ct = _forward(ct, rhs.swapaxes(1, 2), sizes, alignment, backend)
    if backend == "blocked":
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
    chosen = _choose(lhs_MK.shape[0], alignment, backend)
    return _grouped(lhs_MK, rhs_GKN, group_sizes_G, alignment, chosen)
