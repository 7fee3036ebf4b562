"""What experts matter, which are kept, and how many in each layer, against brute force."""

from itertools import product

import numpy as np
import pytest
from compress_support import ACTIVATIONS, random_experts, random_sample, true_output

from moejax.compress import outputs
from moejax.compress.budget import share_out, share_out_merges
from moejax.compress.clusters import cluster, frequencies, merge_heights, score_mass
from moejax.compress.prune import keep, saliency
from moejax.errors import UserError


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True])
def test_reap_is_the_mean_over_the_experts_own_tokens(rng, monkeypatch, activation, biases):
    monkeypatch.setattr(outputs, "_NUMBERS_AT_ONCE", 100)
    experts = random_experts(rng, activation, biases)
    sample = random_sample(rng, 40, 4)  # expert 4 is never chosen
    true = np.zeros(5)
    for e in range(4):
        terms = [
            float(sample.scores_TK[t, k]) * np.linalg.norm(true_output(experts, e, sample.x_TD[t]))
            for t, k in product(range(40), range(2))
            if sample.experts_TK[t, k] == e
        ]
        true[e] = np.mean(terms)
    got = saliency(experts, sample)
    assert got.dtype == np.float64 and got[4] == 0
    np.testing.assert_allclose(got, true, rtol=2e-5)


def test_other_saliencies(rng):
    experts, sample = random_experts(rng), random_sample(rng, 30, 5)
    np.testing.assert_array_equal(saliency(experts, sample, "frequency"), frequencies(sample, 5))
    np.testing.assert_array_equal(saliency(experts, sample, "score"), score_mass(sample, 5))
    with pytest.raises(UserError, match="method='norm': choose one of reap, frequency, score"):
        saliency(experts, sample, "norm")
    sample.experts_TK[0, 0] = 7
    with pytest.raises(UserError, match="names expert 7, the layer has 5"):
        saliency(experts, sample)


def test_a_sample_without_choices_gives_zero(rng):
    sample = random_sample(rng, 6, 5)
    sample.experts_TK[...] = -1
    for method in ("reap", "frequency", "score"):
        assert not saliency(random_experts(rng), sample, method).any()


def test_the_most_important_are_kept(rng):
    values = rng.random(12)
    for count in range(1, 13):
        kept = keep(values, count)
        assert len(kept) == count and (np.diff(kept) > 0).all()
        others = np.setdiff1d(np.arange(12), kept)
        assert not len(others) or values[kept].min() > values[others].max()
    assert keep(np.array([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]
    few = rng.integers(0, 3, 300).astype(np.float64)
    order = sorted(range(300), key=lambda e: (-few[e], e))
    assert keep(few, 150).tolist() == sorted(order[:150])


@pytest.mark.parametrize("count", [0, 5, -1])
def test_impossible_count(count):
    with pytest.raises(UserError, match=f"count={count}: of 4 experts between 1 and 4 are kept"):
        keep(np.ones(4), count)


def test_saliency_that_is_not_a_number():
    with pytest.raises(UserError, match=r"saliency_E\[2\]=nan"):
        keep(np.array([1, 2, np.nan]), 2)


def test_budget_keeps_most_of_the_importance(rng):
    layers = [rng.exponential(size=size) * scale for size, scale in ((5, 1), (4, 100), (6, 0.01))]
    shares = [np.sort(values / values.sum())[::-1] for values in layers]
    for minimum, total in product((1, 2), range(6, 16)):
        counts = share_out(layers, total, minimum)
        assert sum(counts) == total and min(counts) >= minimum
        best = max(
            sum(s[:c].sum() for s, c in zip(shares, option))
            for option in product(range(minimum, 6), range(minimum, 5), range(minimum, 7))
            if sum(option) == total
        )
        assert sum(s[:c].sum() for s, c in zip(shares, counts)) == pytest.approx(best, rel=1e-12)


def test_budget_with_ties_is_even():
    assert share_out([np.ones(8)] * 4, 16, 2) == [4, 4, 4, 4]
    assert share_out([np.ones(8)] * 4, 18, 2) == [5, 5, 4, 4]
    # A layer that nothing reached has its minimum only.
    assert share_out([np.zeros(8), np.ones(8)], 10, 2) == [2, 8]


def test_merging_budget_merges_the_most_similar_first(rng):
    matrices = []
    for size in (5, 4, 6):
        matrix = rng.uniform(-1, 1, (size, size))
        matrices.append((matrix + matrix.T) / 2 + np.eye(size) * (1 - np.diag(matrix)))
    uses = [rng.dirichlet(np.ones(size)) for size in (5, 4, 6)]
    by_use = share_out_merges(matrices, 9, 2, uses)
    spared = [merge_heights(*pair)[::-1] for pair in zip(matrices, uses)]
    done = np.concatenate([h[c - 1 :] for h, c in zip(spared, by_use)])
    left = np.concatenate([h[1 : c - 1] for h, c in zip(spared, by_use)])  # but for the minimum
    assert sum(by_use) == 9 and (not len(left) or done.max() <= left.min())
    heights = [merge_heights(matrix) for matrix in matrices]
    for minimum, total in product((1, 2), range(6, 16)):
        counts = share_out_merges(matrices, total, minimum)
        assert sum(counts) == total and min(counts) >= minimum
        best = min(
            sum(h[: len(h) + 1 - c].sum() for h, c in zip(heights, option))
            for option in product(range(minimum, 6), range(minimum, 5), range(minimum, 7))
            if sum(option) == total
        )
        cost = sum(h[: len(h) + 1 - c].sum() for h, c in zip(heights, counts))
        assert cost == pytest.approx(best, rel=1e-12)
        for matrix, count in zip(matrices, counts):
            assert cluster(matrix, count=count).max() + 1 == count
    alike = [np.full((4, 4), 0.9), np.eye(4)]  # the first layer's experts are alike
    assert share_out_merges(alike, 5, 1) == [1, 4]
    assert share_out_merges(alike, 6, 2) == [2, 4]
    # As unlike in both, but in the second layer three are seldom used.
    uses = [np.full(4, 0.25), np.array([0.97, 0.01, 0.01, 0.01])]
    assert share_out_merges([np.eye(4)] * 2, 5, 1, uses) == [4, 1]
    assert share_out_merges([np.eye(4)] * 2, 5, 1) == [3, 2]


@pytest.mark.parametrize(
    "total,minimum,message",
    [
        (3, 2, r"total=3: 2 layers of 9 experts together keep between 4 \(2 each\) and 9"),
        (10, 2, "total=10: 2 layers of 9 experts"),
        (8, 0, r"minimum=0: layers of \[4, 5\] experts keep at least 1"),
        (9, 5, r"minimum=5: layers of \[4, 5\] experts keep at least 1"),
    ],
)
def test_impossible_budgets(total, minimum, message):
    with pytest.raises(UserError, match=message):
        share_out([np.ones(4), np.ones(5)], total, minimum)
    with pytest.raises(UserError, match=message):
        share_out_merges([np.eye(4), np.eye(5)], total, minimum)


@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf])
def test_impossible_importance(bad):
    with pytest.raises(UserError, match=r"importances\[1\] reaches from"):
        share_out([np.ones(3), np.array([1.0, bad, 2.0])], 4, 1)
