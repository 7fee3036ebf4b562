"""Merging of experts: averages in one order of units, and output projections fitted again."""

import numpy as np
import pytest
from compress_support import (
    joined,
    permuted,
    random_experts,
    random_sample,
    true_hidden,
    true_layer,
    true_output,
)

from moejax.compress import outputs
from moejax.compress.clusters import cluster, frequencies, score_mass
from moejax.compress.experts import Sample
from moejax.compress.merge import merge
from moejax.compress.similarity import (
    match_units,
    output_similarity,
    parameter_similarity,
)
from moejax.errors import UserError

ARRAYS = ("w_in_EDNH", "w_out_EHD", "b_in_ENH", "b_out_ED")


@pytest.mark.parametrize("activation,biases", [("swiglu", False), ("gelu", True)])
def test_the_same_expert_in_another_order(rng, activation, biases):
    experts = random_experts(rng, activation, biases, E=3)
    order = rng.permutation(6)
    twins = joined(experts, permuted(experts, 1, order))
    similarity = parameter_similarity(twins)
    assert similarity[1, 3] == pytest.approx(1, abs=2e-6)
    assert (parameter_similarity(twins, aligned=False)[1, 3] < 0.999) == (order != range(6)).any()
    assert output_similarity(twins, random_sample(rng, 20, 4))[1, 3] == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(match_units(twins.take([3]), twins.take([1])), order)
    table = cluster(similarity, count=3)
    assert table.tolist() == [0, 1, 2, 1]
    sample = random_sample(rng, 60, 4)
    merged = merge(twins, table, sample, refit=False)
    np.testing.assert_allclose(
        true_layer(merged, sample, table), true_layer(twins, sample), rtol=1e-6, atol=1e-5
    )
    refitted = merge(twins, table, sample)
    np.testing.assert_allclose(refitted.w_out_EHD, merged.w_out_EHD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "activation,biases", [("swiglu", False), ("gelu", True), ("swiglu_oai", True)]
)
@pytest.mark.parametrize("weights", ["frequency", "score"])
def test_average_by_use_in_the_order_of_the_most_used(rng, activation, biases, weights):
    experts = random_experts(rng, activation, biases, E=3)
    sample = random_sample(rng, 50, 3)
    used = (frequencies if weights == "frequency" else score_mass)(sample, 3)
    first = int(used.argmax())
    merged = merge(experts, np.zeros(3, np.int32), sample, refit=False, weights=weights)
    reference = experts.take([first])
    orders = [match_units(reference, experts.take([e])) for e in range(3)]
    assert orders[first].tolist() == list(range(6))
    for name, axis in (("w_in_EDNH", -1), ("w_out_EHD", 0), ("b_in_ENH", -1), ("b_out_ED", None)):
        array, ours = getattr(experts, name), getattr(merged, name)
        if array is None:
            assert ours is None
            continue
        placed = [a if axis is None else np.take(a, o, axis) for a, o in zip(array, orders)]
        assert ours.dtype == np.float32 and len(ours) == 1
        true = np.tensordot(used, np.stack(placed).astype(np.float64), 1)
        np.testing.assert_allclose(ours[0], true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "activation,biases", [("swiglu", False), ("gelu", True), ("swiglu_oai", True)]
)
def test_refit_is_least_squares(rng, monkeypatch, activation, biases):
    monkeypatch.setattr(outputs, "_NUMBERS_AT_ONCE", 2000)
    experts = random_experts(rng, activation, biases, E=4)
    sample = random_sample(rng, 150, 4)
    table = np.array([0, 1, 0, 0], np.int32)
    plain = merge(experts, table, sample, refit=False)
    rows, targets = [], []
    for t, x in enumerate(sample.x_TD):
        scores = sample.weights(4)[t].astype(np.float64) * (table == 0)
        if scores.any():
            hidden = true_hidden(plain, 0, x)
            rows.append(scores.sum() * (np.append(hidden, 1) if biases else hidden))
            targets.append(sum(scores[e] * true_output(experts, e, x) for e in (0, 2, 3)))
    rows, targets = np.stack(rows), np.stack(targets)

    def projection(bank):
        last = bank.b_out_ED[:1] if biases else np.zeros((0, 8), np.float32)
        return np.concatenate([bank.w_out_EHD[0], last]).astype(np.float64)

    exact = np.linalg.lstsq(rows, targets, rcond=None)[0]
    fitted = merge(experts, table, sample, ridge=1e-6)
    # float32 outputs, 1e-6 of the largest, through a system of this condition.
    slack = 2e-6 * np.abs(targets).max() / np.linalg.svd(rows)[1].min() * np.sqrt(len(rows))
    np.testing.assert_allclose(projection(fitted), exact, rtol=1e-5, atol=slack)

    for ridge in (0.01, 10.0):
        fitted = merge(experts, table, sample, ridge=ridge)
        penalty = ridge * np.square(rows[:, :6]).sum() / len(rows)
        # The same as rows of their own: √penalty each, asking for the average.
        own = np.sqrt(penalty) * np.eye(rows.shape[1])
        true = np.linalg.lstsq(
            np.concatenate([rows, own]),
            np.concatenate([targets, own @ projection(plain)]),
            rcond=None,
        )[0]
        np.testing.assert_allclose(projection(fitted), true, rtol=1e-5, atol=slack)

        def error(bank):
            return np.square(rows @ projection(bank) - targets).sum()

        assert error(fitted) < error(plain)
        whole = [
            np.square(true_layer(bank, sample, table) - true_layer(experts, sample)).sum()
            for bank in (fitted, plain)
        ]
        assert whole[0] == pytest.approx(error(fitted), rel=1e-3)
        assert whole[1] == pytest.approx(error(plain), rel=1e-3)
    for name in ("w_in_EDNH", "b_in_ENH"):
        if getattr(plain, name) is not None:
            np.testing.assert_array_equal(getattr(fitted, name), getattr(plain, name))


