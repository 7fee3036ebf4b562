"""A wave in chunks of tokens: exact like a whole one, and nothing in a chunk waits for the next."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from moe_harness import random_weights, sharded_layer
from test_layer_oracle import BFLOAT16, FULL, D, moe, run_case

from moejax import exchange
from moejax.config import EXACT_WIRE, ExchangeConfig
from moejax.errors import UserError
from moejax.exchange.overlap import run_chunks
from moejax.layer import MoELayer
from sharding.mesh import EXPERT, MeshShape, abstract_mesh
from sharding.specs import specs_of
from sharding.traffic import inner_jaxprs


def chunked(mode, chunks, rows=None, **experts):
    return moe(10, 3, mode, rows, chunks=chunks, **experts)


def test_buckets_in_chunks(rng):
    """Four chunks of 4 tokens in buckets of 2 rows: all chunks take part in every further wave."""
    waves, budget = run_case(rng, (1, 4, 1), chunked("all_to_all", 4, 2, **FULL), 16)
    assert (budget.chunks, budget.tokens) == (4, 4)
    assert waves["one_device"] == 2 and waves["one_token"] == 1


def test_ring_in_chunks(rng):
    _, budget = run_case(rng, (2, 2, 2), chunked("ring", 3, **FULL), 12)
    assert budget.mode == "ring" and budget.chunks == 3


def test_bfloat16_in_chunks(rng):
    run_case(rng, (1, 4, 1), chunked("auto", 2), 16, dtype=BFLOAT16)


def test_weights_gradients_are_summed_in_float32(rng):
    """With bfloat16 weights: 16 chunks give what one does, to little more than one rounding."""
    found = []
    for chunks in (1, 16):
        config = moe(4, 2, "all_to_all", 8, chunks=chunks)
        seeded = np.random.default_rng(7)
        weights = random_weights(seeded, config, D)
        x, ct = seeded.normal(size=(2, 4 * 64, D)).astype(BFLOAT16)
        run = sharded_layer((1, 4, 1), config, D, 64)(weights, x, ct)
        found.append(run[3]["w_out"].astype(np.float64))
    whole, pieces = found
    assert np.linalg.norm(whole - pieces) < 4e-3 * np.linalg.norm(whole)


def test_tokens_that_do_not_divide():
    config = ExchangeConfig(mode="ring", chunks=4)
    sizes = {"top_k": 2, "num_experts": 8, "slots": 2, "devices": 4}
    chunks = {t: exchange.choose(config, tokens=t, **sizes).chunks for t in (1, 2, 6, 7, 8, 64)}
    assert chunks == {1: 1, 2: 2, 6: 3, 7: 1, 8: 4, 64: 4}
    with pytest.raises(UserError, match="chunks=0: there is at least 1"):
        ExchangeConfig(chunks=0)


@pytest.mark.parametrize(
    "devices, host_devices, reserved", [(1, None, 0), (4, None, 20), (4, 2, 20)]
)
def test_multiprocessors_are_reserved(monkeypatch, devices, host_devices, reserved):
    """For transfers, so not where nothing travels."""
    asked = []

    def experts(x_RD, *_, reserve_sms, **__):
        asked.append(reserve_sms)
        return x_RD

    monkeypatch.setattr("moejax.experts.fused.fused_experts", experts)
    config = moe(8, 2, chunks=2)
    exchanged = dataclasses.replace(config.exchange, reserve_sms=20, host_devices=host_devices)
    config = dataclasses.replace(config, exchange=exchanged)
    layer = MoELayer(D, config, expert_devices=devices, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    mapped = jax.shard_map(
        lambda params, x: nnx.merge(graph, params, rest)(x)[0],
        mesh=abstract_mesh(MeshShape(expert=devices)),
        in_specs=(specs_of(params), P(EXPERT)),
        out_specs=P(EXPERT),
        check_vma=False,
    )
    jax.eval_shape(mapped, params, jax.ShapeDtypeStruct((16, D), jnp.float32))
    assert asked and set(asked) == {reserved}
    with pytest.raises(UserError, match="reserve_sms=-1: 0 reserves none"):
        ExchangeConfig(reserve_sms=-1)


# ---- what waits for what ----------------------------------------------------------------------


@jax.custom_vjp
def marked(x):
    """Stands for the experts: `sin` forward and `tan` backward, which nothing else uses."""
    return jnp.sin(x)


marked.defvjp(lambda x: (jnp.sin(x), None), lambda _, ct: (jnp.tan(ct),))


def steps_of(jaxpr, inputs=None, found=None):
    """The exchanges and experts of a program in its order, each with those that it waits for."""
    found = [] if found is None else found
    known = dict(zip(jaxpr.invars, inputs or [frozenset()] * len(jaxpr.invars), strict=True))

    def needs(variables):
        return frozenset().union(*(known.get(v, frozenset()) for v in variables if hash_ok(v)))

    for eqn in jaxpr.eqns:
        inside = [getattr(j, "jaxpr", j) for j in inner_jaxprs(eqn)]
        if eqn.primitive.name in ("all_to_all", "all_gather", "sin", "tan"):
            found.append((eqn.primitive.name, needs(eqn.invars)))
            out = [needs(eqn.invars) | {len(found) - 1}] * len(eqn.outvars)
        elif inside:
            taken = [known.get(v, frozenset()) if hash_ok(v) else frozenset() for v in eqn.invars]
            body = inside[0]
            _, out = steps_of(body, taken[len(taken) - len(body.invars) :], found)
        else:
            out = [needs(eqn.invars)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, out))
    return found, [known.get(v, frozenset()) if hash_ok(v) else frozenset() for v in jaxpr.outvars]


def hash_ok(variable):
    """A literal is no variable."""
    return not hasattr(variable, "val")


@pytest.mark.parametrize("mode", ["all_to_all", "ring", "remote"])
def test_chunks_wait_for_what_they_must(mode):
    chunks, tokens = 4, 8
    rows = 3 if mode == "all_to_all" else tokens
    budget = exchange.Budget(mode, 2, 4, tokens, 2, rows, 99, "test", EXACT_WIRE, chunks)
    assert budget.rows < tokens or budget.single_wave

    def experts(rows, weights):
        return marked(rows.x_RD * weights)

    def body(x_TD, scores_TK, slots_TK, ct_TD):
        plans = exchange.make_plans(slots_TK, budget)
        run = partial(run_chunks, plans=plans, wave=0, budget=budget, experts=experts)
        y_TD, pull = jax.vjp(run, x_TD, scores_TK, jnp.float32(2))
        return y_TD, pull(ct_TD)[0]

    spec = P(EXPERT)
    mapped = jax.shard_map(
        body,
        mesh=abstract_mesh(MeshShape(expert=2)),
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    wide = jax.ShapeDtypeStruct((2 * chunks * tokens, 4), jnp.float32)
    narrow = jax.ShapeDtypeStruct((2 * chunks * tokens, 2), jnp.float32)
    slots = jax.ShapeDtypeStruct(narrow.shape, jnp.int32)
    jaxpr = jax.make_jaxpr(mapped)(wide, narrow, slots, wide)
    found, _ = steps_of(jaxpr.jaxpr)
    names, needs = zip(*found)
    for phase in ("sin", "tan"):
        computed = [i for i, name in enumerate(names) if name == phase]
        assert len(computed) == chunks
        arrived = set()
        for i, now in enumerate(computed):
            assert not needs[now] & set(computed), f"{phase} of chunk {i} waits for other experts"
            new = {j for j in needs[now] if names[j].startswith("all")} - arrived
            assert new, f"{phase} of chunk {i} takes nothing that travelled for it"
            if phase == "sin" and i:
                # Issued before the experts of the chunk before, and after that chunk's arrival.
                assert max(new) < computed[i - 1]
                assert any(arrived & needs[j] for j in new)
            arrived |= new
