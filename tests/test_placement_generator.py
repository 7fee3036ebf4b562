"""The generator of traffic: seeded, and it draws what it says."""

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.placement.evaluate import cut
from moejax.placement.generator import drift, generate, make_traffic
from moejax.placement.statistics import statistics_of


def test_generator_is_seeded(rng):
    seed = int(rng.integers(1 << 30))
    traffic = make_traffic(32, 2, seed=seed)
    one, two = (generate(traffic, 300, seed=seed) for _ in range(2))
    assert np.array_equal(one.experts_NLK, two.experts_NLK)
    assert np.array_equal(one.lens, two.lens)
    assert not np.array_equal(one.experts_NLK, generate(traffic, 300, seed=seed + 1).experts_NLK)
    other = make_traffic(32, 2, seed=seed + 1)
    assert not np.array_equal(other.popularity_LE, traffic.popularity_LE)
    assert not np.array_equal(traffic.cluster_LE[0], traffic.cluster_LE[1])


def test_generator_draws_what_it_says(rng):
    """Chances of a single choice: share in the cluster, the rest by popularity; clusters alike."""
    seed = int(rng.integers(1 << 30))
    traffic = make_traffic(16, 1, choices=1, share=0.6, seed=seed)
    assert np.allclose(traffic.popularity_LE.sum(1), 1)
    ratio = np.sort(traffic.popularity_LE[0])[::-1]
    np.testing.assert_allclose(ratio[0] / ratio, np.arange(1, 17) ** 0.8)
    popular, cluster = traffic.popularity_LE[0], traffic.cluster_LE[0]
    clusters = cluster.max() + 1
    chance = 0.4 * popular
    for c in range(clusters):
        inside = np.where(cluster == c, popular, 0)
        chance += 0.6 * inside / inside.sum() / clusters
    tokens = 40_000
    load = statistics_of(generate(traffic, tokens, seed=seed)).load_LE[0] / tokens
    assert abs(load - chance).max() < 6 * np.sqrt(chance.max() / tokens)


def test_generator_clusters(rng):
    """Choices of one token come from one cluster far more often than by chance."""
    seed = int(rng.integers(1 << 30))
    within = []
    for share in (0.0, 0.5, 0.9):
        traffic = make_traffic(64, 16, share=share, seed=seed)  # layers are drawn independently
        pairs = statistics_of(generate(traffic, 400, seed=seed)).pairs_LEE
        within.append(1 - cut(pairs, traffic.cluster_LE).mean())
    # Of one layer by 0.11 and 0.45 in the mean, with deviations of 0.03 and 0.05 over traffics.
    assert within[0] < within[1] - 0.05 < within[2] - 0.2
    trace = generate(make_traffic(64, 2, choices=64, seed=seed), 20, mean_length=3, seed=seed)
    assert (np.sort(trace.experts_NLK, axis=2) == np.arange(64)).all()
    assert len(trace.lens) > 1 and (trace.lens > 0).all()


def test_drift(rng):
    traffic = make_traffic(64, 2, seed=int(rng.integers(1 << 30)))
    same = drift(traffic, 0.0)
    np.testing.assert_allclose(same.popularity_LE, traffic.popularity_LE)
    assert np.array_equal(same.cluster_LE, traffic.cluster_LE)
    away = drift(traffic, 0.3, seed=1)
    changed = (away.cluster_LE != traffic.cluster_LE).mean()
    assert 0.05 < changed < 0.5
    for old, new in zip(traffic.cluster_LE, away.cluster_LE):
        assert np.array_equal(np.bincount(old), np.bincount(new))
    assert not np.allclose(away.popularity_LE, traffic.popularity_LE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: make_traffic(8, choices=9),
        lambda: make_traffic(8, share=1.5),
        lambda: make_traffic(8, cluster_size=0.5),
        lambda: generate(make_traffic(8), 0),
        lambda: drift(make_traffic(8), 2.0),
    ],
)
def test_generator_refuses(call):
    with pytest.raises(UserError):
        call()
