"""Experts laid side by side: which, what they compute, what chooses them, and whole models."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from compress_model_support import CONFIG, SEQ, E, K, options, save, weights_of, write_text
from compress_support import ACTIVATIONS, random_experts, random_sample, true_output
from draws import draws
from scipy.special import expit, softmax

from moejax.compress.__main__ import main
from moejax.compress.changed import check
from moejax.compress.config import GroupConfig
from moejax.compress.experts import LayerRouter
from moejax.compress.group_router import group_router, rerouted
from moejax.compress.pipeline import compress
from moejax.compress.wide import chosen_together, equal_groups, share_of_scores, side_by_side
from moejax.config import RouterConfig
from moejax.errors import UserError
from moejax.inference.model_folder import load_model_folder
from sharding.costs import count_parameters


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True])
def test_a_wide_expert_gives_the_sum_of_its_members(rng, activation, biases):
    experts, share = random_experts(rng, activation, biases, E=6), rng.uniform(0.2, 1, 6)
    groups = rng.permutation(6).reshape(2, 3)
    wide = side_by_side(experts, groups, share)
    assert wide.w_in_EDNH.shape[::3] == (2, 18) and wide.w_out_EHD.shape == (2, 18, 8)
    x = rng.standard_normal(8).astype(np.float32)
    for group, members in enumerate(groups):
        right = sum(share[e] * true_output(experts, e, x) for e in members)
        np.testing.assert_allclose(true_output(wide, group, x), right, rtol=1e-5, atol=1e-5)


def test_groups_hold_what_belongs_together(rng):
    affinity = rng.standard_normal((6, 6))
    affinity = affinity + affinity.T
    groups = equal_groups(affinity, 2)
    assert groups.shape == (3, 2) and sorted(groups.ravel()) == list(range(6))
    assert (np.diff(groups, axis=1) > 0).all() and (np.diff(groups[:, 0]) > 0).all()
    pairs = list(combinations(range(6), 2))
    best = max(
        sum(affinity[i, j] for i, j in three)
        for three in combinations(pairs, 3)
        if len({e for pair in three for e in pair}) == 6
    )
    assert affinity[groups[:, 0], groups[:, 1]].sum() == pytest.approx(best, rel=1e-5)
    planted = rng.permutation(12).reshape(3, 4)
    affinity = rng.uniform(-0.1, 0.1, (12, 12))
    for members in planted:
        affinity[np.ix_(members, members)] += 1
    found = equal_groups(affinity + affinity.T, 4)
    assert {frozenset(g) for g in found.tolist()} == {frozenset(g) for g in planted.tolist()}
    # A constant more for all changes nothing, and nothing to tell them apart is no matter.
    np.testing.assert_array_equal(found, equal_groups(affinity + affinity.T - 7, 4))
    assert equal_groups(np.zeros((4, 4)), 4).tolist() == [[0, 1, 2, 3]]
    for size in 0, 5, 24:
        with pytest.raises(UserError, match=f"size={size}: 12 experts do not form groups"):
            equal_groups(affinity + affinity.T, size)
    with pytest.raises(UserError, match="must be finite and symmetric"):
        equal_groups(np.triu(np.ones((4, 4))), 2)


def test_how_often_two_are_chosen_together(rng):
    sample = random_sample(rng, 60, 5, top_k=3)
    right = np.zeros((6, 6))
    for row in sample.experts_TK:
        for i in row[row >= 0]:
            for j in row[row >= 0]:
                right[i, j] += i != j
    np.testing.assert_array_equal(chosen_together(sample, 6), right)


def test_shares_are_the_least_squares_of_the_scores(rng):
    weights = rng.random((50, 6)) * (rng.random((50, 6)) < 0.6)
    groups = np.array([[0, 4], [1, 2], [3, 5]])
    now = rng.random((50, 3)) * (rng.random((50, 3)) < 0.7)
    now[:, 2] = 0  # never chosen
    share = share_of_scores(weights.astype(np.float32), now.astype(np.float32), groups)
    for group, members in enumerate(groups[:2]):
        right = np.linalg.lstsq(now[:, [group]], weights[:, members], rcond=None)[0][0]
        np.testing.assert_allclose(share[members], right, rtol=1e-5)
    assert share[3] == share[5] == 0.5


def _cross_entropy(router, x, target, sigmoid):
    logits = x.astype(np.float64) @ router.w_DE + (0 if router.b_E is None else router.b_E)
    if sigmoid:
        p = expit(logits)
        return -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(1).mean()
    return -(target * np.log(softmax(logits, axis=1))).sum(1).mean()


@pytest.mark.parametrize(
    ("score", "biases"), [("softmax", False), ("softmax", True), ("sigmoid", True)]
)
def test_a_fitted_router_says_of_groups_what_was_said_of_members(rng, score, biases):
    groups = np.array([[0, 3], [1, 5], [2, 4]])
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    router = LayerRouter(draw(8, 6), draw(6) if biases else None, draw(6) if biases else None)
    config, sample = RouterConfig(6, 2, score_function=score), random_sample(rng, 400, 6)
    logits = sample.x_TD @ router.w_DE + (router.b_E if biases else 0)
    if score == "softmax":
        target = softmax(logits.astype(np.float64), axis=1)[:, groups].sum(2)
    else:
        target = expit(logits.astype(np.float64))[:, groups].mean(2)
    mean = group_router(router, groups, sample, config, "mean")
    np.testing.assert_allclose(mean.w_DE, router.w_DE[:, groups].mean(2), rtol=1e-6)
    found = group_router(router, groups, sample, config, "fit")
    error = lambda r: _cross_entropy(r, sample.x_TD, target, score == "sigmoid")  # noqa: E731
    least = error(found)
    assert least < error(mean)
    # No step away from it makes it better by more than the pull to where it began.
    for size in 0.3, 0.03:
        for _ in range(5):
            moved = dataclasses.replace(found, w_DE=found.w_DE + size * draw(8, 3))
            assert error(moved) > least
    if biases:
        both = router.selection_bias_E[groups]
        right = both.sum(1) if score == "softmax" else both.mean(1)
        np.testing.assert_allclose(found.selection_bias_E, right, rtol=1e-6)
    with pytest.raises(UserError, match="how='best': choose one of mean, fit"):
        group_router(router, groups, sample, config, "best")


def test_tokens_choose_groups(rng):
    x, w = rng.standard_normal((20, 8)), rng.standard_normal((8, 4))
    router = LayerRouter(w.astype(np.float32), None, None)
    sample = rerouted(router, x.astype(np.float32), RouterConfig(4, 2))
    logits = x @ w
    order = np.argsort(-logits, 1)[:, :2]
    np.testing.assert_array_equal(sample.experts_TK, order)
    right = softmax(np.take_along_axis(logits, order, 1), axis=1)
    np.testing.assert_allclose(sample.scores_TK, right, rtol=1e-4)


@pytest.fixture(scope="module")
def tokens():
    return draws(__name__).integers(0, 257, (9, SEQ)).astype(np.int32)


def grouping(**more):
    return options(method="group", experts=0, group=GroupConfig(**more))


def test_experts_that_are_always_chosen_together_lose_nothing(rng, tmp_path, tokens):
    flat, partner = weights_of(rng), {}
    for index in 1, 2:
        pairs = rng.permutation(E).reshape(E // 2, 2)
        router = f"layers.{index}.moe.router."
        for array in flat[f"params/{router}w_DE"].T, flat[f"bias/{router}selection_bias_E"]:
            array[pairs[:, 1]] = array[pairs[:, 0]]
        partner[index] = pairs
    stored = save(tmp_path / "model", flat)
    found = compress(stored, tokens, grouping(router="mean", fit=False))
    moe = found.config.moe
    assert (moe.router.num_experts, moe.router.top_k, moe.experts.hidden) == (E // 2, 1, 16)
    assert max(report.error for report in found.reports) < 1e-5
    assert {report.used for report in found.reports} == {1.0}
    for index, pairs in partner.items():
        w_in = found.changed[f"params/layers.{index}.moe.bank.w_in"]
        old = flat[f"params/layers.{index}.moe.bank.w_in"]
        for one, other in np.sort(pairs, 1):
            both = np.concatenate([old[one], old[other]], -1)
            assert any(np.array_equal(both, wide) for wide in w_in)
    # All of the parameters but the router's columns of the groups are there, and a token's.
    few, many = count_parameters(found.config), count_parameters(CONFIG)
    assert many.total - few.total == many.active - few.active == 2 * 16 * (E - E // 2)


def test_routing_to_experts_changes_nothing(rng, tmp_path, tokens):
    flat = weights_of(rng)
    stored = save(tmp_path / "model", flat)
    found = compress(stored, tokens, grouping(size=3, routing="experts"))
    moe = found.config.moe
    assert moe == dataclasses.replace(
        CONFIG.moe, experts=dataclasses.replace(CONFIG.moe.experts, together=3)
    )
    assert max(report.error for report in found.reports) < 1e-6
    assert {(report.after, report.used) for report in found.reports} == {(E, K)}
    bank = "params/layers.2.moe.bank."
    assert found.changed[bank + "w_in"].shape == (2, 16, 2, 24)
    # It is saved and read as any other, and goes through no further compression.
    gone = found.changed.keys() | found.removed
    after = {n: a for n, a in flat.items() if n not in gone} | found.changed
    again = save(tmp_path / "wide", after, found.config)
    np.testing.assert_array_equal(again.read(bank + "w_out"), found.changed[bank + "w_out"])
    assert count_parameters(found.config) == count_parameters(CONFIG)
    with pytest.raises(UserError, match="the model's experts are computed together"):
        compress(again, tokens, options(experts=4))


@pytest.mark.parametrize("by", ["chosen", pytest.param("alike", marks=pytest.mark.slow)])
def test_the_fit_makes_good_some_of_the_loss(rng, tmp_path, tokens, by):
    stored = save(tmp_path / "model", weights_of(rng))
    plain, fitted = (
        compress(stored, tokens, grouping(by=by, fit=fit)).reports[0].error for fit in (False, True)
    )
    assert 0.01 < fitted < plain < 1.5


@pytest.mark.slow
def test_the_command_writes_an_ordinary_model(rng, tmp_path, capsys):
    text = write_text(tmp_path, rng)
    save(tmp_path / "model", weights_of(rng))
    argv = [str(tmp_path / "model"), str(tmp_path / "out"), "--method", "group", *text]
    assert main([*argv, "--tokens", "960", "--measure-windows", "2"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "layer 2: 6 experts become 3, 1.00 for a token" in out and "bits per byte" in out
    moe = load_model_folder(tmp_path / "out").config.moe
    assert (moe.router.num_experts, moe.router.top_k, moe.experts.hidden) == (3, 1, 16)
    assert moe.router.merged_from is None and moe.experts.shared_hidden == 4


@pytest.mark.parametrize(
    ("router", "model", "size", "words"),
    [
        ({}, {}, 4, "--group.size 4: 6 experts of a layer do not form groups of 4"),
        ({"top_k": 3}, {}, 2, "--group.size 2: 3 experts of a token do not form groups of 2"),
        ({}, {"num_experts_by_layer": (0, 5, 6)}, 2, "--group.size 2: 5 experts of a layer"),
        ({"merged_from": 8}, {}, 2, "--method group: the model's experts are merged"),
        ({"num_groups": 2}, {}, 2, "--method group: the router chooses among 2 groups"),
    ],
)
def test_models_that_cannot_be_grouped(router, model, size, words):
    moe = dataclasses.replace(
        CONFIG.moe, router=RouterConfig(**{"num_experts": E, "top_k": K} | router)
    )
    with pytest.raises(UserError, match=words):
        check(dataclasses.replace(CONFIG, moe=moe, **model), grouping(size=size))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"experts": 4}, "--method group --experts 4: their number follows from --group.size"),
        ({"group": GroupConfig(size=1)}, "a group has at least 2 experts"),
        ({"method": "merge", "group": GroupConfig(size=3)}, "--group.* with --method merge"),
    ],
)
def test_flags_of_groups_that_are_refused(flags, words):
    with pytest.raises(UserError, match=words.replace("*", r"\*")):
        options(**{"method": "group", "experts": 0} | flags)
