"""Output projections of a layer fitted together: never worse, and in the end least squares."""

from itertools import pairwise

import numpy as np
import pytest
from compress_support import random_experts, random_sample, true_hidden, true_layer

from moejax.compress import outputs
from moejax.compress.experts import Sample
from moejax.compress.joint_fit import fit_sum, fit_together
from moejax.compress.merge import merge
from moejax.errors import UserError

TABLE = np.array([0, 1, 0, 2, 1], np.int32)
# The gated ones and those of one projection, with and without biases.
CASES = [("swiglu", False), ("gelu", True), ("swiglu_oai", True), ("relu2", False)]


def square_error(experts, original, sample, table=TABLE):
    """Of the layer's output on the sample, in float64."""
    return np.square(true_layer(experts, sample, table) - true_layer(original, sample)).sum()


def features(experts, sample, table, biases):
    """[T, E'·F] in float64: each merged expert's summed score times its hidden activations."""
    weights = sample.weights(len(table)).astype(np.float64)
    blocks = []
    for one in range(experts.num_experts):
        hidden = np.stack([true_hidden(experts, one, x) for x in sample.x_TD])
        if biases:
            hidden = np.concatenate([hidden, np.ones((len(hidden), 1))], 1)
        blocks.append(weights[:, table == one].sum(1, keepdims=True) * hidden)
    return blocks


def projections(experts):
    """[E', F, D] in float64."""
    w = experts.w_out_EHD.astype(np.float64)
    return w if experts.b_out_ED is None else np.concatenate([w, experts.b_out_ED[:, None]], 1)


def penalties(blocks, sample, ridge):
    """One for each merged expert."""
    weights = sample.weights(len(TABLE))
    used = [weights[:, one == TABLE].any(1).sum() for one in range(len(blocks))]
    return [ridge * np.square(h[:, :6]).sum() / n for h, n in zip(blocks, used)]


@pytest.mark.parametrize("activation,biases", CASES)
def test_what_is_minimised_never_grows(rng, activation, biases):
    original = random_experts(rng, activation, biases)
    sample = random_sample(rng, 80, 5, top_k=3)
    merged = merge(original, TABLE, sample)
    errors = [square_error(merged, original, sample)]
    penalty = penalties(features(merged, sample, TABLE, biases), sample, 1.0)
    values = errors.copy()
    for sweeps in range(1, 5):
        fitted = fit_together(merged, original, TABLE, sample, sweeps=sweeps, ridge=1.0)
        errors.append(square_error(fitted, original, sample))
        moved = np.square(projections(fitted) - projections(merged)).sum((1, 2))
        values.append(errors[-1] + penalty @ moved)
    assert errors[1] < 0.99 * errors[0] and max(errors[1:]) < errors[0]
    # Squares of float32 outputs, some 1e-6 right.
    for before, after in pairwise(values):
        assert after <= before * (1 + 1e-5)
    for name in ("w_in_EDNH", "b_in_ENH"):
        if getattr(merged, name) is not None:
            np.testing.assert_array_equal(getattr(fitted, name), getattr(merged, name))


@pytest.mark.parametrize("activation,biases", CASES)
@pytest.mark.parametrize("ridge", [1e-6, 0.3, 10.0])
def test_in_the_end_it_is_least_squares_of_all(rng, activation, biases, ridge):
    original = random_experts(rng, activation, biases)
    sample = random_sample(rng, 200, 5, top_k=3)
    merged = merge(original, TABLE, sample)
    blocks = features(merged, sample, TABLE, biases)
    rows, target = np.concatenate(blocks, 1), true_layer(original, sample)
    given = np.concatenate(list(projections(merged)))
    # The penalty as rows of their own: its root each, asking for what was given.
    roots = np.sqrt(np.repeat(penalties(blocks, sample, ridge), blocks[0].shape[1]))
    system = np.concatenate([rows, np.diag(roots)])
    wanted = np.concatenate([target, roots[:, None] * given])

    def value(projection):
        return np.square(system @ projection - wanted).sum()

    best = value(np.linalg.lstsq(system, wanted, rcond=None)[0])
    assert best < 0.98 * value(given)  # there is something that a fit of each alone does not find
    fitted = fit_together(merged, original, TABLE, sample, sweeps=300, ridge=ridge)
    found = value(np.concatenate(list(projections(fitted))))
    # float32 products are some 1e-6 of the output off, which counts as a square at the optimum.
    assert best * (1 - 1e-9) <= found <= best + 1e-4 * (value(given) - best)


