"""Predictors, their fits, what is recorded of a model, and recall, against plain oracles."""

import dataclasses

import numpy as np
import pytest
from compress_model_support import CONFIG as DENSE_FIRST
from compress_model_support import save, weights_of
from fewer_experts_support import model_of
from fewer_experts_support import save as save_fewer

from moejax.compress.layers import StoredLayers
from moejax.errors import UserError
from moejax.inference.source import open_model
from moejax.offload.fits import Fits, load_fits, save_fits
from moejax.offload.fitting import distances_for, fit_choices, fit_linear, one_hot, unit_rms
from moejax.offload.predictors import PREDICTORS, distance_of, make_predictor
from moejax.offload.recall import count_choices, predictor_recalls, recall_of
from moejax.offload.record import record_layers
from moejax.offload.replay import Replay
from moejax.offload.study import host_recalls, study

L, E, K, S = 3, 8, 2, 12


def choices(rng, windows=5, length=S):
    """Distinct experts, sometimes one fewer: int16 [W, S, L, K]."""
    found = np.argsort(rng.random((windows, length, L, E)), axis=-1)[..., :K].astype(np.int16)
    found[rng.random(found.shape) < 0.1] = -1
    return found


def fits_of(rng, experts_WSLK):
    """Of choices alone."""
    distances = distances_for(L)
    return Fits(
        layers_L=np.arange(L),
        distances_J=np.array(distances),
        offsets_O=np.array([0, 1]),
        **fit_choices(experts_WSLK, E, distances, 1e-6),
        linear_w_OLDE=rng.normal(size=(2, L, 4, E)).astype(np.float32),
        linear_b_OLE=rng.normal(size=(2, L, E)).astype(np.float32),
    )


def hot(experts):
    found = np.zeros(E)
    found[[e for e in experts if e >= 0]] = 1
    return found


def steps(experts_SLK):
    """(token, layer, target, token of the target's choice before the one that is guessed)."""
    for token in range(len(experts_SLK)):
        for layer in range(L):
            for target in range(L):
                yield token, layer, target, token - (target > layer)


def expected(name, fits, experts_SLK, counts_LE, earlier_LE, place):
    """Scores from all that was seen so far."""
    token, layer, target, before = place
    seen = [hot(experts_SLK[t, target]) for t in range(before + 1)]
    share = counts_LE[target] * K / max(counts_LE[target].sum(), 1)
    if name in ("prompt", "frequent"):
        earlier = earlier_LE[target] if name == "frequent" else 0.0
        return counts_LE[target] + earlier + sum(seen, np.zeros(E))
    if name == "previous":
        for one in seen:
            share = 0.9 * share + 0.1 * one
        return share + (seen[-1] * (share.max() + 1) if seen else 0)
    distance = distance_of(layer, target, L)
    if name == "coactivation":
        chosen = np.flatnonzero(hot(experts_SLK[token, layer]))
        if not len(chosen):
            return fits.frequency_LE[target]
        return fits.coactivation(layer, distance)[chosen].mean(0)
    map_FEE = fits.history(layer, distance)
    earlier = experts_SLK[token, layer - 1] if layer else experts_SLK[token - 1, L - 1]
    if not layer and not token:
        earlier = []
    parts = (seen[-1] if seen else np.zeros(E), hot(experts_SLK[token, layer]), hot(earlier))
    found = fits.frequency_LE[target] + sum(p @ m for p, m in zip(parts, map_FEE))
    for one in seen if name == "combined" else []:
        share = 0.98 * share + 0.02 * one
    return found + share if name == "combined" else found


@pytest.mark.parametrize("name", PREDICTORS)
def test_scores_are_what_was_seen(rng, name):
    experts_WSLK = choices(rng)
    fits = fits_of(rng, choices(rng))
    predictor = make_predictor(name, L, E, K, fits)
    earlier_LE = np.zeros((L, E))
    for window, experts_SLK in enumerate(experts_WSLK[:3]):
        prompt = [0, 4, 0][window]
        counts_LE = count_choices(experts_SLK[:prompt], E)
        predictor.begin(counts_LE if prompt else None)
        last = None
        for place in steps(experts_SLK[prompt:]):
            token, layer, target, _ = place
            if (token, layer) != last:
                predictor.observe(layer, experts_SLK[prompt + token, layer])
                last = token, layer
            right = expected(name, fits, experts_SLK[prompt:], counts_LE, earlier_LE, place)
            np.testing.assert_allclose(predictor.scores(layer, target), right, atol=2e-5, rtol=1e-5)
        earlier_LE += count_choices(experts_SLK, E)


