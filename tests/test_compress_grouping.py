"""What experts give, how alike they are, and their groups, against oracles by brute force."""

from itertools import permutations

import numpy as np
import pytest
from compress_support import (
    ACTIVATIONS,
    random_experts,
    random_sample,
    true_hidden,
    true_layer,
    true_output,
)
from jax import numpy as jnp

from moejax.activations import apply_activation
from moejax.compress import outputs
from moejax.compress.clusters import cluster, frequencies, merge_heights, score_mass
from moejax.compress.experts import Sample
from moejax.compress.outputs import activate, hidden_activations, output, weighted_outputs
from moejax.compress.similarity import (
    match_units,
    output_agreement,
    output_similarity,
    parameter_similarity,
)
from moejax.errors import UserError

# Sums of some ten float32 products of size 10: 1e-7 of them each, a few times over.
CLOSE = {"rtol": 2e-5, "atol": 2e-4}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_the_model(rng, activation):
    N = 1 if activation in ("gelu", "relu2") else 2
    h = (rng.standard_normal((50, N, 4)) * 6).astype(np.float32)
    h[0], h[1] = 100, -100  # no overflow
    ours = activate(h, activation)
    assert ours.dtype == np.float32
    theirs = apply_activation(jnp.asarray(h), activation)
    # Far below 0 what is left of 1 + tanh is the rounding of 1, times the gate and the value.
    slack = 2e-7 * np.abs(h[:, 0]) * (np.abs(h[:, -1]) + 1)
    assert (np.abs(ours - theirs) <= 2e-5 * np.abs(theirs) + slack).all()


def test_unknown_activation():
    with pytest.raises(UserError, match="activation='tanh': choose one of swiglu"):
        activate(np.zeros((1, 2, 3), np.float32), "tanh")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True])
def test_outputs_in_chunks(rng, monkeypatch, activation, biases):
    experts = random_experts(rng, activation, biases)
    sample = random_sample(rng, 11, 5)
    monkeypatch.setattr(outputs, "_NUMBERS_AT_ONCE", 40)
    for e in range(5):
        hidden = np.stack([true_hidden(experts, e, x) for x in sample.x_TD])
        np.testing.assert_allclose(hidden_activations(experts, e, sample.x_TD), hidden, **CLOSE)
        y = np.stack([true_output(experts, e, x) for x in sample.x_TD])
        np.testing.assert_allclose(output(experts, e, sample.x_TD), y, rtol=2e-5, atol=1e-3)
    y = weighted_outputs(experts, sample.x_TD, sample.weights(5))
    np.testing.assert_allclose(y, true_layer(experts, sample), rtol=2e-5, atol=1e-3)


def test_chunks_cover_all_tokens():
    taken = list(outputs.chunks(10**5, 1000))
    assert np.concatenate([np.arange(10**5)[part] for part in taken]).tolist() == list(range(10**5))
    assert max(part.stop - part.start for part in taken) * 1000 <= 2**24
    assert not list(outputs.chunks(0, 5))


def test_weights_add_up_and_leave_out_no_choice():
    sample = Sample(
        np.zeros((2, 3), np.float32),
        np.array([[1, -1], [0, 0]], np.int32),
        np.array([[0.5, 0.0], [0.25, 0.5]], np.float32),
    )
    assert sample.weights(2).tolist() == [[0, 0.5], [0.75, 0]]


def _parts(experts, e):
    """[H, ...] of all that belongs to each hidden unit, a matrix for each part."""
    parts = []
    for n in range(experts.w_in_EDNH.shape[2]):
        part = experts.w_in_EDNH[e, :, n].T.astype(np.float64)
        if experts.b_in_ENH is not None:
            part = np.concatenate([part, experts.b_in_ENH[e, n][:, None]], axis=1)
        parts.append(part)
    return [*parts, experts.w_out_EHD[e].astype(np.float64)]


def _true_similarity(experts, i, j, order):
    E = experts.num_experts
    last = [np.zeros(1) if experts.b_out_ED is None else experts.b_out_ED[e] for e in range(E)]
    squares = np.array([[(p**2).sum() for p in _parts(experts, e)] for e in range(E)])
    squares[:, -1] += [b @ b for b in last]
    scale = 1 / squares.mean(0)
    dot = sum(
        s * (a * b[order]).sum() for s, a, b in zip(scale, _parts(experts, i), _parts(experts, j))
    )
    return (dot + scale[-1] * (last[i] @ last[j])) / np.sqrt(
        (squares[i] @ scale) * (squares[j] @ scale)
    )


