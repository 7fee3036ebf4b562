"""Experts that share parameters, made from ones that do not, and back."""

import dataclasses

import numpy as np
import pytest
from compress_support import joined, permuted, random_experts, random_sample

from moejax.compress.clusters import frequencies
from moejax.compress.outputs import hidden_activations, output
from moejax.compress.sharing import align, expand, expand_model, to_shared
from moejax.config import ExpertsConfig, ModelConfig, MoEConfig, RouterConfig, SharingConfig
from moejax.errors import UserError
from moejax.training.state import Blueprint, weight_targets
from sharding.mesh import MeshShape, make_mesh

E, D, H = 5, 8, 6
KINDS = [
    ("up", None, "swiglu", False),
    ("up", None, "swiglu_oai", True),
    ("in", None, "gelu", False),
    ("in", None, "geglu", True),
    ("basis", E, "swiglu", True),
]


def outputs(experts, x):
    return np.stack([output(experts, e, x) for e in range(experts.num_experts)])


def assert_same_outputs(got, want, x):
    """Float32 sums of H products of D: a few hundred roundings of 6e-8 at most."""
    right = outputs(want, x)
    assert np.linalg.norm(outputs(got, x) - right) <= 1e-5 * np.linalg.norm(right)


def shuffled(rng, experts):
    """The same functions, each with its units in an order of its own."""
    return joined(*(permuted(experts, e, rng.permutation(H)) for e in range(E)))


def sharing_experts(rng, kind, activation, biases):
    """Experts that do share what `kind` says."""
    experts = random_experts(rng, activation, biases, E, D, H)
    w_in = experts.w_in_EDNH.copy()
    if kind == "up":
        w_in[:, :, 1] = w_in[0, :, 1]
        if activation == "swiglu" and not biases:  # multiples are as good
            w_in[:, :, 1] *= rng.uniform(0.5, 2, (E, 1, H)).astype(np.float32)
    elif kind == "in":
        w_in[:] = w_in[0]
    return dataclasses.replace(experts, w_in_EDNH=w_in)


@pytest.mark.parametrize("with_sample", [False, True])
@pytest.mark.parametrize(("kind", "rank", "activation", "biases"), KINDS)
def test_what_is_shared_already_is_found(rng, kind, rank, activation, biases, with_sample):
    """Whatever the order of the units; and a basis of as many matrices as experts says all."""
    experts = shuffled(rng, sharing_experts(rng, kind, activation, biases))
    sample = random_sample(rng, 40, E, D=D) if with_sample else None
    made = to_shared(experts, kind, rank, sample)
    assert all(array.dtype == np.float32 for array in made.values())
    assert_same_outputs(expand(made, activation), experts, rng.normal(size=(20, D)).astype("f4"))


@pytest.mark.parametrize(
    ("kind", "rank", "activation", "biases"), [*KINDS, ("basis", 2, "relu2", True)]
)
def test_arrays_are_those_of_the_model(rng, kind, rank, activation, biases):
    """By name and shape; and a model made independent is as if its experts had been."""
    config = ModelConfig(
        vocab_size=64,
        d_model=D,
        num_layers=1,
        moe=MoEConfig(
            RouterConfig(E, 2),
            ExpertsConfig(H, activation, biases, sharing=SharingConfig(kind, rank)),
        ),
    )
    bank = "params/layers.0.moe.bank."
    made = to_shared(random_experts(rng, activation, biases, E, D, H), kind, rank)

    def shapes(config):
        targets = weight_targets(Blueprint(config, make_mesh(MeshShape())), np.float32)
        return {name: target.shape for name, target in targets.items()}

    wanted = shapes(config)
    given = {name: np.zeros(shape, np.float32) for name, shape in wanted.items()}
    given |= {bank + name: array for name, array in made.items()}
    assert {name: array.shape for name, array in given.items()} == wanted
    whole, independent = expand_model(given, config)
    assert not independent.moe.experts.sharing.active
    assert {name: array.shape for name, array in whole.items()} == shapes(independent)
    experts = expand(made, activation)
    np.testing.assert_array_equal(whole[bank + "w_in"], experts.w_in_EDNH)
    np.testing.assert_array_equal(whole[bank + "w_out"], experts.w_out_EHD)
    assert expand_model(whole, independent) == (whole, independent)


