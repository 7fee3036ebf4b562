"""Heads normalised and rotated in one pass, forward and backward, against float64."""

import numpy as np
import pytest
from kernel_support import BFLOAT16, run

from pallas_kernels.heads import api, warp_heads

EPS = 1e-5
ULP = 2.0**-8  # half the distance of bfloat16 numbers, relative
CASES = [(5, 4, 2, 16, True), (7, 3, 1, 64, True), (9, 16, 4, 64, True), (3, 5, 5, 128, True)]
CASES += [(2, 2, 1, 256, True), (6, 8, 1, 32, False)]


def wide(x):
    return np.asarray(x, np.float64)


def turned(x, cos, sin):
    """[T, N, h] rotated by [T, h/2]."""
    a, b = np.split(x, 2, axis=2)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)


def draw(rng, tokens, queries, keys, head_dim):
    heads = queries + 2 * keys
    qkv = rng.normal(size=(tokens, heads, head_dim)) * np.exp(
        2 * rng.normal(size=(tokens, heads, 1))
    )
    qkv[rng.integers(tokens), rng.integers(heads)] = 0
    angles = rng.uniform(0, 6.3, (tokens, head_dim // 2))
    scales = rng.normal(1, 0.3, (2, head_dim)).astype(np.float32)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return qkv.astype(BFLOAT16), cos, sin, tuple(scales)


def unit_of(x):
    inverse = 1 / np.sqrt(np.square(x).mean(axis=2, keepdims=True) + EPS)
    return x * inverse, inverse


@pytest.mark.parametrize("tokens,queries,keys,head_dim,normed", CASES)
def test_forward(rng, tokens, queries, keys, head_dim, normed):
    qkv, cos, sin, scales = draw(rng, tokens, queries, keys, head_dim)
    got = run(
        lambda *a: api.heads_forward(*a[:3], a[3:] or None, keys, EPS),
        *(qkv, cos, sin, *(scales if normed else ())),
    )
    parts = np.split(qkv, [queries, queries + keys], axis=1)
    assert [g.shape for g in got] == [p.shape for p in parts]
    assert np.array_equal(got[2], parts[2])
    for made, x, scale in zip(got, parts, scales):
        x = wide(x)
        if normed:
            x = wide((unit_of(x)[0] * scale).astype(BFLOAT16))
        want = turned(x, wide(cos), wide(sin))
        # A number next to the middle of two may be rounded either way before it is turned.
        size = np.abs(x) + np.abs(np.roll(x, head_dim // 2, axis=2))
        assert (np.abs(wide(made) - want) <= ULP * np.abs(want) + normed * 2 * ULP * size).all()
        exact = np.abs(wide(made) - want) <= ULP * np.abs(want) + 1e-6 * size
        assert exact.mean() > 0.995


@pytest.mark.parametrize("tokens,queries,keys,head_dim,normed", CASES)
def test_backward(rng, tokens, queries, keys, head_dim, normed):
    qkv, cos, sin, scales = draw(rng, tokens, queries, keys, head_dim)
    parts = np.split(qkv, [queries, queries + keys], axis=1)
    cts = tuple(rng.normal(size=part.shape).astype(BFLOAT16) for part in parts)

    def function(qkv, cos, sin, *rest):
        return api.heads_backward(qkv, cos, sin, rest[:-3] or None, rest[-3:], EPS)

    got, got_scales = run(function, qkv, cos, sin, *(scales if normed else ()), *cts)
    assert got.dtype == BFLOAT16 and (got_scales is None) == (not normed)
    made = np.split(got, [queries, queries + keys], axis=1)
    assert np.array_equal(made[2], cts[2])
    for i in range(2):
        want = ct = turned(wide(cts[i]), wide(cos), -wide(sin))
        size = np.abs(ct)
        if normed:
            unit, inverse = unit_of(wide(parts[i]))
            scaled = ct * scales[i]
            want = inverse * (scaled - unit * (scaled * unit).mean(axis=2, keepdims=True))
            size = inverse * (np.abs(scaled) + np.abs(unit))
            terms = ct * unit
            error = np.abs(got_scales[i] - terms.sum(axis=(0, 1)))
            # The two products of a rotation may cancel: their sizes count, not the difference's.
            turning = np.abs(wide(cts[i])) + np.abs(np.roll(wide(cts[i]), head_dim // 2, axis=2))
            assert (error <= 1e-6 * np.abs(turning * unit).sum(axis=(0, 1)) + 1e-30).all()
        assert (np.abs(wide(made[i]) - want) <= ULP * np.abs(want) + 3e-6 * size).all()


def test_several_tokens_of_a_warp(rng, monkeypatch):
    monkeypatch.setattr(warp_heads, "WARPS_AT_ONCE", 1)
    monkeypatch.setattr(warp_heads, "sm_count", lambda: 4)
    assert warp_heads._share(45, (2, 1, 1), 16).each == 11
    test_backward(rng, 45, 2, 1, 16, True)
    test_forward(rng, 45, 2, 1, 16, True)


def test_what_is_refused():
    for head_dim in (8, 96, 512):
        reason = api.refusal(4, 3, head_dim, BFLOAT16, forced=True)
        assert reason == f"head_dim={head_dim} is no power of 2 from 16 to 256"
    assert "float32, not bfloat16" in (api.refusal(4, 3, 64, np.float32, forced=True) or "")
    with pytest.raises(NotImplementedError, match="head_dim=96"):
        api.heads_forward(np.zeros((2, 3, 96), BFLOAT16), None, None, None, 1, EPS)
