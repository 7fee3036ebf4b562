"""Grouped matmul: rows sorted by group, one matrix a group, with its own gradients.

Backends are tried in order; one that cannot serve a case raises NotImplementedError with the
reason. `explain` says which was chosen and why others were not.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import backends
from pallas_kernels.grouped_matmul import blocked, mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.grouped_matmul.blocks import block_size
from pallas_kernels.hopper.config import check_reserve
from pallas_kernels.hopper.tiles import ROWS

__all__ = ["BACKENDS", "Case", "explain", "grouped_matmul", "row_alignment"]

BACKENDS = ("mosaic_gpu", "mosaic_tpu", "blocked", "reference")


@dataclass(frozen=True)
class Case:
    """What a backend must know to say whether it serves.

    rows: M. contraction: K. columns: N. alignment: of the groups' sizes; all serve any, but are
    fastest with `row_alignment`'s. dtype: of the operands.
    """

    rows: int
    contraction: int
    columns: int
    alignment: int
    dtype: Any


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
    return block_size(rows, groups)


def _refusal(backend: str, case: Case, *, forced: bool) -> str | None:
    if backend not in ("mosaic_gpu", "mosaic_tpu"):
        return None
    sizes = {"contraction": case.contraction, "columns": case.columns}
    return backends.kernel_refusal(backend, sizes, case.dtype, forced=forced)


def explain(case: Case) -> str:
    """One line: the backend that serves this shape, and why those before it do not."""
    return backends.explain(
        "grouped_matmul", BACKENDS, lambda name, forced: _refusal(name, case, forced=forced)
    )


def _inside(rows_MN: jax.Array, sizes: jax.Array) -> jax.Array:
    """The rows with those past the last group zero: the kernel leaves them unwritten."""
    index_M = jnp.arange(rows_MN.shape[0], dtype=jnp.int32)
    return jnp.where((index_M < jnp.sum(sizes))[:, None], rows_MN, jnp.zeros((), rows_MN.dtype))


def _ragged(rows: int, offset: jax.Array | None, alignment: int) -> bool:
    """Whether the Hopper kernels need more than whole tiles of the groups in order."""
    return bool(alignment % ROWS or rows % ROWS) or offset is not None


def _forward(lhs, rhs, sizes, offset, alignment, backend, reserve, *, transpose_rhs=False):
    if backend == "mosaic_gpu":
        ragged = _ragged(lhs.shape[0], offset, alignment)
        out = mosaic_gpu.grouped_matmul(
            lhs,
            rhs,
            sizes,
            transpose_rhs=transpose_rhs,
            ragged=ragged,
            group_offset=offset,
            name="rows_gradient" if transpose_rhs else "grouped_matmul",
            reserve_sms=reserve,
        )
        return out if ragged else _inside(out, sizes)
    if backend == "mosaic_tpu":
        return mosaic_tpu.grouped_matmul(
            lhs, rhs, sizes, transpose_rhs=transpose_rhs, group_offset=offset
        )
    rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    if backend == "blocked":
        return blocked.grouped_matmul(lhs, rhs, sizes, alignment, offset)
    return reference.grouped_matmul(lhs, rhs, sizes, offset)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _grouped(lhs, rhs, sizes, offset, alignment, backend, reserve):
    return _forward(lhs, rhs, sizes, offset, alignment, backend, reserve)


def _grouped_fwd(lhs, rhs, sizes, offset, alignment, backend, reserve):
    out = _forward(lhs, rhs, sizes, offset, alignment, backend, reserve)
    return out, (lhs, rhs, sizes, offset)


def _grouped_bwd(alignment, backend, reserve, residuals, ct):
    lhs, rhs, sizes, offset = residuals
    lhs_ct = _forward(ct, rhs, sizes, offset, alignment, backend, reserve, transpose_rhs=True)
    own = {"groups": rhs.shape[0], "group_offset": offset}
    if backend == "mosaic_gpu":
        ragged = _ragged(lhs.shape[0], offset, alignment)
        rhs_ct = mosaic_gpu.weights_gradient(
            lhs, ct, sizes, dtype=rhs.dtype, ragged=ragged, reserve_sms=reserve, **own
        )
    elif backend == "mosaic_tpu":
        rhs_ct = mosaic_tpu.weights_gradient(lhs, ct, sizes, dtype=rhs.dtype, **own)
    elif backend == "blocked":
        block = max(alignment, block_size(lhs.shape[0], sizes.shape[0]))
        rhs_ct = blocked.weights_gradient(lhs, ct, sizes, block, rhs.dtype, **own)
    else:
        rhs_ct = reference.weights_gradient(lhs, ct, sizes, rhs.dtype, **own)
    return lhs_ct, rhs_ct, None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _check_operands(lhs: Any, rhs: Any, alignment: int) -> None:
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
        raise ValueError(
            f"rows {list(lhs.shape)} with matrices {list(rhs.shape)}: must be [M, K] and [G, K, N]"
        )
    if lhs.dtype != rhs.dtype:
        raise ValueError(f"rows of {lhs.dtype} with matrices of {rhs.dtype}: must be of one dtype")
    if alignment < 1:
        raise ValueError(f"alignment={alignment}: must be at least 1")


def _check_groups(own: int, groups: int, offset: Any) -> None:
    if offset is None:
        if own != groups:
            raise ValueError(f"{own} matrices for {groups} groups; give a group_offset for fewer")
        return
    known = not isinstance(offset, jax.core.Tracer)  # a traced one is clamped
    if own > groups or (known and not 0 <= operator.index(offset) <= groups - own):
        raise ValueError(
            f"group_offset {offset} with {own} matrices: there are {groups} groups; "
            f"it can be from 0 to {groups - own}"
        )


def grouped_matmul(
    lhs_MK: Float[Array, "M K"],
    rhs_GKN: Float[Array, "G K N"],
    group_sizes_G: Int32[Array, " groups"],
    *,
    group_offset: Int32[Array, ""] | int | None = None,
    alignment: int = 1,
    backend: str | None = None,
    reserve_sms: int = 0,
) -> Float[Array, "M N"]:
    """out[m] = lhs[m] @ rhs[group of m].

    Args:
        lhs_MK: rows, sorted by group.
        rhs_GKN: one matrix for each group, same dtype; with `group_offset` for some of them.
        group_sizes_G: int32, each a multiple of `alignment`, sum at most M.
        group_offset: rhs has the matrices of the groups from this one on, as in expert
            parallelism; at most as many as leave G groups, and a traced one is clamped to that.
            None: of all groups.
        alignment: what the caller guarantees; `row_alignment` says what is fastest.
        backend: one of `BACKENDS`; None tries them in order.
        reserve_sms: streaming multiprocessors that the Hopper kernels leave free, the backward's
            too, for communication at the same time. Other backends take what XLA gives them.

    Returns:
        [M, N] in lhs's dtype, accumulated in float32. Gradients likewise, the matrices' in
        rhs's dtype; exactly zero for empty groups. Rows of no group, or of one whose matrix is not
        here, are zero, and so are their gradients; what they hold does not matter.

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
        ValueError: shapes or dtypes do not match, the groups and the matrices do not, or
            `reserve_sms` is no number of multiprocessors or leaves none.
    """
    check_reserve(reserve_sms)
    _check_operands(lhs_MK, rhs_GKN, alignment)
    (rows, contraction), (own, _, columns) = lhs_MK.shape, rhs_GKN.shape
    _check_groups(own, group_sizes_G.shape[0], group_offset)
    case = Case(rows, contraction, columns, alignment, lhs_MK.dtype)
    chosen = backends.choose(
        "grouped_matmul",
        BACKENDS,
        backend,
        lambda name, forced: _refusal(name, case, forced=forced),
    )
    if 0 in (rows, contraction, columns, own):
        return jnp.zeros((rows, columns), lhs_MK.dtype)
    offset = None if group_offset is None else jnp.asarray(group_offset, jnp.int32)
    arrays = (jnp.asarray(a) for a in (lhs_MK, rhs_GKN, group_sizes_G))  # numpy's have no `at`
    return _grouped(*arrays, offset, alignment, chosen, reserve_sms)
