"""Sampling against a brute-force reading of the definitions, in numpy float64."""

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.inference.sampling import SamplingConfig, sample

DRAWS, IDS = 2048, 12
run = jax.jit(sample)


def draw(logits, config, *, requests=None, positions=None):
    rows = np.broadcast_to(np.asarray(logits, np.float32), (DRAWS, IDS))
    zeros, count = np.zeros(DRAWS, np.int32), np.arange(DRAWS, dtype=np.int32)
    requests = zeros if requests is None else np.asarray(requests, np.int32)
    positions = count if positions is None else np.asarray(positions, np.int32)
    return np.asarray(run(rows, requests, positions, config.arrays()))


def distribution(logits, config):
    """Probabilities float64 [V], and how close the filters came to keeping one more or less."""
    scaled = np.asarray(logits, np.float64) / config.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if config.top_k:
        order = order[: config.top_k]
    mass = sum(p[i] for i in order)
    kept, total, margin = [], 0.0, 1.0
    for i in order:  # the fewest that reach the mass
        if config.top_p < 1:
            margin = min(margin, abs(total / mass - config.top_p))
            if total / mass >= config.top_p:
                break
        kept.append(i)
        total += p[i]
    if config.min_p:
        margin = min(margin, *(abs(p[i] / p.max() - config.min_p) for i in range(len(p))))
    kept = [i for i in kept if p[i] >= config.min_p * p.max()]
    out = np.zeros(len(p))
    out[kept] = p[kept]
    return out / out.sum(), margin


def check_distribution(tokens, probabilities):
    counts = np.bincount(tokens, minlength=IDS)
    np.testing.assert_array_equal(counts[probabilities == 0], 0)
    expected = probabilities * len(tokens)
    common = expected > 5  # the chi-square approximation needs a few
    rest, rest_expected = counts[~common].sum(), expected[~common].sum()
    statistic = np.sum((counts[common] - expected[common]) ** 2 / expected[common])
    freedom, x = common.sum(), 20.0  # exceeded with probability e^-20 (Laurent and Massart 2000)
    assert statistic <= freedom + 2 * np.sqrt(freedom * x) + 2 * x, (counts, expected)
    assert rest <= rest_expected + 2 * np.sqrt(rest_expected * x) + 2 * x


def test_distribution_under_all_filters(rng):
    checked = 0
    for _ in range(25):
        logits = (rng.normal(size=IDS) * 2).astype(np.float32)
        config = SamplingConfig(
            temperature=float(rng.uniform(0.3, 3)),
            top_k=int(rng.choice([0, 0, 1, 3, 7, IDS, 100])),
            top_p=float(rng.choice([1.0, 1.0, 0.9, 0.5, 0.1])),
            min_p=float(rng.choice([0.0, 0.0, 0.05, 0.3])),
            seed=int(rng.integers(2**32)),
        )
        probabilities, margin = distribution(logits, config)
        if margin > 1e-5:
            check_distribution(draw(logits, config), probabilities)
            checked += 1
    assert checked >= 20


def test_the_oracle_itself_on_cases_done_by_hand():
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    for config, expected in [
        (SamplingConfig(1.0), [0.5, 0.25, 0.125, 0.125]),
        (SamplingConfig(1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(1.0, top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(1.0, min_p=0.3), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(0.5), np.array([16, 4, 1, 1]) / 22),
        # After top-k the mass is 0.75, of which the first alone is two thirds.
        (SamplingConfig(1.0, top_k=2, top_p=0.65), [1, 0, 0, 0]),
    ]:
        np.testing.assert_allclose(distribution(logits, config)[0], expected, atol=1e-12)


def test_ties_go_to_the_lowest_ids():
    level = np.zeros(IDS)
    assert set(draw(level, SamplingConfig(1.0, top_k=2))) == {0, 1}
    assert set(draw(level, SamplingConfig(1.0, top_p=0.5))) == set(range(IDS // 2))
    assert set(draw(level, SamplingConfig(1.0, min_p=1.0))) == set(range(IDS))
    assert set(draw(level, SamplingConfig(0.0))) == {0}


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(0.0, top_k=5, top_p=0.5, seed=3),
        SamplingConfig(2.0, top_k=1),
        SamplingConfig(2.0, top_p=1e-6),
        SamplingConfig(2.0, min_p=1.0),
        SamplingConfig(1e-30),
    ],
)
def test_settings_that_leave_only_the_best(config, rng):
    logits = rng.permutation(IDS) * 3.0
    assert set(draw(logits, config)) == {int(np.argmax(logits))}


def test_forbidden_ids_never_come(rng):
    logits = np.full(IDS, -1e30)
    logits[[2, 7]] = rng.normal(size=2)
    for config in (SamplingConfig(1.0), SamplingConfig(1e4), SamplingConfig(1.0, top_k=5)):
        assert set(draw(logits, config)) <= {2, 7}


def test_a_draw_depends_on_seed_request_and_position_alone(rng):
    logits = rng.normal(size=(DRAWS, IDS)).astype(np.float32)
    requests, positions = (rng.integers(0, 50, DRAWS).astype(np.int32) for _ in range(2))
    config = SamplingConfig(1.0, top_p=0.95, seed=int(rng.integers(2**32)))
    tokens = draw(logits, config, requests=requests, positions=positions)
    order = rng.permutation(DRAWS)
    moved = draw(logits[order], config, requests=requests[order], positions=positions[order])
    np.testing.assert_array_equal(moved, tokens[order])
    same = np.broadcast_to(logits[:1], logits.shape)
    base = draw(same, config, requests=requests)
    other = SamplingConfig(1.0, top_p=0.95, seed=(config.seed + 1) % 2**32)
    for changed in (
        draw(same, other, requests=requests),
        draw(same, config, requests=requests + 1),
        draw(same, config, requests=requests, positions=np.arange(DRAWS) + 1),
    ):
        assert np.mean(changed != base) > 0.05


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
