"""A token's heads on NVIDIA GPUs: a warp has some of them at a time, 8 columns a lane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.compat import sm_count
from pallas_kernels.hopper.simt import LANES, launch
from pallas_kernels.hopper.simt_numbers import (
    float_word,
    lane_sum,
    load_eight,
    numbers_of,
    store_eight,
    words_of,
)

__all__ = ["backward", "forward", "refusal"]

COLUMNS = 8  # of a lane
WORDS = COLUMNS // 2
THREADS = 128
WARPS = THREADS // LANES
AT_ONCE = 6  # passes whose reads are under way together
MOST_TOKENS = 16  # of a warp, one after the other
WARPS_AT_ONCE = 16  # of a multiprocessor
SIGN = -(2**31)
INT_MAX = 2**31 - 1


def refusal(tokens: int, heads: int, head_dim: int) -> str | None:
    """Why the kernels cannot serve these sizes, or None."""
    if head_dim & (head_dim - 1) or not 2 * COLUMNS <= head_dim <= LANES * COLUMNS:
        return f"head_dim={head_dim} is no power of 2 from {2 * COLUMNS} to {LANES * COLUMNS}"
    if tokens * heads == 0:
        return "no tokens or no heads"
    if tokens * heads * head_dim > INT_MAX:
        return f"{tokens} x {heads} x {head_dim} numbers; positions are int32"
    return None


@dataclass(frozen=True)
class Share:
    """How the heads of T tokens lie over lanes, warps and passes.

    counts: heads of q, k and v.
    each: tokens of a warp, one after the other.
    """

    tokens: int
    counts: tuple[int, int, int]
    head_dim: int
    each: int

    @property
    def lanes(self) -> int:
        """Of a head."""
        return self.head_dim // COLUMNS

    @property
    def warps(self) -> int:
        """That have tokens."""
        return self.blocks * WARPS

    @property
    def blocks(self) -> int:
        """Of `THREADS` threads."""
        return -(-self.tokens // (self.each * WARPS))

    def passes(self) -> Iterator[list[tuple[int, int]]]:
        """(array, its first head), `AT_ONCE` at a time."""
        step = LANES // self.lanes
        every = [(i, head) for i in range(3) for head in range(0, self.counts[i], step)]
        for first in range(0, len(every), AT_ONCE):
            yield every[first : first + AT_ONCE]

    def own(self, m: Any, token: Any, array: int, head: int) -> tuple[Any, Any, Any]:
        """A lane's words in the array and in the joint product, and whether it has a head."""
        heads, words = sum(self.counts), self.head_dim // 2
        mine = m.lane // self.lanes + head
        at = m.lane % self.lanes * WORDS
        joint = (token * heads + mine + sum(self.counts[:array])) * words + at
        apart = (token * self.counts[array] + mine) * words + at
        return apart, joint, (mine < self.counts[array]) & (token < self.tokens)


def _share(tokens: int, counts: tuple[int, int, int], head_dim: int) -> Share:
    each = tokens // (sm_count() * WARPS_AT_ONCE)
    return Share(tokens, counts, head_dim, min(max(each, 1), MOST_TOKENS))