def test_expanding_is_the_formula(rng):
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    made = {"c_in": draw(E, 3), "w_basis_in": draw(3, D, 2, H)}
    made |= {"c_out": draw(E, 3), "w_basis_out": draw(3, H, D)}
    whole = expand(made, "swiglu")
    for e in range(E):
        w_in = sum(made["c_in"][e, m] * made["w_basis_in"][m] for m in range(3))
        w_out = sum(made["c_out"][e, m] * made["w_basis_out"][m] for m in range(3))
        np.testing.assert_allclose(whole.w_in_EDNH[e], w_in, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(whole.w_out_EHD[e], w_out, rtol=1e-5, atol=1e-5)
    made = {"w_in": draw(E, D, 1, H), "w_shared": draw(D, 1, H), "w_out": draw(E, H, D)}
    whole = expand(made, "swiglu")
    np.testing.assert_array_equal(whole.w_in_EDNH[:, :, 0], made["w_in"][:, :, 0])
    for e in range(E):
        np.testing.assert_array_equal(whole.w_in_EDNH[e, :, 1], made["w_shared"][:, 0])


def test_the_mean_is_weighted_by_use(rng):
    experts = random_experts(rng, "gelu", False, E, D, H)
    base = random_experts(rng, "gelu", False, E, D, H).w_in_EDNH[:1]
    near = dataclasses.replace(experts, w_in_EDNH=base + np.float32(0.01) * experts.w_in_EDNH)
    sample = random_sample(rng, 30, E, D=D)
    share_E = frequencies(sample, E)
    right = np.einsum("e,ednh->dnh", share_E, near.w_in_EDNH)
    np.testing.assert_allclose(to_shared(near, "in", None, sample)["w_shared"], right, atol=1e-5)
    alike = near.w_in_EDNH.mean(0)
    np.testing.assert_allclose(to_shared(near, "in")["w_shared"], alike, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_basis_is_the_best_of_its_rank(rng, rank):
    experts = random_experts(rng, "swiglu", False, E, D, H)
    aligned = align(experts, "basis", np.zeros(E))
    got = expand(to_shared(experts, "basis", rank), "swiglu")
    for name in "w_in_EDNH", "w_out_EHD":
        flat = getattr(aligned, name).reshape(E, -1).astype(np.float64)
        lost = np.sqrt(np.square(np.linalg.svd(flat, compute_uv=False)[rank:]).sum())
        error = np.linalg.norm(getattr(got, name).reshape(E, -1) - flat)
        assert error == pytest.approx(lost, rel=1e-5)
    lengths = np.linalg.norm(to_shared(experts, "basis", rank)["c_in"], axis=1)
    assert np.sqrt(np.mean(lengths**2)) == pytest.approx(1, rel=1e-5)


def mean_distance(experts, kind):
    shared = experts.w_in_EDNH[:, :, 1:] if kind == "up" else experts.w_in_EDNH
    return np.square(shared - shared.mean(0)).sum()


@pytest.mark.parametrize("kind", ["up", "in"])
def test_aligned_units_are_nearer_to_their_mean(rng, kind):
    base = random_experts(rng, "swiglu_oai", False, 1, D, H)
    noise = random_experts(rng, "swiglu_oai", False, E, D, H)
    near = dataclasses.replace(noise, w_in_EDNH=base.w_in_EDNH + np.float32(0.1) * noise.w_in_EDNH)
    mixed = shuffled(rng, near)
    aligned = align(mixed, kind, np.zeros(E))
    assert mean_distance(aligned, kind) <= 1.001 * mean_distance(near, kind)
    assert mean_distance(aligned, kind) < 0.5 * mean_distance(mixed, kind)
    x = rng.normal(size=(9, D)).astype(np.float32)
    assert_same_outputs(aligned, mixed, x)


@pytest.mark.parametrize(
    ("kind", "activation", "biases"),
    [
        ("up", "swiglu", False),
        ("up", "geglu", True),
        ("in", "swiglu", False),
        ("in", "gelu", True),
    ],
)
def test_fitted_outputs(rng, kind, activation, biases):
    """On the sample never worse; with next to no penalty the least squares."""
    experts = random_experts(rng, activation, biases, E, D, H)
    sample = random_sample(rng, 300, E, D=D)
    weights_TE = sample.weights(E)
    assert (weights_TE > 0).sum(0).min() > H + 1

    def errors(made):
        found = np.zeros(E)
        whole = expand(made, activation)
        for e in range(E):
            miss = output(whole, e, sample.x_TD) - output(experts, e, sample.x_TD)
            found[e] = np.square(weights_TE[:, [e]] * miss).sum()
        return found

    stiff, loose, free = (to_shared(experts, kind, None, sample, ridge=r) for r in (1e9, 0.1, 1e-9))
    assert (errors(loose) <= errors(stiff) * (1 + 1e-5)).all()
    assert errors(loose).sum() < 0.9 * errors(stiff).sum()
    whole = expand(free, activation)
    for e in range(E):
        (rows,) = np.nonzero(weights_TE[:, e])
        score = weights_TE[rows, e, None].astype(np.float64)
        h = hidden_activations(whole, e, sample.x_TD[rows]).astype(np.float64)
        h = np.concatenate([h, np.ones((len(rows), 1))], 1) if biases else h
        right = np.linalg.lstsq(
            score * h, score * output(experts, e, sample.x_TD[rows]), rcond=None
        )[0]
        got = free["w_out"][e]
        got = np.concatenate([got, free["b_out"][e][None]]) if biases else got
        np.testing.assert_allclose(got, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("activation", "biases"), [("swiglu", True), ("relu2", False)])
def test_fitted_combinations(rng, activation, biases):
    experts = random_experts(rng, activation, biases, E, D, H)
    sample = random_sample(rng, 60, E, D=D)
    weights_TE = sample.weights(E)
    weights_TE[:, 3] = 0  # never chosen
    chosen = np.where(sample.experts_TK == 3, np.int32(-1), sample.experts_TK)
    sample = dataclasses.replace(sample, experts_TK=chosen)

    def problem(made, e):
        """Rows [T·D, M] and right-hand side of expert e's least squares."""
        whole = expand(made, activation)
        score_T1 = weights_TE[:, [e]].astype(np.float64)
        h_TH = score_T1 * hidden_activations(whole, e, sample.x_TD)
        target = output(experts, e, sample.x_TD) - (experts.b_out_ED[e] if biases else 0)
        rows = np.stack([(h_TH @ b).reshape(-1) for b in made["w_basis_out"]], 1)
        return rows, (score_T1 * target).reshape(-1)

    plain, stiff, loose, free = (
        to_shared(experts, "basis", 3, s, ridge=r)
        for s, r in ((None, 1.0), (sample, 1e9), (sample, 0.1), (sample, 1e-9))
    )
    for e in range(E):
        rows, target = problem(stiff, e)
        before, after, best = (
            np.square(rows @ made["c_out"][e] - target).sum() for made in (stiff, loose, free)
        )
        if e == 3:
            np.testing.assert_array_equal(loose["c_out"][e], stiff["c_out"][e])
            continue
        assert best <= after * (1 + 1e-5) and after <= before * (1 + 1e-5)
        right = np.linalg.lstsq(rows, target, rcond=None)[0]
        np.testing.assert_allclose(free["c_out"][e], right, rtol=1e-3, atol=1e-4)
        assert best < before
    assert plain.keys() == free.keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none",), "kind='none': shares nothing"),
        (("basis", 6), "rank=6: 5 experts have at most 5"),
        (("basis",), "rank=None with sharing kind='basis': must be at least 1"),
        (("in", 2), "rank=2 with sharing kind='in': only 'basis' has one"),
        (("up",), "kind='up' with activation='gelu': has no gate"),
    ],
)
def test_what_is_refused(rng, arguments, words):
    experts = random_experts(rng, "gelu" if arguments == ("up",) else "swiglu", False, E, D, H)
    with pytest.raises(UserError, match=words):
        to_shared(experts, *arguments)


def test_an_impossible_ridge_is_refused(rng):
    experts, sample = random_experts(rng, "swiglu", False, E, D, H), random_sample(rng, 9, E, D=D)
    for ridge in (0.0, np.inf, np.nan):
        with pytest.raises(UserError, match=rf"ridge={ridge}: must be a number above 0"):
            to_shared(experts, "in", None, sample, ridge=ridge)
