"""What guesses the next layer's choice: in the layers' programs, and on the host."""

import dataclasses

import jax
import numpy as np
import pytest
from draws import draws
from fewer_experts_support import draw, model_of
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from offload_support import SOFTMAX, Offloaded, generate, prompts_of, swap
from run_support import kept_programs

from moejax.config import RouterConfig
from moejax.offload import guesses as guesses_module
from moejax.offload.fits import Fits
from moejax.offload.probes import LinearProbe, RouterProbe
from moejax.routing.router import Router
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import MeshShape, make_mesh

E, D, L = 8, 32, 3


def sharded(function, *arrays):
    """Runs it where a router runs, on one device."""
    mesh = make_mesh(MeshShape())
    run = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return np.asarray(jax.jit(run)(*arrays))


@pytest.mark.parametrize("kind", ["plain", "merged"])
def test_the_next_router_applied_early(rng, kind):
    """Counts of its choice on the residual, and mean probabilities where these are equal."""
    config = dataclasses.replace(
        SOFTMAX if kind == "plain" else model_of(kind, base=SOFTMAX), scan_layers=False
    )
    blueprint, flat = Blueprint(config, make_mesh(MeshShape())), draw(rng, config)
    model = blueprint.merge(*load_weights(flat, blueprint, jnp.float32))
    probe, weights = RouterProbe.of(model.layers["1"])
    x_TD = rng.normal(size=(7, D)).astype(np.float32)
    mask_T = rng.random(7) < 0.7
    mask_T[0] = True
    got_E = sharded(lambda w, x, m: probe(w, 0 * x, x, m), weights, x_TD, mask_T)

    w_DE = flat["params/layers.1.moe.router.w_DE"]
    scale_D = flat["params/layers.1.mlp_norm.scale"]
    y_TD = x_TD / np.sqrt((x_TD**2).mean(1, keepdims=True) + config.norm_eps) * scale_D
    logits_TR = (y_TD @ w_DE)[mask_T].astype(np.float64)
    probs_TR = np.exp(logits_TR - logits_TR.max(1, keepdims=True))
    probs_TR /= probs_TR.sum(1, keepdims=True)
    table_R = flat.get("bias/layers.1.moe.router.table_R", np.arange(w_DE.shape[1]))
    top_k, want_E = config.moe.router.top_k, np.zeros(config.moe.router.num_experts)
    for probs_R in probs_TR:
        for expert in {*table_R[np.argsort(-probs_R)[:top_k]].tolist()}:
            want_E[expert] += 1
    # Of merged outputs the probe compares probabilities of probabilities: counts decide.
    np.testing.assert_array_equal(np.floor(got_E), want_E)
    assert (got_E > want_E).all()
    if kind == "plain":  # softmax compares logits as they are
        likely_E = probs_TR.sum(0) / (len(mask_T) + 1)
        np.testing.assert_allclose(got_E - want_E, likely_E, atol=1e-4)


def test_a_linear_map(rng):
    x_TD = rng.normal(size=(5, D)).astype(np.float32)
    w_DE = rng.normal(size=(D, E)).astype(np.float32)
    b_E = rng.normal(size=E).astype(np.float32)
    mask_T = np.array([True, True, False, True, False])
    got_E = sharded(lambda w, x, m: LinearProbe(6)(w, x, x + 1, m), (w_DE, b_E), x_TD, mask_T)
    unit_TD = x_TD / np.sqrt((x_TD**2).mean(1, keepdims=True))
    want_E = (unit_TD @ w_DE + b_E)[mask_T].sum(0)[:6]
    # Sums of 3 · 32 products of size 1 in float32.
    np.testing.assert_allclose(got_E, want_E, atol=1e-4)


