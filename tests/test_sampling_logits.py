"""Penalties, forbidden ids and log-probabilities against loops over tokens in float64."""

import jax
import numpy as np
import pytest

from moejax.inference.logits import Penalties, forbid, penalized, top_logprobs
from moejax.inference.params import SamplingParams
from moejax.inference.sampling import RowSettings, sample

IDS = 17
run = jax.jit(penalized)


def penalized_by_hand(logits, prompt, made, params):
    out = logits.astype(np.float64).copy()
    for token in {*prompt, *made}:
        factor = params.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in made:
        out[token] -= params.frequency_penalty
    for token in set(made):
        out[token] -= params.presence_penalty
    return out


def test_penalties(rng):
    rows, places = 6, 20
    for _ in range(10):
        logits = (rng.normal(size=(rows, IDS)) * 3).astype(np.float32)
        tokens = rng.integers(0, IDS, (rows, places)).astype(np.int32)
        lengths = rng.integers(0, places + 1, rows).astype(np.int32)
        prompts = np.array([rng.integers(0, n + 1) for n in lengths], np.int32)
        params = [
            SamplingParams(
                presence_penalty=float(rng.choice([0, rng.uniform(-2, 2)])),
                frequency_penalty=float(rng.choice([0, rng.uniform(-2, 2)])),
                repetition_penalty=float(rng.choice([1, rng.uniform(0.5, 2)])),
            )
            for _ in range(rows - 1)
        ]
        for i, length in enumerate(lengths):
            tokens[i, length:] = rng.choice([-1, IDS, 3])  # what follows is not read
        got = run(logits, tokens, prompts, lengths, Penalties.of([*params, None]))
        for i, (param, n, length) in enumerate(zip(params, prompts, lengths)):
            row = tokens[i].tolist()
            expected = penalized_by_hand(logits[i], row[:n], row[n:length], param)
            np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got[-1], logits[-1])


def test_no_penalty_leaves_the_bits(rng):
    logits = rng.normal(size=(2, IDS)).astype(np.float32)
    tokens = rng.integers(0, IDS, (2, 5)).astype(np.int32)
    one, five = np.full(2, 1, np.int32), np.full(2, 5, np.int32)
    for second in (None, SamplingParams(presence_penalty=1.5)):
        got = run(logits, tokens, one, five, Penalties.of([None, second]))
        np.testing.assert_array_equal(got[0], logits[0])
    assert np.any(got[1] != logits[1])


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e3, 1e30])
def test_forbidden_ids_stay_forbidden_under_penalties(factor, rng):
    logits = rng.normal(size=(1, IDS)).astype(np.float32)
    logits[0, 4] = -1e30
    tokens = np.arange(IDS, dtype=np.int32)[None]
    params = SamplingParams(repetition_penalty=factor, temperature=2.0)
    zero, full = np.zeros(1, np.int32), np.full(1, IDS, np.int32)
    got = run(logits, tokens, zero, full, Penalties.of([params]))
    assert np.all(np.isfinite(got)) and got[0, 4] == np.float32(-1e30)
    rows = np.broadcast_to(got, (512, IDS))
    drawn = sample(rows, np.arange(512, dtype=np.int32), RowSettings.of([(params, 1, 0)] * 512))
    assert 4 not in np.asarray(drawn)


def test_forbid(rng):
    logits = rng.normal(size=(3, IDS)).astype(np.float32)
    active = np.array([True, False, True])
    got = np.asarray(jax.jit(forbid)(logits, np.array([2, -1, 16, IDS], np.int32), active))
    expected = logits.copy()
    expected[[0, 2], 2] = expected[[0, 2], 16] = -1e30
    np.testing.assert_array_equal(got, expected)

    each = np.array([[0, 1], [2, 3], [-1, 5]], np.int32)
    got = np.asarray(jax.jit(forbid)(logits, each, active))
    expected = logits.copy()
    expected[0, [0, 1]] = expected[2, 5] = -1e30
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_top_logprobs(k, rng):
    logits = (rng.normal(size=(4, IDS)) * 3).astype(np.float32)
    logits[0] = 0.5  # all equal: the lowest ids
    logits[1, 3:] = -1e30
    token = rng.integers(0, 3, 4).astype(np.int32)
    own, ids, best = jax.jit(top_logprobs, static_argnums=2)(logits, token, k)
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True))
    exact -= logits.max(-1, keepdims=True)
    np.testing.assert_allclose(own, exact[np.arange(4), token], rtol=1e-5, atol=1e-5)
    for i in range(4):
        order = sorted(range(IDS), key=lambda j: (-logits[i, j], j))[:k]
        assert ids[i].tolist() == order
        np.testing.assert_allclose(best[i], exact[i, order], rtol=1e-5, atol=1e-5)
    assert ids.dtype == np.int32 and ids.shape == best.shape == (4, k)
