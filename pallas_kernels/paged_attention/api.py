"""Attention of one query a row to the pages of its text (PagedAttention, arXiv 2309.06180 §4).

Backends are tried in order; `explain` says which one serves and why those before it do not. The
kernels are JAX's own: for TPUs `jax.experimental.pallas.ops.tpu.paged_attention`, for GPUs
`jax.experimental.pallas.ops.gpu.paged_attention`, which newer versions of JAX mark as deprecated;
where it is gone the backend refuses.

Shape letters: B rows, N query heads (of a table: its pages), M key-value heads, G = N / M of them
to a key, P pages, L positions of a page, h width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import backends
from pallas_kernels.paged_attention import mosaic_tpu, reference, triton
from pallas_kernels.paged_attention.reference import page_exists

__all__ = ["BACKENDS", "Case", "explain", "paged_attention", "refusal"]

BACKENDS = ("mosaic_tpu", "triton", "reference")
_KERNELS = {"mosaic_tpu": mosaic_tpu, "triton": triton}


@dataclass(frozen=True)
class Case:
    """What a backend must know to say whether it serves.

    rows: B.
    heads, kv_heads, head_dim: N, M, h.
    page_len: L.
    table: pages N of a row's table.
    dtype: of the queries.
    cache_dtype: of keys and values.
    values: the cache has values of their own.
    window: see `paged_attention`.
    sinks: heads have sinks.
    """

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    page_len: int
    table: int
    dtype: Any
    cache_dtype: Any
    values: bool = True
    window: int | None = None
    sinks: bool = False


def refusal(backend: str, case: Case, *, forced: bool = False) -> str | None:
    """Why a backend cannot serve; None if it can.

    Args:
        backend: one of `BACKENDS`.
        case: what is asked.
        forced: do not look at the device.
    """
    if backend == "reference":
        return None
    if not case.values:
        return "the cache has no values beside its keys"
    if case.sinks:
        return "heads have sinks"
    if case.window is not None and case.window < case.table * case.page_len:
        return f"a window of {case.window} of up to {case.table * case.page_len} positions"
    if jnp.dtype(case.cache_dtype) != jnp.dtype(case.dtype):
        names = [jnp.dtype(dtype).name for dtype in (case.dtype, case.cache_dtype)]
        return f"queries are {names[0]}, the cache is {names[1]}"
    module = _KERNELS[backend]
    shapes = module.refusal(
        case.rows, case.heads // case.kv_heads, case.head_dim, case.page_len, case.table
    )
    return shapes or module.device_refusal(case.dtype, forced=forced)


def explain(case: Case) -> str:
    """One line: the backend that serves, and why not those before it."""
    return backends.explain(
        "paged_attention", BACKENDS, lambda name, forced: refusal(name, case, forced=forced)
    )


def paged_attention(
    q_BNh: Float[Array, "B N h"],
    k_MPLh: Float[Array, "M P L h"],
    v_MPLh: Float[Array, "M P L h"] | None,
    lengths_B: Int32[Array, " B"],
    tables_BN: Int32[Array, "B pages"],
    *,
    scale: float,
    window: int | None = None,
    sinks_N: Float32[Array, " N"] | None = None,
    backend: str | None = None,
) -> Float[Array, "B N h"]:
    """Softmax of scaled products over the first positions of each row's pages, times their values.

    Query head n uses key head n // G. The kernels multiply what lies behind a row's length in its
    last page by zero, so that it must be finite there; `reference` does not look at it.

    Args:
        q_BNh: queries.
        k_MPLh: keys.
        v_MPLh: values; None: the keys are the values.
        lengths_B: positions of its pages that a row sees; those without a page are left out.
        tables_BN: page n of a row holds its positions n·L up to (n+1)·L. Ids below 0, or P and
            above, are no page; they come behind those that are.
        scale: of the products. The kernels multiply it into the queries, one rounding more unless
            it is a power of 2.
        window: a row sees only the last of its positions, this many; None: all.
        sinks_N: a logit of every head that takes part in the softmax and adds no value
            (arXiv 2309.17453); None for none.
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        [B, N, h] in q's dtype; zeros for rows that see nothing.

    Raises:
        NotImplementedError: no backend serves; the message has each one's reason.
    """
    rows, heads, head_dim = q_BNh.shape
    kv_heads, pages, page_len, _ = k_MPLh.shape
    table = tables_BN.shape[1]
    dtypes = (q_BNh.dtype, k_MPLh.dtype)
    sizes = (rows, heads, kv_heads, head_dim, page_len, table)
    case = Case(*sizes, *dtypes, v_MPLh is not None, window, sinks_N is not None)
    chosen = backends.choose(
        "paged_attention",
        BACKENDS,
        backend,
        lambda name, forced: refusal(name, case, forced=forced),
    )
    exists_BN = page_exists(tables_BN, pages)
    place_N = jnp.arange(table, dtype=jnp.int32)
    first_missing_B = jnp.min(jnp.where(exists_BN, table, place_N), axis=1)
    lengths_B = jnp.minimum(lengths_B, first_missing_B * page_len)
    if chosen == "reference":
        return reference.paged_attention(
            q_BNh, k_MPLh, v_MPLh, lengths_B, tables_BN, scale=scale, window=window, sinks_N=sinks_N
        )
    assert v_MPLh is not None
    # Kernels load whole blocks of pages, and hide what lies behind the length: a row's own page
    # stands where it has none.
    tables_BN = jnp.clip(jnp.where(exists_BN, tables_BN, tables_BN[:, :1]), 0, pages - 1)
    q_BNh = (q_BNh.astype(jnp.float32) * scale).astype(q_BNh.dtype)
    return _KERNELS[chosen].paged_attention(q_BNh, k_MPLh, v_MPLh, lengths_B, tables_BN)