def test_few_tokens_change_little(rng):
    experts, table = random_experts(rng, E=2), np.zeros(2, np.int32)
    few = Sample(
        random_sample(rng, 2, 2).x_TD, np.array([[0], [1]], np.int32), np.ones((2, 1), np.float32)
    )
    plain = merge(experts, table, few, refit=False).w_out_EHD
    moved = [
        np.linalg.norm(merge(experts, table, few, ridge=ridge).w_out_EHD - plain)
        for ridge in (1e-6, 10.0, 1e7)
    ]
    # The fit is shrunk to 1/(1 + ridge/T) or less: to a sixth with ridge = 10 and T = 2.
    assert moved[0] > 0.01 and moved[1] <= moved[0] / 5.9 and moved[2] <= moved[0] / 10**5 + 1e-6


@pytest.mark.parametrize("biases", [False, True])
def test_groups_of_one_stay_as_they_were(rng, biases):
    experts = random_experts(rng, "swiglu_oai", biases)
    before = {name: getattr(experts, name) for name in ARRAYS}
    before = {name: None if a is None else a.copy() for name, a in before.items()}
    sample = random_sample(rng, 30, 5)
    whole = merge(experts, np.arange(5, dtype=np.int32), sample)
    some = merge(experts, np.array([0, 1, 2, 1, 3], np.int32), sample)
    for name in ARRAYS:
        if before[name] is None:
            assert getattr(whole, name) is None and getattr(some, name) is None
            continue
        np.testing.assert_array_equal(getattr(experts, name), before[name])
        np.testing.assert_array_equal(getattr(whole, name), before[name])
        np.testing.assert_array_equal(getattr(some, name)[[0, 2, 3]], before[name][[0, 2, 4]])
        assert (getattr(some, name)[1] != before[name][1]).any()


def test_experts_never_chosen(rng):
    experts = random_experts(rng, "gelu", biases=True, E=4)
    sample = random_sample(rng, 30, 4)
    sample.experts_TK[...] = np.where(sample.experts_TK >= 2, 1, sample.experts_TK)
    sample.experts_TK[:, 1] = -1
    sample.scores_TK[:, 1] = 0
    merged = merge(experts, np.array([0, 0, 1, 1], np.int32), sample)
    for name in ARRAYS:
        assert np.isfinite(getattr(merged, name)).all()
    # 2 and 3 are never chosen: they count alike, and there is nothing to fit to.
    order = match_units(experts.take([2]), experts.take([3]))
    np.testing.assert_allclose(
        merged.w_out_EHD[1], (experts.w_out_EHD[2] + experts.w_out_EHD[3, order]) / 2, atol=1e-6
    )
    # One that is never chosen leaves nothing of itself.
    merged = merge(experts, np.array([0, 1, 1, 2], np.int32), sample)
    for name in ARRAYS:
        np.testing.assert_allclose(
            getattr(merged, name)[1], getattr(experts, name)[1], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "table,options,message",
    [
        ([0, 0, 2, 2, 3], {}, "must give each of 5 experts a group, numbered from 0 without gaps"),
        ([0, 0, 1], {}, "must give each of 5 experts a group"),
        ([-1, 0, 1, 2, 3], {}, "must give each of 5 experts a group"),
        ([0, 0, 0, 0, 1], {"ridge": 0.0}, "ridge=0.0: must be at least 1e-06"),
        ([0, 0, 0, 0, 1], {"weights": "mean"}, "weights='mean': choose one of frequency, score"),
    ],
)
def test_impossible_merges(rng, table, options, message):
    with pytest.raises(UserError, match=message):
        merge(random_experts(rng), np.array(table, np.int32), random_sample(rng, 9, 5), **options)
