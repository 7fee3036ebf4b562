"""Exchange of buckets: the filled rows of bucket g go to device g of a mesh axis, with gradients.

Backends are tried in order; one that cannot serve a case raises NotImplementedError with the
reason. `explain` says which was chosen and why others were not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Int32, Num

from pallas_kernels import backends
from pallas_kernels.exchange import mosaic_tpu, ragged, reference

__all__ = ["BACKENDS", "exchange_buckets", "explain"]

BACKENDS = ("mosaic_tpu", "ragged", "reference")
_EXCHANGES = {
    "mosaic_tpu": mosaic_tpu.exchange_buckets,
    "ragged": ragged.exchange_buckets,
    "reference": reference.exchange_buckets,
}


def _refusal(backend: str, dtype: Any, *, forced: bool) -> str | None:
    if backend == "reference":
        return None
    if backend == "mosaic_tpu" and (refusal := mosaic_tpu.dtype_refusal(dtype)):
        return refusal
    # What is asked here is the device: nothing is computed, so that the dtype is no matter.
    return backends.kernel_refusal("mosaic_tpu", {}, jnp.bfloat16, forced=forced)


def explain(dtype: Any) -> str:
    """One line: the backend that serves rows of this dtype, and why those before it do not."""
    return backends.explain(
        "exchange_buckets", BACKENDS, lambda name, forced: _refusal(name, dtype, forced=forced)
    )


def _filled(rows_GCW: jax.Array, counts_G: jax.Array) -> jax.Array:
    """The rows, with those from a bucket's count on zero."""
    index_C = jnp.arange(rows_GCW.shape[1], dtype=jnp.int32)
    filled_GC = index_C < counts_G[:, None]
    return jnp.where(filled_GC[:, :, None], rows_GCW, jnp.zeros((), rows_GCW.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange(rows_GCW, counts_G, axis, backend):
    received_GCW, received_counts_G = _EXCHANGES[backend](rows_GCW, counts_G, axis)
    return _filled(received_GCW, received_counts_G), received_counts_G


def _exchange_fwd(rows_GCW, counts_G, axis, backend):
    received_GCW, received_counts_G = _exchange(rows_GCW, counts_G, axis, backend)
    return (received_GCW, received_counts_G), received_counts_G


def _exchange_bwd(axis, backend, received_counts_G, cts):
    rows_ct = cts[0]
    if rows_ct.dtype == jax.dtypes.float0:  # of integers
        return None, None
    return _exchange(rows_ct, received_counts_G, axis, backend)[0], None


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def exchange_buckets(
    rows_GCW: Num[Array, "G C W"],
    counts_G: Int32[Array, " G"],
    axis: str,
    *,
    backend: str | None = None,
) -> tuple[Num[Array, "G C W"], Int32[Array, " G"]]:
    """Sends the first counts[g] rows of bucket g to device g, inside a shard_map over `axis`.

    All devices of the axis call it, in the same order as their other exchanges.

    Args:
        rows_GCW: bucket g for device g, of any dtype; what rows from the count on hold does not
            matter. Buckets of a multiple of 32 rows are never padded on the way.
        counts_G: int32, filled rows of each bucket; clamped to 0 … C.
        axis: mesh axis of size G.
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        The rows received [G, C, W], bucket g from device g, and how many those are, int32 [G].
        Rows from the count on are zero, by a selection that XLA fuses into what reads the rows:
        backends leave there what the source or the memory held, which may be nan. Gradients of
        floating-point rows travel the same way back, and are zero for rows that did not travel.

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
        ValueError: shapes or dtypes do not match each other or the axis, or buckets have no room.
    """
    devices = lax.axis_size(axis)
    if rows_GCW.ndim != 3 or counts_G.shape != (devices,) or rows_GCW.shape[0] != devices:
        raise ValueError(
            f"rows {list(rows_GCW.shape)} with counts {list(counts_G.shape)} along {axis!r}: must "
            f"be [{devices}, C, W] and [{devices}]"
        )
    if 0 in rows_GCW.shape:
        raise ValueError(f"rows {list(rows_GCW.shape)}: there must be some, of some width")
    if counts_G.dtype != jnp.int32:
        raise ValueError(f"counts of {counts_G.dtype}: must be int32")
    chosen = backends.choose(
        "exchange_buckets",
        BACKENDS,
        backend,
        lambda name, forced: _refusal(name, rows_GCW.dtype, forced=forced),
    )
    if devices == 1:  # nothing travels
        chosen = "reference"
    counts_G = jnp.clip(counts_G, 0, rows_GCW.shape[1])
    return _exchange(rows_GCW, counts_G, axis, chosen)
