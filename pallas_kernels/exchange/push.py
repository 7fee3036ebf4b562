"""Single rows to their places on other devices: what a plan by rows, not by buckets, sends.

No gradient: who calls it knows which rows travel and has a VJP of its own. Backends are tried in
order; `explain` says which one serves.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from pallas_kernels import backends
from pallas_kernels.exchange import mosaic_gpu, reference
from pallas_kernels.hopper.compat import hopper_refusal

__all__ = ["BACKENDS", "explain", "push_rows", "refusal", "sum_devices"]

BACKENDS = ("mosaic_gpu", "reference")
FIRST_JAX = (0, 11, 1)  # whose barrier of all GPUs precedes a kernel that writes to others


def refusal(backend: str, forced: bool = False) -> str | None:
    """Why a backend cannot serve; None if it can.

    Args:
        backend: one of `BACKENDS`.
        forced: do not look at the devices.
    """
    if backend != "mosaic_gpu":
        return None
    if jax.__version_info__ < FIRST_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, FIRST_JAX))}"
    if jax.process_count() > 1:
        return f"{jax.process_count()} processes: GPUs write to each other in one"
    return hopper_refusal(jnp.bfloat16, forced=forced)


def explain() -> str:
    """One line: the backend that serves, and why those before it do not."""
    return backends.explain("push_rows", BACKENDS, refusal)


def push_rows(
    x_NW: Shaped[Array, "N W"],
    entries_M: Int32[Array, " M"],
    axis: str,
    tokens: int,
    *,
    backend: str | None = None,
) -> jax.Array:
    """Sends rows to their places on the devices of an axis, inside a shard_map over it.

    All devices of the axis call it, in the same order as their other exchanges.

    Args:
        x_NW: rows of any float dtype or integers; N is T, or G·T with G devices along the axis.
        entries_M: int32. An entry r = g·T + t sends row r mod N to device g, to row me·T + t of its
            result, where `me` is this device. Others than 0 … G·T − 1 are skipped; none comes
            twice.
        axis: mesh axis of size G.
        tokens: T.
        backend: one of `BACKENDS`; None tries them in order. `mosaic_gpu` writes rows straight into
            the memory of the other GPUs of the process, and sends those of the entries alone.

    Returns:
        [G·T, W], in x's dtype. Rows that nobody sent hold anything: read them by an index or a
        selection alone.

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
        ValueError: shapes or dtypes do not match each other or the axis.
    """
    rows = lax.axis_size(axis) * tokens
    if x_NW.ndim != 2 or x_NW.shape[0] not in (tokens, rows):
        raise ValueError(
            f"rows {list(x_NW.shape)} of {tokens} tokens along {axis!r}: must be [{tokens}, W] or "
            f"[{rows}, W]"
        )
    if entries_M.ndim != 1 or entries_M.dtype != jnp.int32:
        raise ValueError(
            f"entries {list(entries_M.shape)} of {entries_M.dtype}: must be [M] of int32"
        )
    chosen = backends.choose("push_rows", BACKENDS, backend, refusal)
    if chosen == "reference":
        return reference.push_rows(x_NW, entries_M, axis, tokens)
    width, size = x_NW.shape[1], x_NW.dtype.itemsize
    missing = -(width * size) % mosaic_gpu.VECTOR // size
    if missing:
        x_NW = jnp.pad(x_NW, ((0, 0), (0, missing)))
    return mosaic_gpu.push_rows(x_NW, entries_M, axis, tokens)[:, :width]


def sum_devices(back_RD: Any, goes_GT: Bool[Array, "G T"]) -> Float32[Array, "T D"]:
    """Sums what came home for each token, in float32 and in the order of the devices.

    Args:
        back_RD: [G·T, D], what `push_rows` returned.
        goes_GT: whether token t has a row from device g; others are not looked at.
    """
    back_GTD = back_RD.reshape(*goes_GT.shape, -1)
    terms = [
        jnp.where(goes_T[:, None], back_TD.astype(jnp.float32), 0.0)
        for back_TD, goes_T in zip(back_GTD, goes_GT, strict=True)
    ]
    return sum(terms[1:], start=terms[0])
