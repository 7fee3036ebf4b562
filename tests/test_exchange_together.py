"""Parts of the exchange that are tested by themselves elsewhere, together: against the oracle.

Chunks of tokens, buckets and rings in several waves, hosts, narrow rows, replicas and capacity.
"""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from moe_harness import check_report, error_norms, relative, run_oracle, sharded_layer
from test_capacity import drop_all
from test_hierarchy import hierarchical
from test_layer_oracle import FLOAT32_BOUND, FULL, D, draw, moe, run_case
from test_placement_arrays import random_placement
from test_reduced_rows import BOUND, draw_projected, projected_oracle, with_wire

from moejax.exchange import expert_capacity
from moejax.placement.choice import place
from sharding.mesh import EXPERT

MESH, TOKENS = (1, 4, 1), 8


def check_run(run, want, bound):
    """Output, loss and all gradients."""
    for part, pair in error_norms(run, want).items():
        assert relative(*pair) <= bound, f"{part} is off by {relative(*pair):.1e} of its norm"


def check_narrow(rng, config, routings=("random", "one_device", "one_token")):
    """Against the oracle with projected weights; the waves of each routing, and the budget."""
    sharded, waves = sharded_layer(MESH, config, D, TOKENS), {}
    for routing in routings:
        weights, x, ct, mask = draw_projected(rng, config, sharded.num_tokens, routing, MESH[1])
        want = projected_oracle(config, weights, x, ct, mask)
        run = sharded(weights, x, ct, mask)
        check_run(run, want, BOUND)
        waves[routing] = check_report(run, want, sharded)
    return waves, sharded.layer.budget(TOKENS)


@pytest.mark.slow
def test_narrow_rows_in_chunks_between_hosts(rng):
    """Buckets of 3 rows at both levels and of each of two chunks; biases, a gated shared expert."""
    config = hierarchical(2, 10, 3, "all_to_all", 3, chunks=2, **FULL)
    waves, budget = check_narrow(rng, with_wire(config, dispatch_dim=5, combine_dim=11))
    inner = budget.innermost
    assert (budget.chunks, budget.tokens, budget.rows, inner.tokens, inner.rows) == (2, 4, 3, 6, 3)
    # Four rows for the other host go as 3 and 1; what two devices sent is spread 3 at a time.
    assert waves["one_device"] == 2 + 1 and waves["one_token"] == 1


def test_narrow_rows_in_chunks(rng):
    """One level; 9 of 16 columns one way only, in a ring of 2 chunks."""
    config = moe(10, 3, "ring", chunks=2, bias=True)
    _, budget = check_narrow(rng, with_wire(config, combine_dim=9), ("random", "one_token"))
    assert (budget.mode, budget.chunks) == ("ring", 2)


def test_rings_between_hosts_in_waves(rng):
    """Assignments open further waves at both levels."""
    config = hierarchical(2, 10, 3, "ring", slack=0.1, **FULL)
    waves, budget = run_case(rng, MESH, config, TOKENS)
    inner = budget.innermost
    assert budget.mode == inner.mode == "ring" and (budget.quota, inner.quota) == (16, 16)
    assert waves["one_device"] > 2 and waves["one_token"] == 1


@pytest.mark.slow
def test_replicas_in_chunks(rng):
    """Tokens take turns at the replicas over all chunks, as they do in one piece."""
    config = moe(6, 3, "all_to_all", 2, chunks=2, bias=True)
    sharded = sharded_layer(MESH, config, D, TOKENS)
    waves = []
    for replicas, routing in (2, "random"), (3, "one_expert"):
        weights, x, ct, mask, want = draw(rng, config, sharded.num_tokens, routing, MESH[1])
        placement = random_placement(rng, replicas)
        run = sharded(weights, x, ct, mask, placement=placement)
        check_run(run, want, FLOAT32_BOUND)
        asked = want.experts.reshape(MESH[1], TOKENS, 3).astype(np.int32)
        one = partial(place, placement=placement, slots_per_device=3)
        slots = np.asarray(jax.jit(jax.vmap(one, axis_name=EXPERT))(asked))
        waves.append(check_report(run, want, sharded, slots=slots, placement=placement))
    assert max(waves) > 1 and sharded.layer.budget(TOKENS, placement).chunks == 2


def test_capacity_between_hosts(rng):
    """What an expert drops is chosen from all hosts' tokens; each block of data by itself."""
    shape = (2, 4, 1)
    config = hierarchical(2, 10, 2, "all_to_all", 3, bias=True)
    config = replace(config, exchange=replace(config.exchange, capacity_factor=1.5))
    sharded = sharded_layer(shape, config, D, TOKENS)
    weights, x, ct, mask, want = draw(rng, config, sharded.num_tokens, "one_expert", shape[1])
    room = expert_capacity(1.5, TOKENS, 2, 10, 4)
    experts = want.experts.reshape(2, 4, TOKENS, 2).astype(np.int32)
    scores = want.scores.reshape(experts.shape).astype(np.float32)
    stays = np.stack([drop_all(10, room)(e, s)[0] for e, s in zip(experts, scores)])
    kept = np.zeros((sharded.num_tokens, 10), bool)
    for token, experts_K in enumerate(stays.reshape(-1, 2)):
        kept[token, experts_K[experts_K >= 0]] = True
    want = run_oracle(config, weights, x, ct, mask, kept)
    run = sharded(weights, x, ct, mask)
    check_run(run, want, FLOAT32_BOUND)
    slots, dropped = np.where(stays >= 0, sharded.home[stays], -1), int((stays < 0).sum())
    assert dropped >= 2 * (4 * TOKENS - room)
    assert check_report(run, want, sharded, slots=slots, dropped=dropped) > 1
