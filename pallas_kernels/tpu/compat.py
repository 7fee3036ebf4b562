"""What a TPU kernel must know of the device, and interpreting."""

from __future__ import annotations

from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpreting import interpreted, is_interpreted

__all__ = ["interpret_mode", "interpreted", "tpu_refusal", "vmem_bytes", "vmem_limit"]

ASSUMED_VMEM = 64 * 2**20
"""The least of the TPUs since v5: 128 MiB a core in v5e and v6e, 64 in v5p and v7x.

As in JAX's own table, `jax.experimental.pallas.tpu.get_tpu_info`.
"""

_DTYPES = ("bfloat16", "float32")


def interpret_mode() -> Any:
    """The `interpret` argument of `pl.pallas_call`: False outside of `interpreted`.

    What a kernel has not written reads as nan.
    """
    return pltpu.InterpretParams(uninitialized_memory="nan") if is_interpreted() else False


def tpu_refusal(dtype: Any, *, forced: bool) -> str | None:
    """Why the TPU kernels cannot serve operands of this dtype here; None if they can.

    "Here" is the first device of the default platform, as for the other kernels.

    Args:
        dtype: of the operands.
        forced: the backend was asked for by name, so that the device is not looked at: such a
            program may be lowered for another machine, or interpreted.
    """
    name = jnp.dtype(dtype).name
    if name not in _DTYPES:
        return f"operands are {name}, not {' or '.join(_DTYPES)}"
    device = jax.devices()[0]
    if not forced and device.platform != "tpu":
        return f"the device is {device.device_kind!r}, no TPU"
    return None


def vmem_bytes() -> int:
    """Vector memory of a core of the default device; `ASSUMED_VMEM` where that is no TPU."""
    if jax.devices()[0].platform != "tpu":
        return ASSUMED_VMEM
    return int(pltpu.get_tpu_info().vmem_capacity_bytes)


def vmem_limit() -> int:
    """What a kernel may use of it: XLA's own limit is lower, and it keeps some for itself."""
    return vmem_bytes() * 7 // 8