def random_fits(rng):
    def of(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return Fits(
        layers_L=np.arange(L),
        distances_J=np.arange(1, L + 1),
        offsets_O=np.arange(3),
        frequency_LE=rng.random((L, E)).astype(np.float32),
        coactivation_JLEE=of(3, L, E, E),
        history_JLFEE=of(3, L, 3, E, E),
        linear_w_OLDE=of(3, L, D, E),
        linear_b_OLE=of(3, L, E),
    )


class Recorder:
    """A predictor that writes down what it is told."""

    made: list = []

    def __init__(self):
        self.told, self.counts = [], None
        Recorder.made.append(self)

    def begin(self, counts_LE):
        self.counts = counts_LE.copy()
        self.told = []

    def observe(self, layer, experts_K):
        self.told.append((layer, *sorted(experts_K.tolist())))

    def scores(self, layer, target):
        return np.zeros(E)


@pytest.mark.slow
def test_predictors(monkeypatch, tmp_path):
    """Each follows its own text, from its prompt's choices on; fitted ones change no bit."""
    rng = draws(__name__)
    small, fits = Offloaded(SOFTMAX, rng), random_fits(rng)
    with kept_programs(tmp_path):
        engine = small.engine(small.experts(2, predictor="none"), max_len=48)
        prompts = prompts_of(rng, 5, 21, 9)
        want = generate(engine, prompts)
        for predictor in "coactivation", "history", "combined":
            experts = swap(engine, small.experts(2, predictor=predictor, fits=fits))
            first = np.argsort(-fits.frequency_LE[0])[:2]
            assert (experts.slots_of(0)[first] >= 0).all()
            assert generate(engine, prompts) == want
            assert experts.stats().decode.early > 0
        linear = small.experts(2, predictor="linear", fits=fits)
        assert generate(small.engine(linear, max_len=48), prompts) == want
        assert linear.stats().decode.early > 0

        Recorder.made.clear()
        monkeypatch.setattr(guesses_module, "make_predictor", lambda *_: Recorder())
        swap(engine, small.experts(2, predictor="previous"))
        generate(engine, prompts)
    followed = [one for one in Recorder.made if one.counts is not None]
    assert len(followed) == 3
    found = sorted(int(one.counts.sum()) for one in followed)
    assert found == sorted(len(prompt) * 2 * L for prompt in prompts)
    for one in followed:
        assert [told[0] for told in one.told] == [0, 1, 2] * (len(one.told) // L)
        # Six tokens, of which the prompt's last step draws one; one step more until that is known.
        assert 5 <= len(one.told) // L <= 6


def test_a_bonus_is_added_for_choosing_alone(rng):
    """The experts with it are chosen; scores are what they were."""
    for function in "softmax", "sigmoid", "topk_softmax":
        router = Router(D, RouterConfig(E, 2, score_function=function), rngs=nnx.Rngs(0))
        x_TD = rng.normal(size=(9, D)).astype(np.float32)
        bonus_E = np.zeros(E, np.float32)
        bonus_E[[3, 5]] = 100.0

        def run(x_TD, bonus_E=None, router=router):
            routing = router(x_TD, axes=(), bonus_E=bonus_E)
            return routing.experts_TK, routing.scores_TK

        plain_TK, _ = jax.jit(run)(x_TD, 0 * bonus_E)
        chosen_TK, scores_TK = map(np.asarray, jax.jit(run)(x_TD, bonus_E))
        assert not np.array_equal(plain_TK, chosen_TK)
        assert (np.sort(chosen_TK, axis=1) == [3, 5]).all()
        logits_TE = x_TD @ np.asarray(router.w_DE[...])
        picked_TK = np.take_along_axis(logits_TE, chosen_TK, axis=1)
        value_TK = 1 / (1 + np.exp(-picked_TK)) if function == "sigmoid" else np.exp(picked_TK)
        whole = np.exp(logits_TE).sum(1, keepdims=True)
        if function == "topk_softmax" or router.config.renormalize:
            whole = value_TK.sum(1, keepdims=True)
        elif function == "sigmoid":
            whole = 1.0
        np.testing.assert_allclose(scores_TK, value_TK / whole, rtol=1e-4)