def test_scores_belong_to_the_caller(rng):
    fits = fits_of(rng, choices(rng))
    for name in PREDICTORS:
        predictor = make_predictor(name, L, E, K, fits)
        predictor.begin(None)
        predictor.observe(0, np.array([1, 2]))
        first = predictor.scores(0, 1).copy()
        predictor.scores(0, 1)[:] = 100
        np.testing.assert_array_equal(predictor.scores(0, 1), first)


def test_distances():
    assert [distance_of(1, target, 4) for target in (2, 3, 0, 1)] == [1, 2, 3, 4]
    assert distances_for(1) == (1,) and distances_for(2) == (1, 2)
    assert distances_for(6) == (1, 2, 3, 6)


def test_coactivation_counts(rng):
    experts_WSLK = choices(rng)
    fits = fits_of(rng, experts_WSLK)
    for distance, layer, shift, target in ((1, 0, 0, 1), (1, 2, 1, 0), (3, 1, 1, 1)):
        both, alone = np.zeros((E, E)), np.zeros((E, 1))
        for experts_SLK in experts_WSLK:
            for token in range(S - shift):
                here = hot(experts_SLK[token, layer])
                both += np.outer(here, hot(experts_SLK[token + shift, target]))
                alone += here[:, None]
        right = (both + 0.5 * fits.frequency_LE[target]) / (alone + 0.5)
        np.testing.assert_allclose(fits.coactivation(layer, distance), right, rtol=1e-5)
    assert fits.coactivation(0, 4) is None and fits.history(0, 4) is None


def test_history_finds_the_rule(rng):
    """Layer 1 chooses what layer 0 chose, moved by one; layer 2 what it chose for the token before,
    moved by two; layer 0 is drawn."""
    windows, length = 40, 24
    experts_WSLK = np.zeros((windows, length, L, 1), np.int16)
    experts_WSLK[:, :, 0] = rng.integers(0, E, (windows, length, 1))
    experts_WSLK[:, :, 1] = (experts_WSLK[:, :, 0] + 1) % E
    experts_WSLK[:, :, 2, 0] = (rng.integers(0, E, (windows, 1)) + 2 * np.arange(length)) % E
    fits = fits_of(rng, experts_WSLK[:30])
    predictor = make_predictor("history", L, E, 1, fits)
    rows = predictor_recalls("history", predictor, experts_WSLK[30:], E, prompt=1)
    found = {row.distance: row.at_k for row in rows}
    # Within a token the first decoded one lacks what its layer 2 chose before.
    decoded = 10 * (length - 1)
    assert found[2] >= 1 - 10 / decoded and found[1] >= 1 - 5 / decoded
    # Of the next token layer 2 alone is known; the others are drawn.
    assert 1 / 3 <= found[None] < 0.7
    coactivation = make_predictor("coactivation", L, E, 1, fits)
    rows = predictor_recalls("coactivation", coactivation, experts_WSLK[30:], E, prompt=1)
    assert 0.5 <= rows[0].at_k < 0.9  # layer 1 from layer 0, but not layer 2 from layer 1


def test_linear_map_is_least_squares(rng):
    x_TD = (rng.normal(size=(200, 5)) + 3).astype(np.float32)
    y_TE = rng.random((200, E)).astype(np.float32)
    w_DE, b_E = fit_linear(x_TD, y_TE, 1e-9)
    right = np.linalg.lstsq(np.c_[x_TD, np.ones(200)].astype(np.float64), y_TE, rcond=None)[0]
    np.testing.assert_allclose(w_DE, right[:-1], atol=1e-4)
    np.testing.assert_allclose(b_E, right[-1], atol=1e-4 * 3 * 5)
    flat, mean_E = fit_linear(x_TD, y_TE, 1e9)  # nothing but the mean is left
    np.testing.assert_allclose(flat, 0, atol=1e-6)
    np.testing.assert_allclose(mean_E, y_TE.mean(0), atol=1e-5)
    constant, _ = fit_linear(np.ones((9, 2), np.float32), y_TE[:9], 1e-3)
    assert np.isfinite(constant).all()


