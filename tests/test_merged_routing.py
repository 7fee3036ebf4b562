"""Routers whose outputs have become fewer experts: exact, counted, kept and refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from moe_harness import check_report, errors, random_weights, run_oracle, sharded_layer
from train_support import batches, initial, make_config, train

from moejax.config import ExchangeConfig, ExpertsConfig, LocalityConfig, MoEConfig, RouterConfig
from moejax.errors import UserError
from moejax.placement.arrays import from_slots
from moejax.routing.merged import initial_table, redirect
from moejax.standalone import ShardedMoELayer
from moejax.training.state import load_weights
from sharding.mesh import MeshShape, make_mesh

D, TOKENS, OUTPUTS, EXPERTS, TOP_K = 12, 8, 8, 5, 3
# As in test_layer_oracle: float32 against float64, relative to the norm.
FLOAT32_BOUND = 1.2e-6
TABLE = np.asarray(initial_table(OUTPUTS, EXPERTS))


def brute_redirect(chosen, scores, table):
    experts, sums = np.full_like(chosen, -1), np.zeros_like(scores)
    for t, row in enumerate(chosen):
        place = {}
        for k, output in enumerate(row):
            if output >= 0:
                first = place.setdefault(table[output], k)
                experts[t, first] = table[output]
                sums[t, first] += scores[t, k]
    return experts, sums


def test_outputs_of_one_expert_are_summed(rng):
    chosen = np.stack([rng.permutation(OUTPUTS)[:TOP_K] for _ in range(40)]).astype(np.int32)
    chosen[rng.random(chosen.shape) < 0.1] = -1
    chosen[7] = -1
    scores = np.where(chosen >= 0, rng.random(chosen.shape), 0).astype(np.float32)
    table = rng.integers(0, 3, OUTPUTS).astype(np.int32)
    experts, sums = jax.jit(redirect)(chosen, scores, table)
    right, right_sums = brute_redirect(chosen, scores, table)
    assert np.array_equal(experts, right)
    np.testing.assert_allclose(sums, right_sums, rtol=1e-6)
    # Each score's gradient is that of its expert's sum.
    ct = rng.normal(size=scores.shape).astype(np.float32)
    grad = jax.grad(lambda s: jnp.sum(redirect(chosen, s, table)[1] * ct))(scores)
    for t, row in enumerate(chosen):
        for k, output in enumerate(row):
            here = np.flatnonzero(right[t] == table[output]) if output >= 0 else []
            assert grad[t, k] == (ct[t, here[0]] if output >= 0 else 0)


@pytest.mark.parametrize(("outputs", "experts"), [(8, 5), (64, 48), (7, 7), (9, 1)])
def test_a_new_table_uses_every_expert_alike(outputs, experts):
    sizes = np.bincount(initial_table(outputs, experts), minlength=experts)
    assert sizes.sum() == outputs and sizes.max() - sizes.min() <= 1


def merged_config(mode):
    router = RouterConfig(
        EXPERTS, TOP_K, load_balance_coef=0.1, z_loss_coef=0.05, bias=True, merged_from=OUTPUTS
    )
    return MoEConfig(router, ExpertsConfig(hidden=6), ExchangeConfig(mode))


def expanded(config, weights):
    """The same function with an expert for each output."""
    router = config.router.of_outputs
    more = {n: w[TABLE] if n in ("w_in", "w_out") else w for n, w in weights.items()}
    return dataclasses.replace(config, router=router), more


def draw(rng, config, tokens):
    weights = random_weights(rng, config, D)
    weights["router"] = (rng.normal(size=(D, OUTPUTS)) / np.sqrt(D)).astype(np.float32)
    weights["router_b"] = rng.normal(size=OUTPUTS, scale=0.1).astype(np.float32)
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    return weights, x, rng.normal(size=x.shape).astype(np.float32), rng.random(tokens) > 0.1


@pytest.mark.parametrize(
    ("shape", "mode", "copies"),
    [
        ((1, 1, 1), "local", False),
        pytest.param((2, 2, 1), "all_to_all", False, marks=pytest.mark.slow),
        pytest.param((1, 2, 2), "ring", False, marks=pytest.mark.slow),
        ((2, 2, 1), "all_to_all", True),
    ],
)
def test_a_layer_is_that_with_an_expert_for_each_output(rng, shape, mode, copies):
    config = merged_config(mode)
    sharded = sharded_layer(shape, config, D, TOKENS)
    twice = False
    while not twice:  # few tokens may all have experts that stayed apart
        weights, x, ct, mask = draw(rng, config, sharded.num_tokens)
        want = run_oracle(*expanded(config, weights), x, ct, mask)
        experts, _ = brute_redirect(want.experts, np.zeros(want.experts.shape), TABLE)
        twice = (experts >= 0).sum() < (want.experts >= 0).sum()
    placement = where = None
    if copies:  # each expert on a device of its own, or on both
        slots = np.array([0, 1, 2, 3, 4, 0, 4, 3, 2, -1])
        placement = from_slots(slots, EXPERTS, 2)
    found = sharded(weights, x, ct, mask, placement)

    fold = dict(want.grads)
    scales = dict(want.scales)
    for name in "w_in", "w_out":
        fold[name] = np.zeros(weights[name].shape)
        np.add.at(fold[name], TABLE, want.grads[name])
        scales.pop(name, None)
    counts = np.bincount(experts[experts >= 0], minlength=EXPERTS)
    right = dataclasses.replace(want, grads=fold, scales=scales, counts=counts)
    for name, error in errors(found, right).items():
        assert error <= FLOAT32_BOUND, f"{name} is off by {error:.1e} of its norm"
    assert np.array_equal(found[2].counts_E, counts)
    assert int(found[2].counters.assignments) == counts.sum()
    if not copies:
        where = np.where(experts >= 0, sharded.home[experts], -1)
        check_report(found, right, sharded, slots=where)


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_keeps_the_table(rng, scan_layers):
    """It is no parameter: it is stored, laid out and loaded with the selection biases."""
    config = make_config(
        3,
        router={"merged_from": 6, "bias_update_rate": 0.0},
        model={"top_k_by_layer": (), "scan_layers": scan_layers},
    )
    start = initial(config)
    names = [n for n in start if n.endswith("router.table_R")]
    assert names == [f"bias/layers.{i}.moe.router.table_R" for i in (1, 2)]
    for name in names:
        assert start[name].dtype == np.int32
        start[name] = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), 2))
    done = train(config, (1, 2, 1), start, batches(rng, 2))
    assert done.metrics[1]["grad_norm"] > 0
    for name in names:
        assert done.last[name].dtype == np.int32
        np.testing.assert_array_equal(done.last[name], start[name])
    flat = {n: v for n, v in done.last.items() if n.startswith(("params/", "bias/"))}
    _, biases = load_weights(flat, done.blueprint, jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(biases)} == {"int32", "float32"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"merged_from": 7}, "merged_from=7: .* at least num_experts=8"),
        (
            {"merged_from": 9, "selection_bias": True, "bias_update_rate": 0.1},
            "bias_update_rate=0.1 with merged_from=9: .* set it to 0",
        ),
        ({"merged_from": 9, "num_groups": 4}, "num_groups=4: must divide merged_from=9"),
    ],
)
def test_routers_that_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        RouterConfig(8, 2, **fields)


def test_distances_are_refused():
    with pytest.raises(UserError, match="merged_from=9 with locality"):
        MoEConfig(RouterConfig(8, 2, merged_from=9), locality=LocalityConfig(0.1))


def test_biases_of_outputs_stay(rng):
    router = RouterConfig(EXPERTS, TOP_K, selection_bias=True, merged_from=OUTPUTS)
    config = MoEConfig(router, ExpertsConfig(6))
    layer = ShardedMoELayer(D, config, mesh=make_mesh(MeshShape()), rngs=nnx.Rngs(0))
    x_TD = rng.normal(size=(4, D)).astype(np.float32)
    _, _, aux = layer(x_TD)
    with pytest.raises(UserError, match="update_bias with merged_from=8"):
        layer.update_bias(aux)
