"""From the joint product of tokens with w_q, w_k and w_v to what attention takes, and back.

RMSNorm of each head of q and k (Qwen3), the rotation of pairs half a head apart (arXiv 2104.09864
§3.4), v as it is. There is one backend: who has none of its devices composes `rms_normalize` and
`rotate`. What must move, T tokens of H heads of h numbers of b bytes: forward 2 T H h b; backward
3 T H h b without v's, which it does not read. XLA's programs read q and k twice in the forward and
three times in the backward, and the cotangents twice.

Shape letters: T tokens, H heads of all three (N queries, M keys, M values), h head dim, p = h / 2.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.backends import choose
from pallas_kernels.heads import warp_heads
from pallas_kernels.hopper.compat import hopper_refusal

__all__ = ["AUTOMATIC", "heads_backward", "heads_forward", "refusal"]

AUTOMATIC = True
"""Whether the kernels serve where nobody asks for them; a benchmark that compares changes it."""


def refusal(tokens: int, heads: int, head_dim: int, dtype: Any, *, forced: bool) -> str | None:
    """Why the kernels cannot serve this, or None.

    Args:
        tokens: T.
        heads: H.
        head_dim: h.
        dtype: of the product.
        forced: they were asked for, so that the device is not looked at.
    """
    reason = warp_heads.refusal(tokens, heads, head_dim)
    if reason is None and not (forced or AUTOMATIC):
        reason = "only on request"
    return reason or hopper_refusal(dtype, forced=forced)


def _check(qkv_THh: Any) -> None:
    tokens, heads, head_dim = qkv_THh.shape

    def reason(_: str, forced: bool) -> str | None:
        return refusal(tokens, heads, head_dim, qkv_THh.dtype, forced=forced)

    choose("heads", ("mosaic_gpu",), "mosaic_gpu", reason)


def heads_forward(
    qkv_THh: BFloat16[Array, "T H h"],
    cos_Tp: Float32[Array, "T p"],
    sin_Tp: Float32[Array, "T p"],
    scales_h: tuple[Float32[Array, " h"], Float32[Array, " h"]] | None,
    key_heads: int,
    eps: float,
) -> tuple[BFloat16[Array, "T N h"], BFloat16[Array, "T M h"], BFloat16[Array, "T M h"]]:
    """Queries and keys normalised, rounded and rotated; values as they are.

    Args:
        qkv_THh: heads of queries, then keys, then values.
        cos_Tp: of the angle of each pair.
        sin_Tp: likewise.
        scales_h: of the norms of q and k; None: they are not normalised.
        key_heads: M.
        eps: added to mean squares.

    Returns:
        q, k, v.

    Raises:
        NotImplementedError: the kernels cannot serve this; the message has the reason.
    """
    _check(qkv_THh)
    return warp_heads.forward(qkv_THh, cos_Tp, sin_Tp, scales_h, key_heads, eps)


def heads_backward(
    qkv_THh: BFloat16[Array, "T H h"],
    cos_Tp: Float32[Array, "T p"],
    sin_Tp: Float32[Array, "T p"],
    scales_h: tuple[Float32[Array, " h"], Float32[Array, " h"]] | None,
    cts: tuple[BFloat16[Array, "T N h"], BFloat16[Array, "T M h"], BFloat16[Array, "T M h"]],
    eps: float,
) -> tuple[BFloat16[Array, "T H h"], tuple[Float32[Array, " h"], Float32[Array, " h"]] | None]:
    """The gradients of `heads_forward`.

    Args:
        qkv_THh, cos_Tp, sin_Tp, scales_h, eps: as there.
        cts: cotangents of q, k and v.

    Returns:
        The product's, rounded once, and the scales'.
    """
    _check(qkv_THh)
    return warp_heads.backward(qkv_THh, cos_Tp, sin_Tp, scales_h, cts, eps)