def test_recall_is_counted(rng):
    scores_TE = rng.integers(0, 4, (50, E)).astype(np.float32)  # with ties
    experts_TK = choices(rng, 1, 50)[0, :, 0]
    for most in (1, K, 2 * K, E):
        right = 0
        for scores_E, chosen in zip(scores_TE, experts_TK):
            best = sorted(range(E), key=lambda e: (-scores_E[e], e))[:most]
            right += len(set(best) & set(chosen.tolist()))
        assert recall_of(scores_TE, experts_TK, most) == (right, (experts_TK >= 0).sum())
    assert recall_of(scores_TE, experts_TK, E)[0] == (experts_TK >= 0).sum()


def test_files(rng, tmp_path):
    fits = fits_of(rng, choices(rng))
    save_fits(tmp_path / "fits.npz", fits)
    read = load_fits(tmp_path / "fits.npz")
    for field in dataclasses.fields(fits):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(fits, field.name))
    w_DE, b_E = read.linear(1, 1)
    np.testing.assert_array_equal(w_DE, fits.linear_w_OLDE[1, 1])
    np.testing.assert_array_equal(b_E, fits.linear_b_OLE[1, 1])
    assert read.linear(2, 1) is None and read.linear(0, 5) is None
    with pytest.raises(UserError, match=r"no array"):
        np.savez(tmp_path / "other.npz", x=np.zeros(3))
        load_fits(tmp_path / "other.npz")
    arrays = dict(np.load(tmp_path / "fits.npz"))
    np.savez(tmp_path / "torn.npz", **arrays | {"linear_b_OLE": np.zeros((2, L, E + 1))})
    with pytest.raises(UserError, match=r"torn.npz: linear_b_OLE: shape"):
        load_fits(tmp_path / "torn.npz")
    with pytest.raises(UserError, match=r"not finite"):
        dataclasses.replace(fits, frequency_LE=np.full((L, E), np.nan, np.float32))


def test_what_is_refused(rng):
    with pytest.raises(UserError, match=r"'oracle'.*frequent, previous"):
        make_predictor("oracle", L, E, K)
    for name in ("coactivation", "history", "combined"):
        with pytest.raises(UserError, match=r"python -m moejax.offload"):
            make_predictor(name, L, E, K)
        with pytest.raises(UserError, match=r"3 layers of 8 experts.*has 4, 8"):
            make_predictor(name, L + 1, E, K, fits_of(rng, choices(rng)))
    with pytest.raises(UserError, match=r"width 4.*and 16"):
        fits_of(rng, choices(rng)).check(L, E, 16)


def test_what_is_recorded_is_the_model(rng, tmp_path):
    """A router on what reaches its own layer chooses what the layer chose."""
    stored = save(tmp_path / "model", weights_of(rng))
    tokens = rng.integers(0, 257, (3, 10)).astype(np.int32)
    records = list(record_layers(stored, tokens))
    assert [record.layer for record in records] == [1, 2]  # the first is dense
    top_k = DENSE_FIRST.moe.router.top_k
    for record in records:
        scores_TE = record.router_scores(record.attended_TD)
        found, all_ = recall_of(scores_TE, record.experts_TK, top_k)
        # Recorded by subtraction: a near tie may fall the other way.
        assert all_ == 30 * top_k and found >= all_ - 1
    embedding = stored.read("params/embedding.w")
    assert records[0].entered_TD.shape == (30, 16)
    assert not np.allclose(records[0].entered_TD, embedding[tokens].reshape(30, 16))


