"""Rows of numbers rounded to 8 or 4 bits in blocks, and back; sums of what several ranks sent.

Backends are tried in order; one that cannot serve a case raises NotImplementedError with the
reason. All give the same bytes and the same bits: see `pallas_kernels.quantize.format`.

What must move through memory, N numbers of float32 at 8 bits: `encode` reads 4 N bytes and writes
1.01 N (4 N more for the residual), `decode` the other way round; `add_up` of R ranks' rows of N / R
reads (R + 3) N / R and writes 4 N / R, or with the sum's bytes instead 1.01 N / R. An all-reduce of
32 Mi numbers (64 MiB of bfloat16) over 2 ranks: 168 + 101 + 168 MB, 0.11 ms at 4 TB/s; 101 + 67 +
168 MB where they come as bfloat16. Plain JAX reads the numbers twice, once for the largest.

Shape letters: R rows or ranks, N numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int32, UInt8, UInt32

from pallas_kernels import backends
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.quantize import reference, warp_codec
from pallas_kernels.quantize.format import Format

__all__ = ["BACKENDS", "add_up", "add_up_and_encode", "decode", "encode", "explain"]

BACKENDS = ("mosaic_gpu", "reference")


def _refusal(form: Format, rows: int, width: int) -> Callable[[str, bool], str | None]:
    def refusal(backend: str, forced: bool) -> str | None:
        if backend != "mosaic_gpu":
            return None
        # What is asked here is the device: the kernels take both kinds of numbers.
        reason = warp_codec.refusal(form, rows, width)
        return reason or hopper_refusal(jnp.bfloat16, forced=forced)

    return refusal


def explain(form: Format, rows: int, width: int) -> str:
    """One line: the backend that serves these sizes, and why those before it do not."""
    return backends.explain("quantize", BACKENDS, _refusal(form, rows, width))


def _module(backend: str | None, form: Format, rows: int, width: int) -> Any:
    refusal = _refusal(form, rows, width)
    chosen = backends.choose("quantize", BACKENDS, backend, refusal)
    return warp_codec if chosen == "mosaic_gpu" else reference


def encode(
    x_RN: Float32[Array, "R N"] | BFloat16[Array, "R N"],
    form: Format,
    key: UInt32[Array, "2"] | None = None,
    *,
    residual: bool = False,
    backend: str | None = None,
) -> tuple[UInt8[Array, "R bytes"], Float32[Array, "R N"] | None]:
    """The bytes of rows.

    Args:
        x_RN: whole blocks. A block with a NaN or an infinity arrives as NaN, one of less magnitude
            than 2⁻⁹⁰ as zeros.
        form: the format.
        key: rounds up with the probability that makes the mean right, by chance that is a function
            of key and position; None rounds to the nearest, to the even one of two.
        residual: whether to return what is lost, too.
        backend: one of `BACKENDS`; None tries them in order.

    Returns:
        uint8 [R, bytes]; and x minus what `decode` makes of it, float32, or None.

    Raises:
        NotImplementedError: no backend can serve this; the message has each one's reason.
    """
    return _module(backend, form, *x_RN.shape).encode(x_RN, form, key, residual=residual)


def decode(
    payload_RN: UInt8[Array, "R bytes"], form: Format, width: int, *, backend: str | None = None
) -> Float32[Array, "R N"]:
    """What `encode` made of rows of `width` numbers; `backend` as there."""
    module = _module(backend, form, len(payload_RN), width)
    return module.decode(payload_RN, form, width)


def add_up(
    payload_RN: UInt8[Array, "R bytes"],
    rows_RN: Float32[Array, "R N"] | BFloat16[Array, "R N"],
    me: Int32[Array, ""],
    form: Format,
    *,
    backend: str | None = None,
) -> Float32[Array, " N"]:
    """The sum over ranks, in their order: what they sent, and of this rank what it has.

    Args:
        payload_RN: by rank; this one's row is not looked at.
        rows_RN: of them row `me` is this rank's term.
        me: this rank.
        form: of the payload.
        backend: as for `encode`.
    """
    return _module(backend, form, *rows_RN.shape).add_up(payload_RN, rows_RN, me, form)


def add_up_and_encode(
    payload_RN: UInt8[Array, "R bytes"],
    rows_RN: Float32[Array, "R N"] | BFloat16[Array, "R N"],
    me: Int32[Array, ""],
    form: Format,
    key: UInt32[Array, "2"] | None = None,
    *,
    residual: bool = False,
    backend: str | None = None,
) -> tuple[UInt8[Array, "1 bytes"], Float32[Array, "1 N"] | None]:
    """`encode` of `add_up`, in one pass; the sum itself is not written."""
    module = _module(backend, form, *rows_RN.shape)
    if module is reference:
        total_1N = reference.add_up(payload_RN, rows_RN, me, form)[None]
        return reference.encode(total_1N, form, key, residual=residual)
    return warp_codec.add_up_and_encode(payload_RN, rows_RN, me, form, key, residual=residual)
