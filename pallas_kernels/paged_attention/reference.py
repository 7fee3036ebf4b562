"""The twin of the kernels, in plain JAX: the rows' pages side by side, then products and a softmax.

Shape letters as in `pallas_kernels.paged_attention.api`; T = N·L positions of a row's table.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp

from pallas_kernels.precision import precision_of

__all__ = ["gather_pages", "page_exists", "paged_attention"]

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# Far below every score and still finite: a row that sees nothing gives no nan.


def page_exists(page: jax.Array, pages: int) -> jax.Array:
    """Which ids are one of that many pages."""
    return (page >= 0) & (page < pages)


def gather_pages(pages_MPLh: jax.Array, tables_BN: jax.Array) -> jax.Array:
    """The rows' pages side by side, zeros for ids that are no page: [B, M, T, h]."""
    heads, pages, page_len, width = pages_MPLh.shape
    page_B1N = jnp.where(page_exists(tables_BN, pages), tables_BN, pages)[:, None]
    # The heads by index, too: so rows come first without moving what was gathered.
    head_M1 = jnp.arange(heads, dtype=jnp.int32)[:, None]
    found_BMNLh = pages_MPLh.at[head_M1, page_B1N].get(mode="fill", fill_value=0)
    rows, count = tables_BN.shape
    return found_BMNLh.reshape(rows, heads, count * page_len, width)


def paged_attention(
    q_BNh: jax.Array,
    k_MPLh: jax.Array,
    v_MPLh: jax.Array | None,
    lengths_B: jax.Array,
    tables_BN: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """As `pallas_kernels.paged_attention.api.paged_attention`, for any operands."""
    dtype, precision = q_BNh.dtype, precision_of(q_BNh.dtype)
    rows, heads, width = q_BNh.shape
    groups = k_MPLh.shape[0]
    k_BMTh = gather_pages(k_MPLh, tables_BN).astype(dtype)
    v_BMTh = k_BMTh if v_MPLh is None else gather_pages(v_MPLh, tables_BN).astype(dtype)

    positions_T = jnp.arange(k_BMTh.shape[2], dtype=jnp.int32)
    seen_BT = positions_T < lengths_B[:, None]
    if window is not None:
        seen_BT = seen_BT & (positions_T >= lengths_B[:, None] - window)
    seen_B11T = seen_BT[:, None, None]

    q_BMGh = q_BNh.reshape(rows, groups, heads // groups, width)
    scores_BMGT = jnp.einsum(
        "BMGh,BMTh->BMGT", q_BMGh, k_BMTh, precision=precision, preferred_element_type=jnp.float32
    )
    scores_BMGT = jnp.where(seen_B11T, scores_BMGT * scale, _MASKED)
    top = jnp.max(scores_BMGT, axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks_MG1 = sinks_N.reshape(groups, -1, 1)
        top = jnp.maximum(top, sinks_MG1)
    parts_BMGT = jnp.where(seen_B11T, jnp.exp(scores_BMGT - top), 0.0)
    whole = jnp.sum(parts_BMGT, axis=-1, keepdims=True)
    if sinks_N is not None:
        whole = whole + jnp.exp(sinks_MG1 - top)
    shares_BMGT = (parts_BMGT / jnp.where(whole > 0.0, whole, 1.0)).astype(dtype)
    # A page keeps what an earlier text left in it, and zero times its infinity is no number.
    v_BMTh = jnp.where(seen_BT[:, None, :, None], v_BMTh, jnp.zeros_like(v_BMTh))
    y_BMGh = jnp.einsum(
        "BMGT,BMTh->BMGh",
        shares_BMGT,
        v_BMTh,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return y_BMGh.reshape(q_BNh.shape).astype(dtype)
