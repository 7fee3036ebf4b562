"""Attention of given queries, keys and values against float64 loops: windows, sinks, blocks."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from model_support import directional

from moejax.model import dot_attention
from moejax.model.dot_attention import SCORES_AT_ONCE, attend

B, S, N, M, H = 2, 11, 4, 2, 8
SCALE = 0.4


def oracle(p, scale, mask_BSL):
    """Loops over rows, heads and queries; zeros for a query that sees nothing."""
    q, k, v = p["q"], p["k"], p["v"]
    batch, queries, heads, _ = q.shape
    out = np.zeros((batch, queries, heads, v.shape[-1]))
    for b, s, n in np.ndindex(batch, queries, heads):
        keys = np.flatnonzero(mask_BSL[b, s])
        m = n // (heads // k.shape[2])
        logits = k[b, keys, m] @ q[b, s, n] * scale
        if "sinks" in p:
            logits = np.append(logits, p["sinks"][n])
        if logits.size:
            parts = np.exp(logits - logits.max())
            out[b, s, n] = (parts / parts.sum())[: len(keys)] @ v[b, keys, m]
    return out


def operands(rng, *, keys=S, width=H, sinks=False, scale=1.0):
    shapes = {"q": (B, S, N, H), "k": (B, keys, M, H), "v": (B, keys, M, width)}
    if sinks:
        shapes["sinks"] = (N,)
    return {k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}


def causal(window=None):
    before = np.arange(S)[:, None] - np.arange(S)
    seen = (before >= 0) & (before < (window or S))
    return np.broadcast_to(seen, (B, S, S))


def run(p, **settings):
    p = dict(p)
    return attend(p["q"], p["k"], p["v"], sinks_N=p.get("sinks"), **settings)


def check(rng, p, mask, **settings):
    """The value, and each operand's gradient along a direction of its own."""
    ct = rng.normal(size=(B, S, N, p["v"].shape[-1])).astype(np.float32)
    y, pull = jax.jit(lambda p: jax.vjp(lambda p: run(p, scale=SCALE, **settings), p))(p)
    grads = jax.jit(lambda ct: pull(ct)[0])(ct)
    wide = {k: a.astype(np.float64) for k, a in p.items()}
    np.testing.assert_allclose(y, oracle(wide, SCALE, mask), rtol=1e-5, atol=1e-5)
    for name in p:
        direction = {k: np.zeros_like(a) for k, a in wide.items()}
        direction[name] = rng.normal(size=p[name].shape)
        expected = directional(lambda q: np.sum(oracle(q, SCALE, mask) * ct), wide, direction)
        size = np.sqrt(np.sum(np.square(grads[name])) + 1.0)
        assert abs(np.sum(grads[name] * direction[name]) - expected) < 1e-4 * size, name


CASES = {
    "plain": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window longer than the text": {"window": S + 5},
    "sinks": {"sinks": True},
    "sinks, window": {"sinks": True, "window": 4},
    "sinks, window, wide values": {"sinks": True, "window": 2, "width": 12},
    "narrow values": {"width": 6},
    "narrow values, window": {"width": 6, "window": 5},
}


@pytest.mark.parametrize("at_once", [1, 3 * B * N * S, 2**26])
@pytest.mark.parametrize("name", CASES)
def test_causal(name, at_once, rng, monkeypatch):
    monkeypatch.setattr(dot_attention, "SCORES_AT_ONCE", at_once)
    case = dict(CASES[name])
    window = case.pop("window", None)
    check(rng, operands(rng, **case), causal(window), window=window)


@pytest.mark.parametrize("at_once", [1, 4 * B * N * 17, 2**26])
@pytest.mark.parametrize("sinks", [False, True])
def test_masks(sinks, at_once, rng, monkeypatch):
    """Of their own for each row, more keys than queries; a window is in them already."""
    monkeypatch.setattr(dot_attention, "SCORES_AT_ONCE", at_once)
    mask = rng.random((B, S, 17)) < 0.4
    mask[..., 3] = True
    check(rng, operands(rng, keys=17, sinks=sinks), mask, mask_BSL=mask, window=2)


@pytest.mark.parametrize("width", [H, 12])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_sees_nothing(sinks, width, rng):
    p = operands(rng, width=width, sinks=sinks)
    mask = np.array(causal())
    mask[0, 2] = mask[1, 7] = False
    y = run(p, scale=SCALE, mask_BSL=jnp.asarray(mask))
    grads = jax.grad(lambda p: jnp.sum(run(p, scale=SCALE, mask_BSL=jnp.asarray(mask))))(p)
    assert all(np.isfinite(g).all() for g in grads.values())
    want = oracle({k: a.astype(np.float64) for k, a in p.items()}, SCALE, mask)
    if not sinks:
        for b, s in (0, 2), (1, 7):
            want[b, s] = np.repeat(p["v"][b].mean(0), N // M, axis=0)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sinks", [-1e4, 0.0, 1e4])
def test_large_logits(sinks, rng):
    p = operands(rng, sinks=True, scale=30.0)
    p["sinks"] = np.full(N, sinks, np.float32)
    y, grads = jax.value_and_grad(lambda p: jnp.sum(run(p, scale=1.0)))(p)
    assert all(np.isfinite(g).all() for g in grads.values())
    want = oracle({k: a.astype(np.float64) for k, a in p.items()}, 1.0, causal())
    np.testing.assert_allclose(run(p, scale=1.0), want, rtol=2e-3, atol=2e-3)
    assert np.isfinite(y)


@pytest.mark.parametrize("at_once", [3 * B * N * S, 2**26])
def test_bfloat16(at_once, rng, monkeypatch):
    monkeypatch.setattr(dot_attention, "SCORES_AT_ONCE", at_once)
    p = operands(rng, sinks=True)
    short = {k: jnp.asarray(a, jnp.float32 if k == "sinks" else jnp.bfloat16) for k, a in p.items()}
    rounded = {k: np.asarray(a.astype(jnp.float32)) for k, a in short.items()}
    ct = np.asarray(jnp.asarray(rng.normal(size=(B, S, N, H)), jnp.bfloat16), np.float32)

    def results(p):
        y, pull = jax.vjp(lambda p: run(p, scale=SCALE, window=4), p)
        return {"y": y, **pull(jnp.asarray(ct).astype(y.dtype))[0]}

    exact = jax.jit(results)(rounded)
    for name, got in jax.jit(results)(short).items():
        assert got.dtype == (jnp.float32 if name == "sinks" else jnp.bfloat16)
        error = np.asarray(got, np.float32) - np.asarray(exact[name])
        assert np.linalg.norm(error) < 0.01 * np.linalg.norm(exact[name]), name


def sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("case", ["sinks", "window", "mask"])
def test_long_prompts_hold_few_scores(case):
    """8192 tokens, 64 heads: all scores would be 16 GiB."""
    tokens, heads = 8192, 64
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, k = shape((1, tokens, heads, 64)), shape((1, tokens, 8, 64))
    sinks = jax.ShapeDtypeStruct((heads,), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, tokens, tokens), bool) if case == "mask" else None
    window = 128 if case == "window" else None

    def loss(q, k, v, sinks, mask):
        sinks = None if mask is not None else sinks
        y = attend(q, k, v, scale=0.1, window=window, sinks_N=sinks, mask_BSL=mask)
        return jnp.sum(y.astype(jnp.float32))

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, k, sinks, mask)
    largest = max(sizes(traced.jaxpr))
    assert largest <= SCORES_AT_ONCE
    if case == "window":  # of a block's queries no more keys than it sees
        assert largest == tokens * heads * 64
