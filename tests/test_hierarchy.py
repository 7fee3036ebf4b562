"""A row crosses once to each host and is spread there: exact, counted, in both kinds of waves."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from moe_harness import check_report, errors, random_weights, run_oracle, sharded_layer
from oracle import relative_error
from planner_support import run_config
from standalone_support import output_and_gradients
from test_layer_oracle import BFLOAT16, FLOAT32_BOUND, FULL, D, draw, moe, run_case
from test_placement_arrays import random_placement
from test_traffic import compiled_bytes

from moejax.config import (
    EXACT_WIRE,
    ExchangeConfig,
    ExpertsConfig,
    MoEConfig,
    RouterConfig,
    WireConfig,
)
from moejax.errors import UserError
from moejax.exchange import choose
from moejax.placement.choice import place
from moejax.standalone import ShardedMoELayer
from moejax.training.state import Blueprint
from sharding.collectives import AxisGroups, all_gather, all_to_all, axis_index, axis_size
from sharding.mesh import EXPERT, MeshShape, make_mesh
from sharding.planner import plan, trace_step

HOSTS = (0, 0, 0, 0, 1, 1, 1, 1)


def hierarchical(local, *args, wire=EXACT_WIRE, **kwargs):
    config = moe(*args, **kwargs)
    return replace(config, exchange=replace(config.exchange, host_devices=local, wire=wire))


# ---- collectives over groups ------------------------------------------------------------------


def test_collectives_over_groups(rng):
    """Against numpy, with their transposes; uneven order in the groups."""
    groups = ((4, 0, 2), (1, 5, 3))
    axis = AxisGroups(EXPERT, groups)
    x = rng.normal(size=(6, 3, 2)).astype(np.float32)
    ct_swap, ct_all = rng.normal(size=(6, 3, 2)), rng.normal(size=(6, 9, 2))

    def body(x, ct_swap, ct_all):
        swapped, pull = jax.vjp(lambda x: all_to_all(x, axis), x[0])
        gathered, pull_all = jax.vjp(lambda x: all_gather(x, axis), x[0])
        where = jnp.stack([axis_index(axis), jnp.int32(axis_size(axis))])
        out = swapped, gathered, pull(ct_swap[0])[0], pull_all(ct_all[0])[0], where
        return jax.tree.map(lambda a: a[None], out)

    run = jax.shard_map(
        body,
        mesh=make_mesh(MeshShape(expert=6)),
        in_specs=P(EXPERT),
        out_specs=P(EXPERT),
        check_vma=False,
    )
    cts = ct_swap.astype(np.float32), ct_all.astype(np.float32)
    swapped, gathered, swap_grad, gather_grad, where = map(np.asarray, jax.jit(run)(x, *cts))
    for group in groups:
        for i, device in enumerate(group):
            assert where[device].tolist() == [i, 3]
            assert np.array_equal(gathered[device], np.concatenate([x[d] for d in group]))
            assert np.array_equal(swapped[device], [x[d][i] for d in group])
            assert np.array_equal(swap_grad[device], [cts[0][d][i] for d in group])
            pieces = [cts[1][d][3 * i : 3 * i + 3] for d in group]
            np.testing.assert_allclose(gather_grad[device], sum(pieces), rtol=1e-5, atol=1e-6)


# ---- the layer --------------------------------------------------------------------------------


def test_two_hosts_of_four(rng):
    """Buckets of 3 rows at both levels; 10 experts on 8 devices."""
    config = hierarchical(4, 10, 3, "all_to_all", 3, bias=True)
    waves, budget = run_case(rng, (1, 8, 1), config, 8)
    inner = budget.innermost
    assert (budget.devices, budget.rows, inner.devices, inner.tokens, inner.rows) == (2, 3, 4, 6, 3)
    # Three waves between hosts with 6, 6 and 4 rows for one device, three at a time.
    assert waves["one_device"] == 2 + 2 + 2 and waves["one_token"] == 1


def test_four_hosts_of_two(rng):
    """Buckets hold every row between hosts; inside, assignments open the further wave."""
    config = hierarchical(2, 32, 4, "all_to_all", 16, activation="geglu")
    waves, budget = run_case(rng, (1, 8, 1), config, 16)
    assert budget.rows == budget.tokens and budget.innermost.tokens == 64
    assert waves["one_device"] > 2


def test_data_parallel_hosts_and_rings(rng):
    """Two hosts of two for each of two blocks of data, a ring at both levels."""
    waves, budget = run_case(rng, (2, 4, 1), hierarchical(2, 10, 3, "ring", **FULL), 8)
    assert budget.mode == budget.innermost.mode == "ring"
    assert waves["random"] == 1


def test_tensor_parallel_hosts(rng):
    config = hierarchical(2, 8, 2, "all_to_all", 3, **FULL)
    waves, _ = run_case(rng, (1, 4, 2), config, 8)
    assert waves["one_device"] >= 6


def test_chunks_between_hosts(rng):
    config = hierarchical(2, 8, 2, "all_to_all", 3, chunks=2)
    waves, budget = run_case(rng, (1, 4, 1), config, 8, ("random", "one_device", "no_token"))
    assert budget.chunks == 2 and waves["one_device"] > 1


def test_bfloat16_between_hosts(rng):
    """`auto`, which rounds an output once more: where it leaves its host."""
    run_case(rng, (1, 8, 1), hierarchical(4, 16, 4), 16, dtype=BFLOAT16)


def test_replicas(rng):
    """Slots of a host are those of its devices; tokens use the replica at hand."""
    experts, slots, tokens = 6, 3, 8
    config = hierarchical(2, experts, 3, "all_to_all", 5)
    sharded = sharded_layer((1, 4, 1), config, D, tokens)
    weights, x, ct, mask, want = draw(rng, config, sharded.num_tokens, "random", 4)
    placement = random_placement(rng, 3)
    run = sharded(weights, x, ct, mask, placement=placement)
    for what, error in errors(run, want).items():
        assert error < FLOAT32_BOUND, f"{what} is off by {error:.1e}"
    asked = want.experts.reshape(4, tokens, 3).astype(np.int32)
    hosts = (0, 0, 1, 1)
    one = partial(place, placement=placement, slots_per_device=slots, hosts=hosts)
    placed = np.asarray(jax.jit(jax.vmap(one, axis_name=EXPERT))(asked))
    check_report(run, want, sharded, slots=placed, placement=placement)


# ---- what crosses -----------------------------------------------------------------------------


def test_rows_between_hosts_are_fewer(rng):
    """The same routing, flat and between hosts: a token with 8 experts crosses once, not thrice."""
    tokens = 8
    flat = moe(32, 8, "all_to_all", slack=np.inf)
    weights = random_weights(rng, flat, D)
    x, ct = rng.normal(size=(2, 8 * tokens, D)).astype(np.float32)
    want = run_oracle(flat, weights, x, ct)
    counters = {}
    for name, config in {"flat": flat, "hosts": hierarchical(4, 32, 8, slack=np.inf)}.items():
        run = sharded_layer((1, 8, 1), config, D, tokens, HOSTS)(weights, x, ct)
        counters[name] = {k: int(v) for k, v in vars(run[2].counters).items()}
    home = (np.arange(8 * tokens) // tokens) // 4
    hosts = want.experts // 16  # four experts a device, four devices a host
    crossing = sum(len(set(h) - {here}) for h, here in zip(hosts.tolist(), home.tolist()))
    assert counters["hosts"]["rows_network"] == crossing <= 8 * tokens
    assert counters["flat"]["rows_network"] > 2 * crossing
    assert counters["hosts"]["rows_self"] == counters["flat"]["rows_self"]
    assert counters["hosts"]["assignments"] == counters["flat"]["assignments"] == 8 * tokens * 8


def rows_between_hosts(made, local):
    """Bytes of tokens that leave a device for other hosts in a step."""
    devices = made.mesh.expert
    parts = {"": (devices - local) / (devices - 1), "between hosts": 1, "inside hosts": 0}
    return sum(
        c.sent * parts[c.part] for c in made.collectives if c.name in ("dispatch", "combine")
    )


def test_bytes_between_hosts_are_fewer():
    """In the traced step: the four devices of the other host get a token once together."""
    exchange = {"mode": "all_to_all", "bucket_slack": math.inf}
    router = {"num_experts": 64, "top_k": 8}
    mesh, sent = MeshShape(1, 8, 1), {}
    for local in (None, 4):
        config = run_config(router=router, exchange=exchange | {"host_devices": local})
        sent[local] = rows_between_hosts(plan(config, mesh), 4)
    assert 3.5 < sent[None] / sent[4] <= 4


WIRE = WireConfig("int8", "int8", "int8", "int8")


def test_rounding_between_hosts(rng):
    """Outputs and gradients are off by rounding, which the outer level does alone."""
    config = hierarchical(2, 8, 3, "all_to_all", 4, wire=WIRE)
    sharded = sharded_layer((1, 4, 1), config, D, 8)
    weights, x, ct, mask, want = draw(rng, config, sharded.num_tokens, "random", 4)
    run = sharded(weights, x, ct, mask)
    for what, error in errors(run, want).items():
        assert error < 0.03, f"{what} is off by {error:.1e}"
        assert error > 1e-4 or what in ("loss", "router_b"), f"{what} is not rounded"
    check_report(run, want, sharded)
    budget = sharded.layer.budget(8)
    assert budget.wire == WIRE and budget.innermost.wire == EXACT_WIRE


@pytest.mark.slow
def test_in_somebodys_model(rng):
    """With grad outside: what a flat exchange gives."""
    mesh = make_mesh(MeshShape(data=2, expert=4))
    x, ct = jnp.asarray(rng.normal(size=(2, 64, 16)), jnp.float32)

    def gradients(local):
        exchange = ExchangeConfig(bucket_rows=4, host_devices=local)
        config = MoEConfig(RouterConfig(8, 3), ExpertsConfig(32), exchange)
        layer = ShardedMoELayer(16, config, mesh=mesh, rngs=nnx.Rngs(5))
        return output_and_gradients(layer, x, ct)

    for got, want in zip(gradients(2), gradients(None), strict=True):
        assert relative_error(got, want) < FLOAT32_BOUND


@pytest.mark.slow
def test_bytes_are_those_of_the_compiled_step():
    exchange = {"mode": "all_to_all", "bucket_slack": math.inf, "host_devices": 2}
    config = run_config(exchange=exchange, model={"compute_dtype": "float32"})
    mesh = MeshShape(2, 4, 1)
    compiled = trace_step(Blueprint(config.model, make_mesh(mesh)), config).lower().compile()
    expected: Counter = Counter()
    for c in plan(config, mesh).collectives:
        expected[c.kind, c.axes] += c.sent
    found = {k: sent for k, sent in compiled_bytes(compiled.as_text(), mesh).items() if sent}
    assert found == pytest.approx(dict(expected), rel=1e-3)


# ---- sizes and refusals -----------------------------------------------------------------------

SIZES = {"tokens": 64, "top_k": 4, "num_experts": 32, "slots": 4, "devices": 8}


def test_budget_of_two_levels():
    outer = choose(ExchangeConfig(host_devices=4, bucket_slack=1.0), **SIZES)
    inner = outer.inside
    assert (outer.devices, outer.slots, outer.copies) == (2, 16, 4)
    assert (inner.devices, inner.slots, inner.tokens, inner.top_k) == (4, 4, 2 * outer.rows, 4)
    assert outer.axis.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert inner.axis.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert outer.innermost is inner and inner.innermost is inner
    # 2 · 64 tokens may have a row for a device, and 1 − C(28, 4)/C(32, 4) of them have one.
    hit = 1 - math.comb(28, 4) / math.comb(32, 4)
    assert inner.rows == -(-math.ceil(128 * hit + 4 * math.sqrt(128 * hit)) // 8) * 8
    roomy = choose(ExchangeConfig(host_devices=4, bucket_slack=math.inf), **SIZES)
    assert roomy.single_wave and roomy.inside.single_wave


@pytest.mark.parametrize("local", [None, 1, 8, 16])
def test_one_host_or_one_device_a_host_is_flat(local):
    assert choose(ExchangeConfig(host_devices=local), **SIZES) == choose(ExchangeConfig(), **SIZES)


def test_refusals():
    with pytest.raises(UserError, match="host_devices=3 with expert=8 devices: every host must"):
        choose(ExchangeConfig(host_devices=3), **SIZES)
    with pytest.raises(UserError, match="host_devices=0: a host has at least 1"):
        ExchangeConfig(host_devices=0)