@pytest.mark.parametrize(
    "activation,biases", [("swiglu", False), ("gelu", True), ("swiglu_oai", True)]
)
def test_parameter_similarity_is_the_best_of_all_orders(rng, activation, biases):
    experts = random_experts(rng, activation, biases, E=3, D=3, H=4)
    experts.w_out_EHD[...] *= 50  # parts of any size count alike
    plain, aligned = parameter_similarity(experts, aligned=False), parameter_similarity(experts)
    for i in range(3):
        for j in range(3):
            straight = _true_similarity(experts, i, j, np.arange(4))
            assert plain[i, j] == pytest.approx(straight, abs=2e-6)
            if i < j:
                every = [np.array(order) for order in permutations(range(4))]
                best = max(_true_similarity(experts, i, j, order) for order in every)
                assert aligned[i, j] == pytest.approx(best, abs=2e-6)
    np.testing.assert_array_equal(aligned, aligned.T)
    np.testing.assert_array_equal(np.diag(aligned), 1)


def test_match_units_wants_one_expert_each(rng):
    experts = random_experts(rng)
    with pytest.raises(UserError, match="compares one expert with one of the same shape"):
        match_units(experts, experts)
    with pytest.raises(UserError, match="compares one expert with one of the same shape"):
        match_units(experts.take([0]), random_experts(rng, H=7).take([0]))


def test_output_similarity_sees_all_tokens(rng, monkeypatch):
    experts = random_experts(rng, "relu2", E=4)
    experts.w_out_EHD[2] = experts.w_out_EHD[3] = 0
    sample = random_sample(rng, 17, 4)
    sample.experts_TK[...] = 0
    true = np.zeros((4, 4))
    for x in sample.x_TD:
        y = [true_output(experts, e, x) for e in range(4)]
        norm = [np.linalg.norm(v) for v in y]
        for i in range(4):
            for j in range(4):
                if norm[i] and norm[j]:
                    true[i, j] += y[i] @ y[j] / (norm[i] * norm[j]) / 17
                elif not norm[i] and not norm[j]:
                    true[i, j] += 1 / 17
    assert true[2, 3] == pytest.approx(1) and abs(true[0, 2]) < 0.9
    np.testing.assert_allclose(output_similarity(experts, sample), true, atol=1e-5)
    monkeypatch.setattr(outputs, "_NUMBERS_AT_ONCE", 200)
    np.testing.assert_allclose(output_similarity(experts, sample), true, atol=1e-5)
    with pytest.raises(UserError, match="sample: has no tokens"):
        output_similarity(experts, random_sample(rng, 0, 4))


def test_output_agreement_is_in_units_of_what_an_expert_gives(rng, monkeypatch):
    experts = random_experts(rng, "geglu", biases=True, E=4)
    experts.w_out_EHD[2], experts.b_out_ED[2] = experts.w_out_EHD[2] / 9, experts.b_out_ED[2] / 9
    sample = random_sample(rng, 17, 3)  # expert 3 is never chosen
    y = np.array([[true_output(experts, e, x) for x in sample.x_TD] for e in range(4)])
    use = np.array([(sample.experts_TK == e).sum() for e in range(4)])
    unit = (np.square(y).sum((1, 2)) / 17 * use).sum() / use.sum()
    true = 1 - np.square(y[:, None] - y[None]).sum((2, 3)) / 17 / unit
    monkeypatch.setattr(outputs, "_NUMBERS_AT_ONCE", 200)
    np.testing.assert_allclose(output_agreement(experts, sample), true, rtol=1e-5, atol=1e-5)
    sample.experts_TK[...] = -1
    plain = 1 - (1 - true) * unit / (np.square(y).sum((1, 2)) / 17).mean()
    np.testing.assert_allclose(output_agreement(experts, sample), plain, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="sample: has no tokens"):
        output_agreement(experts, random_sample(rng, 0, 4))


def _true_groups(similarity, count):
    groups = [[e] for e in range(len(similarity))]
    heights = []
    while len(groups) > count:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        mean = [similarity[np.ix_(groups[i], groups[j])].mean() for i, j in pairs]
        i, j = pairs[int(np.argmax(mean))]
        heights.append(1 - max(mean))
        groups[j] += groups.pop(i)
    table = np.empty(len(similarity), int)
    for number, members in enumerate(sorted(groups, key=min)):
        table[members] = number
    return table.tolist(), heights


def _random_similarity(rng, E):
    matrix = rng.uniform(-1, 1, (E, E))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1)
    return matrix


def test_groups_are_those_of_average_linkage(rng):
    similarity = _random_similarity(rng, 9)
    heights = merge_heights(similarity)
    for count in range(1, 10):
        table = cluster(similarity, count=count)
        assert table.dtype == np.int32 and table.tolist() == _true_groups(similarity, count)[0]
    np.testing.assert_allclose(heights, _true_groups(similarity, 1)[1], atol=1e-12)
    for merges in range(9):
        least = 1 - (heights[merges - 1] if merges else 0) - (1e-9 if merges else -1e-9)
        assert cluster(similarity, threshold=least).max() + 1 == 9 - merges
    assert cluster(np.ones((1, 1)), count=1).tolist() == [0]


