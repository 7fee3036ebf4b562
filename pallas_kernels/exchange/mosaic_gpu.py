"""Rows pushed to the GPUs of one process: kernels that do nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.lines import VECTOR
from pallas_kernels.exchange.pushing import Pusher, wait_for_signals
from pallas_kernels.hopper.compat import COMPILER_PARAMS, named_kernel, sm_count

__all__ = ["VECTOR", "WARPGROUPS", "push_rows", "pushing_kernel"]

WARPGROUPS = 4  # of a block
MOST_BLOCKS = 64


def push_rows(
    x_NW: jax.Array, entries_M: jax.Array, axis: str, tokens: int, *, reserve_sms: int = 0
) -> jax.Array:
    """As `push.push_rows`, for rows of a multiple of 16 bytes.

    Args:
        x_NW, entries_M, axis, tokens: as there.
        reserve_sms: multiprocessors to leave free.
    """
    devices, width = lax.axis_size(axis), x_NW.shape[1]
    blocks = max(1, min(MOST_BLOCKS, sm_count() - reserve_sms))
    row_bytes = width * x_NW.dtype.itemsize
    pusher = Pusher(axis, devices, tokens, row_bytes, blocks * WARPGROUPS)

    def work(refs: Any, received: Any, worker: Any) -> None:
        x, entries = refs
        pusher.push(x, entries, 0, entries.shape[0], received, worker)

    kernel = pushing_kernel(work, "push_rows", pusher, x_NW.dtype)
    return kernel(x_NW, entries_M)


def pushing_kernel(
    work: Callable[..., None], name: str, pusher: Pusher, dtype: Any
) -> Callable[..., jax.Array]:
    """Builds `f(*arrays) -> [G·T, W]`, what all devices have written for this one.

    Args:
        work: (references of the arrays, of the result, worker) -> None, run by every warpgroup.
        name: of the kernel, in profiles.
        pusher: what the workers know; a multiple of `WARPGROUPS` of them.
        dtype: of the rows.
    """
    out_type = (pusher.devices * pusher.tokens, pusher.row_bytes // jnp.dtype(dtype).itemsize)

    def body(*refs: Any) -> None:
        *given, received = refs
        worker = lax.axis_index("sm") * WARPGROUPS + lax.axis_index("warpgroup")
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)
        work(given, received, worker)
        pusher.signal(arrived)
        pl.when(worker == 0)(lambda: wait_for_signals(arrived, pusher.signals))

    return named_kernel(
        body,
        name,
        out_type=jax.ShapeDtypeStruct(out_type, dtype),
        scratch_types=[],
        grid=(pusher.workers // WARPGROUPS,),
        grid_names=("sm",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
