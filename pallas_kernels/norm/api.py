"""RMSNorm of the residual stream (arXiv 1910.07467), with the sum that comes before it.

y = scale · s / √(mean(s²) + eps) with s = x + other; the arithmetic is float32, s is rounded to x's
dtype before it is normalised. What must move, in passes over the rows: forward 4 with a sum, 2
without; backward 2, and 1 for each cotangent. XLA's programs read a row once for its mean and
again for its result: 1.25 to 1.6 times as much.

Shape letters: D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Float32

from pallas_kernels import backends
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.norm import reference, warp_norm

__all__ = ["BACKENDS", "add_and_normalize", "explain", "normalize_backward"]

BACKENDS = ("mosaic_gpu", "reference")


def _refusal(count: int, width: int, dtype: Any) -> Callable[[str, bool], str | None]:
    def refusal(backend: str, forced: bool) -> str | None:
        if backend != "mosaic_gpu":
            return None
        return warp_norm.refusal(count, width) or hopper_refusal(dtype, forced=forced)

    return refusal


def explain(count: int, width: int, dtype: Any) -> str:
    """One line: the backend that serves these rows, and why those before it do not."""
    return backends.explain("norm", AUTOMATIC, _refusal(count, width, dtype))


AUTOMATIC: tuple[str, ...] = BACKENDS
"""Tried in this order where no backend is named; a benchmark that compares them changes it."""


def _module(x_D: jax.Array, backend: str | None) -> Any:
    count = x_D.size // max(1, x_D.shape[-1])
    refusal = _refusal(count, x_D.shape[-1], x_D.dtype)
    chosen = backends.choose("norm", AUTOMATIC if backend is None else BACKENDS, backend, refusal)
    return warp_norm if chosen == "mosaic_gpu" else reference


def add_and_normalize(
    x_D: Float[Array, "*rows D"],
    other_D: Float[Array, "*rows D"] | None,
    scale_D: Float32[Array, " D"],
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"], Float32[Array, "*rows 1"]]:
    """The sum of two streams and its RMSNorm.

    Args:
        x_D: any float dtype.
        other_D: is added, of x's dtype; None: nothing is, and x is returned as it is.
        scale_D: of the columns.
        eps: added to the mean square.
        backend: one of `BACKENDS`; None tries those that are `AUTOMATIC`.

    Returns:
        The sum; the sum normalised and scaled, both in x's dtype; 1 / √(mean square + eps).

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
    """
    return _module(x_D, backend).add_and_normalize(x_D, other_D, scale_D, eps)


def normalize_backward(
    x_D: Float[Array, "*rows D"],
    inverse_1: Float32[Array, "*rows 1"],
    scale_D: Float32[Array, " D"],
    ct_D: Sequence[Float[Array, "*rows D"]],
    passed_D: Float[Array, "*rows D"] | None,
    *,
    backend: str | None = None,
) -> tuple[Float[Array, "*rows D"], Float32[Array, " D"]]:
    """The gradients of `add_and_normalize`; those of its two terms are the same.

    Args:
        x_D: the sum.
        inverse_1: as the forward returned it.
        scale_D: of the columns.
        ct_D: cotangents of the normalised rows, one for each use, added up in float32.
        passed_D: the cotangent of the sum itself; None for 0.
        backend: as in the forward.

    Returns:
        The sum's in x's dtype, rounded once, and scale's.
    """
    module = _module(x_D, backend)
    return module.normalize_backward(x_D, inverse_1, scale_D, tuple(ct_D), passed_D)
