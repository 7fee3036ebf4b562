"""The twin of the kernels, in plain JAX: the rows' pages side by side, then products and a softmax.

Shape letters as in `pallas_kernels.paged_attention.api`; T = N·L positions of a row's table.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.precision import precision_of

__all__ = ["by_rows", "gather_pages", "page_exists", "paged_attention", "recent_pages"]

GATHERED_BYTES = 2**30
"""Of keys and values that lie side by side at once: rows beyond that come one after the other."""

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


def recent_pages(
    tables_BN: jax.Array, at_BS: jax.Array, window: int | None, page_len: int
) -> tuple[jax.Array, jax.Array]:
    """The pages that a window reaches into, and the positions counted from the first of them.

    Args:
        tables_BN: int32 [B, N].
        at_BS: int32 [B, S], positions of a row's tokens, one after the other.
        window: positions that a token sees, its own included; None: all.
        page_len: positions of a page.
    """
    if window is None:
        return tables_BN, at_BS
    count = (window + at_BS.shape[1] - 2) // page_len + 2
    if count >= tables_BN.shape[1]:
        return tables_BN, at_BS
    first_B1 = jnp.maximum(at_BS[:, :1] - window + 1, 0) // page_len
    places = first_B1 + jnp.arange(count, dtype=jnp.int32)
    tables = jnp.take_along_axis(tables_BN, places, axis=1, mode="fill", fill_value=-1)
    return tables, at_BS - first_B1 * page_len


def by_rows(function: Callable[..., jax.Array], bytes_of_row: int, *arrays: jax.Array) -> jax.Array:
    """A function of rows, so many of them at once as `GATHERED_BYTES` allow.

    Args:
        function: of arrays whose first dimension are rows, to one such array.
        bytes_of_row: that it holds for a row.
        arrays: its arguments.
    """
    rows = len(arrays[0])
    at_once = rows
    while at_once > 1 and at_once * bytes_of_row > GATHERED_BYTES:
        at_once = max(n for n in range(1, at_once) if rows % n == 0)
    if at_once == rows:
        return function(*arrays)
    parts = tuple(a.reshape(rows // at_once, at_once, *a.shape[1:]) for a in arrays)
    y = lax.map(lambda part: function(*part), parts)
    return y.reshape(rows, *y.shape[2:])


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
    page_len = k_MPLh.shape[2]
    tables_BN, at_B1 = recent_pages(tables_BN, lengths_B[:, None] - 1, window, page_len)

    def some(q: jax.Array, lengths: jax.Array, tables: jax.Array) -> jax.Array:
        return _some_rows(
            q, k_MPLh, v_MPLh, lengths, tables, scale=scale, window=window, sinks_N=sinks_N
        )

    of_position = k_MPLh.shape[0] * k_MPLh.shape[3] * q_BNh.dtype.itemsize
    of_position *= 1 if v_MPLh is None else 2
    of_row = tables_BN.shape[1] * page_len * of_position
    return by_rows(some, of_row, q_BNh, at_B1[:, 0] + 1, tables_BN)


def _some_rows(
    q_BNh: jax.Array,
    k_MPLh: jax.Array,
    v_MPLh: jax.Array | None,
    lengths_B: jax.Array,
    tables_BN: jax.Array,
    *,
    scale: float,
    window: int | None,
    sinks_N: jax.Array | None,
) -> jax.Array:
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