def _turn(m: Any, share: Share, cos: Any, sin: Any, token: Any) -> tuple[list[Any], list[Any]]:
    """A lane's cosines, and its sines with the sign that the partner's numbers get."""
    half = share.lanes // 2
    at = token * (share.head_dim // 2) + m.lane % half * COLUMNS
    there = token < share.tokens
    first = m.select(m.lane % share.lanes < half, SIGN, 0)
    return load_eight(m, cos, at, there), [sine ^ first for sine in load_eight(m, sin, at, there)]


def _rotate(m: Any, share: Share, words: list[Any], cos: list[Any], sin: list[Any]) -> list[Any]:
    """X · cos + partner · sin, float32, of bfloat16 pairs."""
    partner = [m.exchange(word, share.lanes // 2) for word in words]
    pairs = zip(numbers_of(m, words), numbers_of(m, partner), cos, sin, strict=True)
    return [m.float_add(m.float_mul(a, c), m.float_mul(b, s)) for a, b, c, s in pairs]


def _mean(m: Any, share: Share, numbers: Sequence[Any]) -> Any:
    """Over a head."""
    total = numbers[0]
    for number in numbers[1:]:
        total = m.float_add(total, number)
    total = lane_sum(m, total, share.lanes)
    return m.float_mul(total, float_word(m, 1.0 / share.head_dim))


def _inverse(m: Any, share: Share, x: Sequence[Any], eps: float) -> Any:
    return m.float_rsqrt(
        m.float_add(_mean(m, share, [m.float_mul(a, a) for a in x]), float_word(m, eps))
    )


def _columns(m: Any, share: Share, scales: Sequence[Any]) -> list[list[Any]]:
    at = m.lane % share.lanes * COLUMNS
    return [load_eight(m, ref, at, at >= 0) for ref in scales]


def _forward(m: Any, qkv: Any, cos: Any, sin: Any, *refs: Any, share: Share, eps: float) -> None:
    """One block. refs: maybe the two scales; q, k, v; the block."""
    *scales, q, k, v, block = refs
    factors, outputs = _columns(m, share, scales), (q, k, v)

    def one_token(turn: Any, nothing: list[Any]) -> list[Any]:
        token = (block * WARPS + m.warp) * share.each + turn
        cosines, sines = _turn(m, share, cos, sin, token)
        for some in share.passes():
            places = [share.own(m, token, *which) for which in some]
            read = [m.load_four(qkv, joint, there) for _, joint, there in places]
            for (array, _), (apart, _, there), words in zip(some, places, read, strict=True):
                if array < 2 and scales:
                    x = numbers_of(m, words)
                    inverse = _inverse(m, share, x, eps)
                    x = [m.float_mul(a, inverse) for a in x]
                    words = words_of(m, [m.float_mul(a, s) for a, s in zip(x, factors[array])])
                if array < 2:
                    words = words_of(m, _rotate(m, share, words, cosines, sines))
                m.store_four(outputs[array], apart, words, there)
        return nothing

    m.repeat(share.each, [], one_token)


def _backward(m: Any, qkv: Any, cos: Any, sin: Any, *refs: Any, share: Share, eps: float) -> None:
    """One block. refs: maybe the scales; cotangents; the product's, maybe the scales'; block."""
    normed = len(refs) > 5
    scales, cts = refs[: 2 * normed], refs[2 * normed : 2 * normed + 3]
    qkv_ct, *scale_ct, block = refs[2 * normed + 3 :]
    factors = _columns(m, share, scales)

    def one_token(turn: Any, sums: list[Any]) -> list[Any]:
        token = (block * WARPS + m.warp) * share.each + turn
        cosines, sines = _turn(m, share, cos, sin, token)
        back = [sine ^ SIGN for sine in sines]
        sums = list(sums)
        for some in share.passes():
            places = [share.own(m, token, *which) for which in some]
            read = [
                (
                    m.load_four(cts[array], apart, there),
                    m.load_four(qkv, joint, there) if normed and array < 2 else None,
                )
                for (array, _), (apart, joint, there) in zip(some, places, strict=True)
            ]
            for (array, _), (_, joint, there), pair in zip(some, places, read, strict=True):
                words, raw = pair
                if array < 2:
                    ct = _rotate(m, share, words, cosines, back)
                    if raw is not None:
                        x = numbers_of(m, raw)
                        inverse = m.select(there, _inverse(m, share, x, eps), 0)
                        unit = [m.float_mul(a, inverse) for a in x]
                        mine = slice(array * COLUMNS, (array + 1) * COLUMNS)
                        terms = map(m.float_mul, ct, unit)
                        sums[mine] = [m.float_add(a, b) for a, b in zip(sums[mine], terms)]
                        ct = [m.float_mul(a, s) for a, s in zip(ct, factors[array])]
                        along = _mean(m, share, list(map(m.float_mul, ct, unit)))
                        ct = [m.float_sub(a, m.float_mul(u, along)) for a, u in zip(ct, unit)]
                        ct = [m.float_mul(a, inverse) for a in ct]
                    words = words_of(m, ct)
                m.store_four(qkv_ct, joint, words, there)
        return sums

    sums = m.repeat(share.each, [float_word(m, 0.0)] * (2 * COLUMNS * normed), one_token)
    for array in range(2 * normed):
        at = ((block * WARPS + m.warp) * 2 + array) * (LANES * COLUMNS) + m.lane * COLUMNS
        store_eight(m, scale_ct[0], at, sums[array * COLUMNS : (array + 1) * COLUMNS], at >= 0)


def forward(
    qkv_THh: jax.Array,
    cos_Tp: jax.Array,
    sin_Tp: jax.Array,
    scales_h: tuple[jax.Array, jax.Array] | None,
    key_heads: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `api.heads_forward`."""
    tokens, heads, head_dim = qkv_THh.shape
    counts = (heads - 2 * key_heads, key_heads, key_heads)
    share = _share(tokens, counts, head_dim)
    q, k, v = launch(
        partial(_forward, share=share, eps=eps),
        "heads",
        blocks=share.blocks,
        threads=THREADS,
        inputs=[array.reshape(-1) for array in (qkv_THh, cos_Tp, sin_Tp, *(scales_h or ()))],
        out_type=[jax.ShapeDtypeStruct((tokens * n * head_dim,), qkv_THh.dtype) for n in counts],
    )
    return tuple(  # type: ignore[return-value]
        array.reshape(tokens, n, head_dim) for array, n in zip((q, k, v), counts, strict=True)
    )


def backward(
    qkv_THh: jax.Array,
    cos_Tp: jax.Array,
    sin_Tp: jax.Array,
    scales_h: tuple[jax.Array, jax.Array] | None,
    cts: tuple[jax.Array, jax.Array, jax.Array],
    eps: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """As `api.heads_backward`."""
    tokens, _, head_dim = qkv_THh.shape
    q_ct, k_ct, v_ct = cts
    share = _share(tokens, (q_ct.shape[1], k_ct.shape[1], v_ct.shape[1]), head_dim)
    out_type = [jax.ShapeDtypeStruct((qkv_THh.size,), qkv_THh.dtype)]
    if scales_h is not None:
        parts = share.warps * 2 * LANES * COLUMNS
        out_type.append(jax.ShapeDtypeStruct((parts,), jnp.float32))
    made = launch(
        partial(_backward, share=share, eps=eps),
        "heads_backward",
        blocks=share.blocks,
        threads=THREADS,
        inputs=[a.reshape(-1) for a in (qkv_THh, cos_Tp, sin_Tp, *(scales_h or ()), *cts)],
        out_type=out_type,
    )
    qkv_ct = made[0].reshape(qkv_THh.shape)
    if scales_h is None:
        return qkv_ct, None
    sums = made[1].reshape(share.warps, 2, LANES // share.lanes, head_dim).sum(axis=(0, 2))
    return qkv_ct, (sums[0], sums[1])
