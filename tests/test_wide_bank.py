"""Experts computed together: the layer against the oracle, and what is refused."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
from draws import draws
from flax import nnx
from jax import numpy as jnp
from moe_harness import ShardedLayer, errors, random_weights, run_oracle
from planner_support import run_config
from train_support import assert_same_training, batches, initial, make_config, train

from moejax.compress.changed import check
from moejax.compress.config import CompressConfig
from moejax.config import (
    ExchangeConfig,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    SharingConfig,
    WireConfig,
)
from moejax.errors import UserError
from moejax.families.expanded import expanded_config
from moejax.inference.expert_weights import quantized_blueprint
from moejax.layer import MoELayer
from moejax.model.decoder import check_mesh
from moejax.offload.parts import apart
from moejax.serving.start import start_devices
from moejax.training.state import Blueprint
from pallas_kernels.fused_experts.blockwise import by_groups
from sharding.device_kinds import hardware_of
from sharding.mesh import MeshShape, abstract_mesh
from sharding.plan_text import format_plan
from sharding.planner import plan
from sharding.recommend import recommend
from train import choose_mesh

D, TOKENS = 12, 16
BOUND = 1.2e-6  # that of the plain layer in float32, see test_layer_oracle.py


def moe(experts, top_k, together, mode="auto", bucket_rows=None, **more):
    router = RouterConfig(experts, top_k, bias=True, load_balance_coef=0.1, z_loss_coef=0.05)
    config = ExpertsConfig(8, together=together, **more)
    return MoEConfig(router, config, ExchangeConfig(mode, bucket_rows))


def wide(weights, members):
    """Members' units next to each other, by a loop."""
    w_in, w_out = weights["w_in"], weights["w_out"]
    firsts = range(0, len(w_in), members)
    laid = {
        "w_in": np.stack([np.concatenate(w_in[e : e + members], axis=-1) for e in firsts]),
        "w_out": np.stack([np.concatenate(w_out[e : e + members], axis=0) for e in firsts]),
    }
    return {**weights, **laid}