@pytest.mark.parametrize("kind", ["merged+unequal"])
def test_merged_and_unequal_layers(rng, tmp_path, kind):
    config = model_of(kind, compute_dtype="float32")
    save_fewer(tmp_path / "model", rng, config)
    stored = StoredLayers(open_model(tmp_path / "model"))
    tokens = rng.integers(0, 257, (6, 8)).astype(np.int32)
    for record in record_layers(stored, tokens):
        scores_TE = record.router_scores(record.attended_TD)
        for scores_E, chosen in zip(scores_TE, record.experts_TK):
            chosen = chosen[chosen >= 0]
            others = np.setdiff1d(np.arange(record.num_experts), chosen)
            # All that is chosen stands before all that is not.
            assert scores_E[chosen].min() >= scores_E[others].max() - 1e-5
    found = study(stored, tokens[:4], tokens[4:], prompt=2, ridge=1e-2, keep=True)
    layers = config.num_layers
    assert found.num_experts == 9 and found.held_WSLK.shape == (2, 8, layers, 3)
    lacking = found.scores["routers", 1, 1][:, config.num_experts_by_layer[1] :]
    assert lacking.size == 0 or (lacking == -np.inf).all()
    assert {recall.predictor for recall in host_recalls(found, prompt=2)} == set(PREDICTORS)


def test_a_study_fits_on_one_text_and_measures_on_the_other(rng, tmp_path):
    stored = save(tmp_path / "model", weights_of(rng))
    fit_WS, held_WS = (rng.integers(0, 257, (n, 10)).astype(np.int32) for n in (6, 3))
    prompt = 4
    found = study(stored, fit_WS, held_WS, prompt=prompt, ridge=1e-3, keep=True)
    first, second = record_layers(stored, np.concatenate([fit_WS, held_WS]))
    experts = DENSE_FIRST.moe.router.num_experts
    # By hand: from what enters layer 1 to what layer 2 chooses.
    x_TD = unit_rms(first.entered_TD)
    w_DE, b_E = fit_linear(x_TD[:60], one_hot(second.experts_TK[:60], experts), 1e-3)
    np.testing.assert_allclose(found.fits.linear(0, 1)[0], w_DE, atol=1e-5)
    right_TE = x_TD[60:] @ w_DE + b_E
    np.testing.assert_allclose(found.scores["linear", 1, 1], right_TE, atol=1e-5)
    np.testing.assert_allclose(
        found.scores["routers", 1, 1], second.router_scores(first.attended_TD[60:]), atol=1e-5
    )
    decoded = np.tile(np.arange(10) >= prompt, 3)
    shares = [
        np.divide(*recall_of(right_TE[decoded], second.experts_TK[60:][decoded], most))
        for most in (2, 4)
    ]
    row = next(r for r in found.recalls if (r.predictor, r.distance) == ("linear", 1))
    assert [row.at_k, row.at_2k] == pytest.approx(shares, abs=1e-9)
    held = np.stack([r.experts_TK[60:].reshape(3, 10, -1) for r in (first, second)], axis=2)
    np.testing.assert_array_equal(found.held_WSLK, held)
    np.testing.assert_array_equal(found.fits.layers_L, [1, 2])
    # Other held-out text changes no fit.
    again = study(stored, fit_WS, held_WS[::-1].copy(), prompt=prompt, ridge=1e-3)
    np.testing.assert_allclose(again.fits.history_JLFEE, found.fits.history_JLFEE, atol=1e-6)


def test_recorded_guesses_are_of_their_token(rng):
    lens, prompt = [5, 2, 7], 3
    recorded = {(1, 1): rng.random((14, E)), (2, 2): rng.random((14, E))}
    otherwise = make_predictor("prompt", L, E, K)
    replay = Replay(recorded, lens, prompt, otherwise)
    start = 0
    for length in lens:
        replay.begin(None)
        for token in range(start + min(prompt, length), start + length):
            for layer in range(L):
                replay.observe(layer, np.array([layer, token % E]))
                if layer == 0:
                    for distance, target in recorded:
                        np.testing.assert_array_equal(
                            replay.scores(0, target), recorded[distance, target][token]
                        )
                np.testing.assert_array_equal(
                    replay.scores(layer, layer), otherwise.scores(layer, layer)
                )
        start += length
