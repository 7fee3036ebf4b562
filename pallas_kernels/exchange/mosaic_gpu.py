"""Rows pushed to the GPUs of one process: a kernel that does nothing else."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.lines import VECTOR
from pallas_kernels.exchange.pushing import Pusher, wait_for_signals
from pallas_kernels.hopper.compat import COMPILER_PARAMS, named_kernel, sm_count

__all__ = ["VECTOR", "push_rows"]

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

    def body(x: Any, entries: Any, received: Any) -> None:
        worker = lax.axis_index("sm") * WARPGROUPS + lax.axis_index("warpgroup")
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)
        pusher.push(x, entries, 0, entries.shape[0], received, worker)
        pusher.signal(arrived)
        pl.when(worker == 0)(lambda: wait_for_signals(arrived, pusher.signals))

    kernel = named_kernel(
        body,
        "push_rows",
        out_type=jax.ShapeDtypeStruct((devices * tokens, width), x_NW.dtype),
        scratch_types=[],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    return kernel(x_NW, entries_M)