class WideLayer(ShardedLayer):
    """Fed with what is stored: an expert of the harness is a group."""

    def __init__(self, shape, config, tokens):
        super().__init__(shape, config, D, tokens)
        self.home = np.arange(config.router.num_experts // config.experts.together)


def bend(weights, mask, routing, members, rng):
    bias = weights["router_b"]
    if routing == "one_group":  # all of its members are chosen
        bias[:members] += 12
    elif routing == "empty_group":
        bias[members : 2 * members] -= 12
    elif routing == "masked":
        mask[rng.permutation(mask.size)[: mask.size // 2]] = False


ROUTINGS = ("random", "one_group", "empty_group", "masked")


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((1, 1, 1), moe(12, 4, 2, shared_hidden=8)),
        ((1, 1, 1), moe(12, 3, 4, activation="gelu")),
        ((1, 2, 1), moe(8, 3, 2, "all_to_all", 5)),
        pytest.param((2, 2, 1), moe(8, 2, 4, "ring"), marks=pytest.mark.slow),
    ],
    ids=["pairs", "fours", "buckets", "ring"],
)
def test_the_layer_is_the_oracle(rng, shape, config):
    layer, members = WideLayer(shape, config, TOKENS), config.experts.together
    seen = set()
    for routing in ROUTINGS:
        for _ in range(100):
            weights, mask = random_weights(rng, config, D), np.ones(layer.num_tokens, bool)
            bend(weights, mask, routing, members, rng)
            x, ct = (rng.normal(size=(layer.num_tokens, D)).astype(np.float32) for _ in range(2))
            want = run_oracle(config, weights, x, ct, mask)
            if want.gap > 1e-4:  # no near ties
                break
        run = layer(wide(weights, members), x, ct, mask)
        np.testing.assert_array_equal(run[2].counts_E, want.counts)
        found = errors(run, dataclasses.replace(want, grads=wide(want.grads, members)))
        assert max(found.values()) <= BOUND, (routing, found)
        seen |= {routing} if want.counts[:members].min() == mask.sum() else set()
        if routing == "empty_group":
            assert not want.counts[members : 2 * members].any()
            assert not run[3]["w_in"][1].any() and not run[3]["w_out"][1].any()
    assert members > config.router.top_k or "one_group" in seen


def test_a_row_goes_to_a_group_once(rng):
    ids = rng.permuted(np.tile(np.arange(12), (40, 1)), axis=1)[:, :5].astype(np.int32)
    ids[rng.random(ids.shape) < 0.2] = -1
    ids[rng.random(ids.shape) < 0.2] = 12  # elsewhere
    scores = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    scores[(ids < 0) | (ids > 11)] = np.nan
    groups, members = by_groups(jnp.asarray(ids), jnp.asarray(scores), groups=4, members=3)
    for row, mine, its, given in zip(ids, scores, np.asarray(groups), np.asarray(members)):
        chosen = {int(e): float(s) for e, s in zip(row, mine) if 0 <= e < 12}
        kept = its[its < 4]
        assert sorted(kept) == sorted({e // 3 for e in chosen})
        for j, group in enumerate(its):
            if group < 4:
                right = [chosen.get(int(group) * 3 + m, 0.0) for m in range(3)]
                np.testing.assert_array_equal(given[j], np.float32(right))


def test_initial_weights_are_those_of_single_experts():
    def weights(together):
        layer = MoELayer(D, moe(6, 2, together), expert_devices=1, rngs=nnx.Rngs(3))
        return {name: np.asarray(getattr(layer.bank, name)[...]) for name in ("w_in", "w_out")}

    plain, found = wide(weights(1), 3), weights(3)
    for name, value in found.items():
        np.testing.assert_array_equal(value, plain[name])


@pytest.mark.slow
def test_training_is_that_of_single_experts(rng):
    """Over two devices, from the same state laid side by side, with an optimizer and checkpoints'
    order."""

    def laid(flat):
        found = dict(flat)
        for name in flat:
            if name.endswith("moe.bank.w_in"):
                other = name.replace("w_in", "w_out")
                both = wide({"w_in": flat[name], "w_out": flat[other]}, 3)
                found |= {name: both["w_in"], other: both["w_out"]}
        return found

    config, tokens = make_config(experts=12), batches(rng)
    start = initial(config)
    want = train(config, (1, 1, 1), start, tokens)
    want = dataclasses.replace(want, first=laid(want.first), last=laid(want.last))
    model = config.model
    experts = dataclasses.replace(model.moe.experts, together=3)
    moe = dataclasses.replace(model.moe, experts=experts)
    grouped = dataclasses.replace(config, model=dataclasses.replace(model, moe=moe))
    assert initial(grouped).keys() == start.keys()
    assert_same_training(train(grouped, (1, 2, 1), laid(start), tokens), want)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ExpertsConfig(together=0), "together=0: 1 computes each by itself"),
        (lambda: ExpertsConfig(together=2, bias=True), "together=2 with bias=True"),
        (lambda: ExpertsConfig(together=2, sharing=SharingConfig("in")), "together=2 with sharing"),
        (lambda: moe(6, 2, 4), "together=4: must divide num_experts=6"),
        (lambda: moe(6, 2, 2, "remote"), "together=2 with exchange.mode='remote'"),
        (
            lambda: MoEConfig(
                experts=ExpertsConfig(together=2),
                exchange=ExchangeConfig(wire=WireConfig(dispatch_dim=8)),
            ),
            "together=2 with dispatch_dim or combine_dim",
        ),
        (
            lambda: ModelConfig(moe=moe(8, 2, 2)).check_equal_experts("--placement auto"),
            "--placement auto with together=2",
        ),
        (
            lambda: MoELayer(D, moe(8, 2, 4), expert_devices=4, rngs=nnx.Rngs(0)),
            "together=4 with 8 experts on 4 devices: each must hold whole groups",
        ),
        (
            lambda: check_mesh(ModelConfig(moe=moe(8, 2, 2)), MeshShape(tensor=2)),
            "mesh tensor=2 with together=2: a group's hidden units would be split",
        ),
        (
            lambda: check_mesh(ModelConfig(moe=moe(8, 2, 2)), MeshShape(expert=8)),
            "mesh expert=8 with together=2 and num_experts=8: every device needs whole groups",
        ),
        (
            lambda: apart(Blueprint(ModelConfig(moe=moe(8, 2, 2)), abstract_mesh(MeshShape()))),
            "--offload with together=2: what comes and goes are single experts",
        ),
        (
            lambda: expanded_config(ModelConfig(moe=moe(8, 2, 2))),
            "together=2: models of transformers have single experts",
        ),
        (
            lambda: quantized_blueprint(
                Blueprint(ModelConfig(moe=moe(8, 2, 2)), abstract_mesh(MeshShape())), "int8"
            ),
            "--expert-weights int8 with together=2",
        ),
        (
            lambda: check(ModelConfig(moe=moe(8, 2, 2)), CompressConfig("in", "out")),
            "the model's experts are computed together",
        ),
    ],
)
def test_what_does_not_go_together(make, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make()


def test_meshes_that_are_chosen_have_whole_groups():
    config = run_config(experts={"together": 4}, router={"num_experts": 16})
    assert [n for n in range(1, 9) if config.model.holds_experts(n)] == [1, 2, 4]
    assert choose_mesh(dataclasses.replace(config, mesh="auto")) == MeshShape(data=2, expert=4)
    config = run_config(experts={"together": 2}, router={"num_experts": 8})
    assert start_devices(SimpleNamespace(mesh="auto", devices=8), config.model) == MeshShape(
        expert=4
    )


def test_plans_say_it_and_predict_no_time():
    model = {"compute_dtype": "bfloat16"}
    config = run_config(experts={"together": 2, "hidden": 8}, model=model)
    assert "8 of width 8, 2 for a token, computed 2 together" in format_plan(
        plan(config, MeshShape(expert=2))
    )
    with pytest.raises(UserError, match="together=2: no time is predicted"):
        recommend(config, hardware_of("h100"), 4)


def test_what_needs_single_experts_is_refused():
    layer = MoELayer(D, moe(8, 2, 2), expert_devices=1, rngs=nnx.Rngs(0))
    for call in (
        layer.expand_experts,
        layer.fold_projections,
        lambda: layer.quantize_experts("int8"),
    ):
        with pytest.raises(UserError, match="together=2: this needs the weights of single experts"):
            call()
    with pytest.raises(UserError, match="make_resident with slots=9"):
        layer.bank.make_resident(9)
    lines = "\n".join(layer.explain(16, dtype=jnp.float32))
    assert "experts computed 2 together: up " in lines
    with pytest.raises(UserError, match="on a mesh of tensor=2"):
        WideLayer((1, 1, 2), moe(8, 2, 2), 4)(
            wide(random_weights(draws(__name__), moe(8, 2, 2), D), 2),
            *np.ones((2, 4, D), np.float32),
        )