@pytest.mark.parametrize("activation,biases", CASES)
@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_a_sweep_is_one_ridge_system_after_the_other(rng, monkeypatch, activation, biases, ridge):
    monkeypatch.setattr(outputs, "_NUMBERS_AT_ONCE", 500)  # several parts of the tokens
    original = random_experts(rng, activation, biases)
    sample = random_sample(rng, 60, 5, top_k=3)
    merged = merge(original, TABLE, sample, refit=False)
    blocks = features(merged, sample, TABLE, biases)
    given, target = projections(merged), true_layer(original, sample)
    penalty, true = penalties(blocks, sample, ridge), given.copy()
    for _ in range(2):
        for one, rows in enumerate(blocks):
            others = sum(blocks[e] @ true[e] for e in range(3) if e != one)
            own = np.sqrt(penalty[one]) * np.eye(rows.shape[1])
            true[one] = np.linalg.lstsq(
                np.concatenate([rows, own]),
                np.concatenate([target - others, own @ given[one]]),
                rcond=None,
            )[0]
    fitted = fit_together(merged, original, TABLE, sample, sweeps=2, ridge=ridge)
    assert fitted.w_out_EHD.dtype == np.float32
    # The condition of a system is T / ridge + 1 at most; its products are float32, 1e-6 right.
    size = np.abs(true).max() + np.linalg.norm(target) / min(map(np.linalg.norm, blocks))
    slack = 1e-6 * (len(target) / ridge + 1) * size
    np.testing.assert_allclose(projections(fitted), true, rtol=0, atol=slack)


def test_nothing_is_changed_in_place_and_experts_without_tokens_stay(rng):
    original = random_experts(rng, "gelu", biases=True)
    sample = random_sample(rng, 40, 5)
    sample.experts_TK[sample.experts_TK == 3] = 0  # nobody chooses the third merged expert
    sample.experts_TK[:, 1] = -1
    sample.scores_TK[:, 1] = 0
    merged = merge(original, TABLE, sample)
    kept = {n: getattr(merged, n).copy() for n in ("w_out_EHD", "b_out_ED")}
    fitted = fit_together(merged, original, TABLE, sample)
    for name, array in kept.items():
        np.testing.assert_array_equal(getattr(merged, name), array)
        np.testing.assert_array_equal(getattr(fitted, name)[2], array[2])
        assert (getattr(fitted, name)[:2] != array[:2]).any()
    # Without any token nothing moves at all.
    none = Sample(sample.x_TD[:0], sample.experts_TK[:0], sample.scores_TK[:0])
    same = fit_together(merged, original, TABLE, none)
    np.testing.assert_array_equal(same.w_out_EHD, merged.w_out_EHD)


def test_experts_that_are_right_are_left_alone(rng):
    original = random_experts(rng, "swiglu", E=4)
    sample = random_sample(rng, 50, 4)
    table = np.arange(4, dtype=np.int32)
    fitted = fit_together(original, original, table, sample, ridge=0.1)
    np.testing.assert_allclose(fitted.w_out_EHD, original.w_out_EHD, rtol=1e-5, atol=1e-5)


def test_any_target_can_be_fitted(rng):
    """As for experts that were pruned: other choices than the target's."""
    experts = random_experts(rng, "swiglu", E=2)
    x = random_sample(rng, 90, 2).x_TD
    weights = rng.uniform(0.1, 1, (90, 2))
    weights[:30, 0] = 0
    hidden = [np.stack([true_hidden(experts, e, v) for v in x]) for e in range(2)]
    rows = np.concatenate([weights[:, [e]] * hidden[e] for e in range(2)], 1)
    wanted = rng.standard_normal((12, 8))
    target = rows @ wanted
    fitted = fit_sum(experts, x, weights, target, sweeps=400, ridge=1e-6)
    left = rows @ fitted.w_out_EHD.reshape(12, 8) - target
    before = rows @ experts.w_out_EHD.reshape(12, 8) - target
    assert np.square(left).sum() < 1e-6 * np.square(before).sum()


@pytest.mark.parametrize(
    "table,options,message",
    [
        ([0, 1, 0, 2], {}, "must name for each of 5 experts the one of 3"),
        ([0, 1, 0, 1, 1], {}, "must name for each of 5 experts the one of 3"),
        ([0, 1, 0, 3, 2], {}, "must name for each of 5 experts the one of 3"),
        (TABLE.tolist(), {"sweeps": 0}, "sweeps=0: must be at least 1"),
        (TABLE.tolist(), {"ridge": 0.0}, "ridge=0.0: must be at least 1e-06"),
        (TABLE.tolist(), {"ridge": np.nan}, "ridge=nan: must be at least 1e-06"),
    ],
)
def test_impossible_fits(rng, table, options, message):
    original, sample = random_experts(rng), random_sample(rng, 9, 5)
    merged = merge(original, TABLE, sample)
    with pytest.raises(UserError, match=message):
        fit_together(merged, original, np.array(table, np.int32), sample, **options)


def test_a_sample_of_other_experts_is_refused(rng):
    original, sample = random_experts(rng), random_sample(rng, 9, 5)
    merged = merge(original, TABLE, sample)
    sample.experts_TK[4, 1] = 5
    with pytest.raises(UserError, match="sample: names expert 5, the layer has 5"):
        fit_together(merged, original, TABLE, sample)