def _square_error(points, use, groups):
    means = [np.average(points[g], axis=0, weights=use[g]) for g in groups]
    return sum(use[g] @ np.square(points[g] - m).sum(1) for g, m in zip(groups, means))


def test_groups_with_use_are_those_that_cost_least(rng):
    points = rng.standard_normal((8, 3))
    use = 0.01 + rng.exponential(size=8)  # less than a thousandth of the mean is taken for that
    agreement = 1 - np.square(points[:, None] - points).sum(2)
    groups, errors = [[e] for e in range(8)], [0.0]
    while len(groups) > 1:
        options = []
        for i in range(len(groups)):
            for j in range(i):
                others = [g for k, g in enumerate(groups) if k not in (i, j)]
                options.append([*others, groups[i] + groups[j]])
        groups = min(options, key=lambda option: _square_error(points, use, option))
        errors.append(_square_error(points, use, groups))
        table = cluster(agreement, count=len(groups), use_E=use)
        assert {tuple(np.flatnonzero(table == g).tolist()) for g in range(len(groups))} == {
            tuple(sorted(group)) for group in groups
        }
        assert [table.tolist().index(g) for g in range(len(groups))] == sorted(map(min, groups))
    heights = merge_heights(agreement, use)
    np.testing.assert_allclose(np.cumsum(heights), errors[1:], rtol=1e-9)
    for merges in range(8):
        least = 1 - (heights[merges - 1] + 1e-9 if merges else -1e-9)
        assert cluster(agreement, threshold=least, use_E=use).max() + 1 == 8 - merges


def test_experts_never_used_go_to_the_most_similar():
    points = np.array([0.0, 10.0, 9.0, 30.0])
    agreement = 1 - np.square(points[:, None] - points)
    use = np.array([0.4, 0.3, 0.0, 0.3])
    assert cluster(agreement, count=3, use_E=use).tolist() == [0, 1, 1, 2]
    assert cluster(agreement, count=3, use_E=np.zeros(4)).tolist() == [0, 1, 1, 2]
    # Seldom used ones go first, though others are closer.
    assert cluster(agreement, count=3, use_E=np.array([1, 1, 1, 1e-3])).tolist() == [0, 1, 2, 1]
    assert cluster(agreement, count=3, use_E=np.array([1e-3, 1, 1, 1])).tolist() == [0, 1, 0, 2]


def test_a_count_is_reached_with_ties():
    same = np.ones((6, 6))
    for count in range(1, 7):
        assert cluster(same, count=count, use_E=np.ones(6)).max() + 1 == count
    for count in range(1, 7):
        table = cluster(same, count=count)
        assert table.max() + 1 == count and len(set(table.tolist())) == count
        assert (np.diff([table.tolist().index(g) for g in range(count)]) > 0).all()
        assert table.tolist() == cluster(same.copy(), count=count).tolist()
    assert cluster(same, threshold=1.0).tolist() == [0] * 6


@pytest.mark.parametrize(
    "options,message",
    [
        ({"count": 0}, "count=0: 4 experts form between 1 and 4 groups"),
        ({"count": 5}, "count=5: 4 experts form between 1 and 4 groups"),
        ({}, "count=None, threshold=None: .* give one of both"),
        ({"count": 2, "threshold": 0.5}, "count=2, threshold=0.5: .* give one of both"),
    ],
)
def test_impossible_groups(options, message):
    with pytest.raises(UserError, match=message):
        cluster(np.eye(4), **options)


def test_similarity_that_is_no_matrix_of_numbers():
    for matrix in (np.full((3, 3), np.nan), np.ones((2, 3))):
        with pytest.raises(UserError, match="must be a finite number for each pair"):
            cluster(matrix, count=1)


def test_shares_of_use(rng):
    sample = random_sample(rng, 40, 5)
    times, mass = np.zeros(6), np.zeros(6)
    for row, scores in zip(sample.experts_TK, sample.scores_TK):
        for e, score in zip(row, scores):
            if e >= 0:
                times[e] += 1
                mass[e] += score
    np.testing.assert_allclose(frequencies(sample, 6), times / times.sum(), rtol=1e-12)
    np.testing.assert_allclose(score_mass(sample, 6), mass / mass.sum(), rtol=1e-12)
    sample.experts_TK[...] = -1
    assert not frequencies(sample, 6).any() and not score_mass(sample, 6).any()
    sample.experts_TK[3, 1] = 6
    with pytest.raises(UserError, match="names expert 6, the layer has 6"):
        frequencies(sample, 6)
