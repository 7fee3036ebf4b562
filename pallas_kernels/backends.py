"""Choosing a backend of an operation: tried in order, each refusal with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.tpu.compat import tpu_refusal
from pallas_kernels.tpu.tiles import LANES

__all__ = ["choose", "explain", "kernel_refusal", "planned_for"]

planned_for: Any = jax.make_user_context(default_value="")
"""`with planned_for("mosaic_gpu"):` traces a program for devices that are not here, with their
kernels of grouped products. JAX keeps what it traces so apart from programs that are to run."""


def choose(
    operation: str,
    backends: Sequence[str],
    backend: str | None,
    refusal: Callable[[str, bool], str | None],
) -> str:
    """The first backend that serves.

    Args:
        operation: its name, for the message.
        backends: names, in order.
        backend: the only one to consider; None: all.
        refusal: (name, asked for by name) -> why it cannot serve, None if it can.

    Raises:
        NotImplementedError: none serves; the message has each one's reason.
    """
    reasons = []
    for name in backends if backend is None else (backend,):
        reason: str | None = f"unknown backend {name!r}; there are {', '.join(backends)}"
        if name in backends:
            reason = refusal(name, backend is not None)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{operation}: " + "; ".join(reasons))


def explain(
    operation: str, backends: Sequence[str], refusal: Callable[[str, bool], str | None]
) -> str:
    """One line: the backend that `choose` picks, and why not those before it."""
    lines: list[str] = []
    for name in backends:
        reason = refusal(name, False)
        if reason is None:
            return "; ".join([f"{operation}: {name}", *lines])
        lines.append(f"not {name}: {reason}")
    return "; ".join(lines)


def kernel_refusal(
    backend: str, sizes: Mapping[str, int], dtype: Any, *, forced: bool
) -> str | None:
    """Why grouped products of these operands cannot be a backend's kernels; None if they can.

    Args:
        backend: `mosaic_gpu` or `mosaic_tpu`.
        sizes: widths of the matrices, by name.
        dtype: of the operands.
        forced: do not look at the device, as for a backend that is `planned_for`.
    """
    forced = forced or backend == planned_for.value
    multiple, device_refusal = 64, hopper_refusal
    if backend == "mosaic_tpu":
        multiple, device_refusal = LANES, tpu_refusal
    for name, size in sizes.items():
        if size % multiple:
            return f"{name}={size} is no multiple of {multiple}"
    return device_refusal(dtype, forced=forced)
