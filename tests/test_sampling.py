"""Sampling against a brute-force reading of the definitions, in numpy float64."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.inference.params import SamplingParams
from moejax.inference.sampling import RowSettings, SamplingConfig, _cut, sample

DRAWS, IDS = 2048, 12
run = jax.jit(sample)
GREEDY = SamplingParams(temperature=0)


def draw(logits, params, *, seed=0, index=0, positions=None):
    rows = np.broadcast_to(np.asarray(logits, np.float32), (DRAWS, IDS))
    positions = np.arange(DRAWS) if positions is None else positions
    indices = np.broadcast_to(index, DRAWS).tolist()
    settings = RowSettings.of([(params, seed, i) for i in indices])
    return np.asarray(run(rows, np.asarray(positions, np.int32), settings))


def distribution(logits, params):
    """Probabilities float64 [V], and how close the filters came to keeping one more or less.

    The filters in vLLM's order: `min_p`, then `top_k`, then `top_p` of what is left.
    """
    scaled = np.asarray(logits, np.float64) / params.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    margin = 1.0
    if params.min_p:
        margin = min(margin, *(abs(p[i] / p.max() - params.min_p) for i in order))
    order = [i for i in order if p[i] >= params.min_p * p.max()]
    if params.top_k:
        order = order[: params.top_k]
    mass = sum(p[i] for i in order)
    kept, total = [], 0.0
    for i in order:  # the fewest that reach the mass
        if params.top_p < 1:
            margin = min(margin, abs(total / mass - params.top_p))
            if total / mass >= params.top_p:
                break
        kept.append(i)
        total += p[i]
    out = np.zeros(len(p))
    out[kept] = p[kept]
    return out / out.sum(), margin


def check_distribution(tokens, probabilities):
    counts = np.bincount(tokens, minlength=len(probabilities))
    np.testing.assert_array_equal(counts[probabilities == 0], 0)
    expected = probabilities * len(tokens)
    common = expected > 5  # the chi-square approximation needs a few
    rest, rest_expected = counts[~common].sum(), expected[~common].sum()
    statistic = np.sum((counts[common] - expected[common]) ** 2 / expected[common])
    freedom, x = common.sum(), 20.0  # exceeded with probability e^-20 (Laurent and Massart 2000)
    assert statistic <= freedom + 2 * np.sqrt(freedom * x) + 2 * x, (counts, expected)
    assert rest <= rest_expected + 2 * np.sqrt(rest_expected * x) + 2 * x


def random_params(rng, **options):
    return SamplingParams(
        temperature=float(rng.uniform(0.3, 3)),
        top_k=int(rng.choice([0, -1, 1, 3, 7, IDS, 100])),
        top_p=float(rng.choice([1.0, 1.0, 0.9, 0.5, 0.1])),
        min_p=float(rng.choice([0.0, 0.0, 0.05, 0.3])),
        **options,
    )


def test_distribution_under_all_filters(rng):
    checked = 0
    for _ in range(25):
        logits = (rng.normal(size=IDS) * 2).astype(np.float32)
        params = random_params(rng)
        probabilities, margin = distribution(logits, params)
        if margin > 1e-5:
            tokens = draw(logits, params, seed=int(rng.integers(2**63)))
            check_distribution(tokens, probabilities)
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("size", [1, 2, 1000, pytest.param(5003, marks=pytest.mark.slow)])
def test_what_the_filters_keep_of_larger_vocabularies(rng, size):
    """Drawn hot, so that every id that is kept may come: none other does, and the last one does."""
    for params in (
        SamplingParams(temperature=4.0, top_k=40),
        SamplingParams(temperature=4.0, top_p=0.03),
        SamplingParams(temperature=4.0, top_k=60, top_p=0.9, min_p=0.01),
    ):
        logits = (rng.normal(size=size) * 2).astype(np.float32)
        probabilities, margin = distribution(logits, params)
        if margin < 1e-6:
            continue
        settings = RowSettings.of([(params, int(rng.integers(2**32)), 0)] * 512)
        rows = np.broadcast_to(logits, (512, size))
        positions = [np.arange(512, dtype=np.int32) + 512 * i for i in range(4)]
        tokens = np.concatenate([run(rows, p, settings) for p in positions])
        assert set(tokens) <= set(np.nonzero(probabilities)[0])
        if size > 1000:
            assert len(set(tokens)) > 0.7 * np.count_nonzero(probabilities)
        check_distribution(tokens, probabilities)


def test_the_oracle_itself_on_cases_done_by_hand():
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    for options, expected in [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"min_p": 0.3}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 0.5}, np.array([16, 4, 1, 1]) / 22),
        # After another filter the mass is 0.75, of which the first alone is two thirds.
        ({"top_k": 2, "top_p": 0.65}, [1, 0, 0, 0]),
        ({"min_p": 0.3, "top_p": 0.65}, [1, 0, 0, 0]),
    ]:
        np.testing.assert_allclose(
            distribution(logits, SamplingParams(**options))[0], expected, atol=1e-12
        )


def test_ties_go_to_the_lowest_ids(rng):
    level = np.zeros(IDS)
    assert set(draw(level, SamplingParams(top_k=2))) == {0, 1}
    assert set(draw(level, SamplingParams(top_p=0.5))) == set(range(IDS // 2))
    assert set(draw(level, SamplingParams(top_k=6, top_p=0.5))) == {0, 1, 2}
    assert set(draw(level, SamplingParams(min_p=1.0))) == set(range(IDS))
    assert set(draw(level, GREEDY)) == {0}
    few = rng.choice([-1.0, 0.0, 0.5], IDS)  # ties at several levels
    for k in range(1, IDS):
        order = sorted(range(IDS), key=lambda i: (-few[i], i))
        assert set(draw(few, SamplingParams(temperature=9.0, top_k=k))) == set(order[:k])


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0, top_k=5, top_p=0.5),
        SamplingParams(temperature=2.0, top_k=1),
        SamplingParams(temperature=2.0, top_p=1e-6),
        SamplingParams(temperature=2.0, top_p=1e-300),
        SamplingParams(temperature=2.0, min_p=1.0),
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=1e-300),
    ],
)
def test_settings_that_leave_only_the_best(params, rng):
    logits = rng.permutation(IDS) * 3.0
    assert set(draw(logits, params)) == {int(np.argmax(logits))}


def test_forbidden_ids_never_come(rng):
    logits = np.full(IDS, -1e30)
    logits[[2, 7]] = rng.normal(size=2)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1e4),
        SamplingParams(temperature=1e30, top_p=0.999),
        SamplingParams(top_k=5),
    ):
        assert set(draw(logits, params)) <= {2, 7}


def test_a_draw_depends_on_seed_index_and_position_alone(rng):
    logits = rng.normal(size=(DRAWS, IDS)).astype(np.float32)
    indices, positions = (rng.integers(0, 50, DRAWS).astype(np.int32) for _ in range(2))
    params, seed = SamplingParams(top_p=0.95), int(rng.integers(2**32))
    tokens = draw(logits, params, seed=seed, index=indices, positions=positions)
    order = rng.permutation(DRAWS)
    moved = draw(logits[order], params, seed=seed, index=indices[order], positions=positions[order])
    np.testing.assert_array_equal(moved, tokens[order])
    same = np.broadcast_to(logits[:1], logits.shape)
    base = draw(same, params, seed=seed, index=indices)
    for changed in (
        draw(same, params, seed=(seed + 1) % 2**32, index=indices),
        draw(same, params, seed=seed + 2**32, index=indices),
        draw(same, params, seed=-2 - seed, index=indices),
        draw(same, params, seed=seed, index=indices + 1),
        draw(same, params, seed=seed, index=indices, positions=np.arange(DRAWS) + 1),
    ):
        assert np.mean(changed != base) > 0.05


def test_a_row_does_not_depend_on_the_others(rng):
    """Whatever filters the neighbours use, and whether they draw at all."""
    size, rows = 997, 8
    for _ in range(12):
        logits = (rng.normal(size=(rows, size)) * 2).astype(np.float32)
        logits[:, ::3] = logits[:, :1]  # ties
        positions = rng.integers(0, 1000, rows).astype(np.int32)
        settings = [
            None if rng.random() < 0.3 else (random_params(rng), int(rng.integers(2**63)), i)
            for i in range(rows)
        ]
        together = np.asarray(run(logits, positions, RowSettings.of(settings)))
        for i in range(rows):
            alone = [None] * rows
            alone[i] = settings[i]
            got = np.asarray(run(logits, positions, RowSettings.of(alone)))
            assert got[i] == together[i]
            if settings[i] is None:
                assert got[i] == np.argmax(logits[i])


def test_what_is_not_asked_for_may_be_left_out(rng):
    """Programs without drawing, or without filters, give the tokens of the one with all."""
    rows = 12
    logits = rng.normal(size=(rows, IDS)).astype(np.float32)
    positions = rng.integers(0, 50, rows).astype(np.int32)
    greedy = RowSettings.of([None] * rows)
    drawn = RowSettings.of(
        [(SamplingParams(temperature=0.8, min_p=0.01 * (i % 2)), i, 1) for i in range(rows)]
    )
    filtered = RowSettings.of([(SamplingParams(top_k=2), i, 1) for i in range(rows)])
    for settings, options in (
        (greedy, {"draws": False}),
        (greedy, {"filters": False}),
        (drawn, {"filters": False}),
    ):
        got = jax.jit(partial(sample, **options))(logits, positions, settings)
        np.testing.assert_array_equal(got, run(logits, positions, settings))
    for settings, options in ((drawn, {"draws": False}), (filtered, {"filters": False})):
        got = jax.jit(partial(sample, **options))(logits, positions, settings)
        assert (np.asarray(got) != np.asarray(run(logits, positions, settings))).any()


def test_row_settings_are_numpy_of_the_right_types():
    settings = RowSettings.of([None, (SamplingParams(top_k=-1, top_p=0.5), 2**32 - 1, 3)])
    types = {f.name: getattr(settings, f.name).dtype.name for f in dataclasses.fields(settings)}
    assert types == {
        "temperature": "float32",
        "top_k": "int32",
        "top_p": "float32",
        "min_p": "float32",
        "seed": "uint32",
        "index": "int32",
    }
    assert settings.seed.tolist() == [0, 2**32 - 1] and settings.index.tolist() == [0, 3]
    assert settings.top_k.tolist() == [0, 0] and settings.temperature.tolist() == [0, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_settings_out_of_range(settings):
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=f"^{name}={value}: must "):
        SamplingConfig(**settings)


@pytest.mark.parametrize("lowest", [0, -1, -2, -3, -7, -100, -257])
def test_every_threshold_is_found(lowest):
    """One row for each threshold that can be: keys of every value, the weight on one of them."""
    keys = np.arange(lowest, 1, dtype=np.int32)
    rows = np.broadcast_to(keys, (len(keys), len(keys)))
    weights = np.eye(len(keys), dtype=np.float32)
    got = jax.jit(_cut, static_argnums=3)(rows, weights, np.ones(len(keys), np.float32), lowest)
    np.testing.assert_array_equal(got, keys)


def test_thresholds_over_all_bits(rng):
    keys = np.sort(-rng.integers(0, 2**31 - 1, (64, 50)).astype(np.int32), axis=1)
    want = rng.integers(0, 50, 64)
    ones = np.ones(keys.shape, np.float32)
    got = jax.jit(_cut, static_argnums=3)(keys, ones, 50.0 - want.astype(np.float32), -(2**31) + 1)
    for row, place, cut in zip(keys, want, np.asarray(got)):
        assert cut == min(k for k in row if np.sum(row > k) < 50 - place)
