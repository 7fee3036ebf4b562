"""What differs between the versions of JAX, what a kernel must know of the device, interpreting."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interpreting import interpreted, is_interpreted

__all__ = [
    "COMPILER_PARAMS",
    "hopper_refusal",
    "interpret_mode",
    "interpreted",
    "load_rows",
    "most_blocks_of_a_cluster",
    "named_kernel",
    "sm_count",
    "transposed",
]

COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
)
"""`approx_math`: exponentials and reciprocal roots by the GPU's own instructions.

Both are good to 2 units in the last place; eˣ is 2 to the power of a product rounded to float32, so
that its relative error grows to about |x|·2⁻²⁴.
"""

H100_SMS = 132
INTERPRETED_SMS = 2


def interpret_mode() -> Any:
    """The `interpret` argument of `plgpu.kernel`: None outside of `interpreted`."""
    if not is_interpreted():
        return None
    if hasattr(plgpu, "InterpretParams"):
        return plgpu.InterpretParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # before 0.11

    return InterpretGPUParams()


def most_blocks_of_a_cluster() -> int:
    """One where the interpreter has no clusters, before 0.11; two otherwise."""
    return 1 if is_interpreted() and not hasattr(plgpu, "InterpretParams") else 2


def named_kernel(body: Callable[..., None], name: str, **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel`, interpreted inside of `interpreted`; profiles show the name."""
    body.__name__ = name
    interpret = interpret_mode()
    if interpret is not None:
        options["interpret"] = interpret
    return plgpu.kernel(body, **options)


def load_rows(ref: Any, layout: Any) -> Any:
    """Reads global memory into registers in a layout of few values for each thread."""
    load: Any = plgpu.load
    index = signature(load).parameters.get("idx")
    required = index is not None and index.default is Parameter.empty  # before 0.11
    return load(ref, *([()] if required else []), layout=layout, optimized=False)


def transposed(ref: Any) -> Any:
    """A two-dimensional view with its dimensions exchanged."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def hopper_refusal(dtype: Any, *, forced: bool) -> str | None:
    """Why the Hopper kernels cannot serve operands of this dtype here; None if they can.

    "Here" is the first device of the default platform; a program for another one, such as a mesh of
    CPU devices on a GPU host, should name its backend.

    Args:
        dtype: of the operands.
        forced: the backend was asked for by name, so that the device is not looked at: such a
            program may be lowered for another machine, or interpreted.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"operands are {jnp.dtype(dtype).name}, not bfloat16"
    device = jax.devices()[0]
    hopper = device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"
    if not forced and not hopper:
        return f"the device is {device.device_kind!r}, no NVIDIA GPU of capability 9.0"
    return None


def sm_count() -> int:
    """Streaming multiprocessors of the default device; an H100's where there is none."""
    if is_interpreted():
        return INTERPRETED_SMS
    return int(getattr(jax.devices()[0], "core_count", None) or H100_SMS)
