"""Moving rows by gathers only, forward and backward.

A `RowMap` is a partial one-to-one map between copies (n, j) of N sources and M destination rows.
Both directions are index arrays, so that neither a forward nor a backward pass scatters
activations: only int32 indices are ever scattered.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import numpy as jnp

__all__ = ["RowMap", "gather_rows", "sum_rows"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowMap:
    """Copies of sources ↔ rows.

    row_NJ: int32 [N, J], the row that holds copy j of source n; M for none.
    copy_M: int32 [M], the flat copy n·J + j that lies in a row; N·J for none.
    """

    row_NJ: jax.Array
    copy_M: jax.Array

    @staticmethod
    def from_rows(row_NJ: jax.Array, num_rows: int) -> RowMap:
        """Builds both directions from `row_NJ` (entries ≥ num_rows mean none; others distinct)."""
        copies = row_NJ.size
        copy_M = jnp.full((num_rows,), copies, jnp.int32)
        copy_M = copy_M.at[row_NJ.reshape(-1)].set(
            jnp.arange(copies, dtype=jnp.int32), mode="drop", unique_indices=False
        )
        return RowMap(row_NJ, copy_M)

    @property
    def source_M(self) -> jax.Array:
        """int32 [M], the source of each row; ≥ N for none."""
        return self.copy_M // self.row_NJ.shape[1]


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.asarray(x).at[index].get(mode="fill", fill_value=0)  # numpy's have no `at`


def _sum_copies(y_MD: jax.Array, row_NJ: jax.Array, dtype) -> jax.Array:
    return jnp.sum(_take(y_MD, row_NJ).astype(jnp.float32), axis=1).astype(dtype)


@jax.custom_vjp
def gather_rows(x_ND: jax.Array, rows: RowMap) -> jax.Array:
    """Copies sources into rows.

    Args:
        x_ND: sources, any float dtype.
        rows: the map.

    Returns:
        [M, D] in x's dtype; rows that hold no copy are zero. The backward sums the copies of a
        source in float32.
    """
    return _take(x_ND, rows.source_M)


def _gather_fwd(x_ND, rows):
    return gather_rows(x_ND, rows), rows


def _gather_bwd(rows, ct_MD):
    return _sum_copies(ct_MD, rows.row_NJ, ct_MD.dtype), None


gather_rows.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def sum_rows(y_MD: jax.Array, weights_NJ: jax.Array | None, rows: RowMap) -> jax.Array:
    """Sums the rows of each source in float32, weighted where weights are given.

    Args:
        y_MD: rows, any float dtype. Rows that hold no copy are never read.
        weights_NJ: float32 weights of the copies, or None for ones.
        rows: the map.

    Returns:
        float32 [N, D].
    """
    taken_NJD = _take(y_MD, rows.row_NJ).astype(jnp.float32)
    if weights_NJ is not None:
        taken_NJD = taken_NJD * weights_NJ[..., None]
    return jnp.sum(taken_NJD, axis=1)


def _sum_fwd(y_MD, weights_NJ, rows):
    like = jnp.zeros((0,), y_MD.dtype) if weights_NJ is None else y_MD  # ones need no rows
    return sum_rows(y_MD, weights_NJ, rows), (like, weights_NJ, rows)


def _sum_bwd(residuals, ct_ND):
    y_MD, weights_NJ, rows = residuals
    ct_MD = _take(ct_ND, rows.source_M)
    if weights_NJ is None:
        return ct_MD.astype(y_MD.dtype), None, None
    weight_M = _take(weights_NJ.reshape(-1), rows.copy_M)
    y_ct = (ct_MD * weight_M[:, None]).astype(y_MD.dtype)
    taken_NJD = _take(y_MD, rows.row_NJ).astype(jnp.float32)
    weights_ct = jnp.einsum("njd,nd->nj", taken_NJD, ct_ND, precision="highest")
    return y_ct, weights_ct, None


sum_rows.defvjp(_sum_fwd, _sum_bwd)
