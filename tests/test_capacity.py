"""The optional capacity: what it keeps, what it drops, and that it favours no source."""

from functools import cache, partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_harness import check_report, errors, random_weights, run_oracle, sharded_layer

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig
from moejax.exchange import drop_over_capacity, expert_capacity
from sharding.mesh import EXPERT

G, T, E, K = 4, 12, 8, 3


@cache
def drop_all(num_experts, capacity):
    """All sources together; vmap stands for the devices along `expert`."""
    one = partial(drop_over_capacity, num_experts=num_experts, capacity=capacity)
    return jax.jit(jax.vmap(one, axis_name=EXPERT))


def counts_of(experts_GTK, num_experts=E):
    """int [G, E]."""
    one = [np.bincount(e[e >= 0], minlength=num_experts) for e in experts_GTK]
    return np.stack(one)


def draw_experts(rng, skew):
    """Distinct experts of each token, some tokens masked; popularity differs by source."""
    weight = rng.dirichlet(np.full(E, skew), size=(G, 1)) + 1e-9
    experts = np.argsort(rng.exponential(size=(G, T, E)) / weight, axis=-1)[..., :K]
    experts[rng.random((G, T)) < rng.choice([0, 0.4], size=(G, 1))] = -1
    return experts.astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 4, 7, 18, 200]), st.sampled_from([0.3, 3.0]), st.integers(0, 2**32 - 1))
def test_what_is_kept(capacity, skew, seed):
    rng = np.random.default_rng(seed)
    experts = draw_experts(rng, skew)
    scores = rng.choice([0.25, 0.5, rng.random()], size=experts.shape).astype(np.float32)
    kept, dropped = map(np.asarray, drop_all(E, capacity)(experts, scores))
    assert ((kept == experts) | (kept == -1)).all()
    assert dropped.dtype == np.int32
    assert np.array_equal(dropped, ((kept == -1) & (experts >= 0)).sum(axis=(1, 2)))

    offered, stays = counts_of(experts), counts_of(kept)
    total = offered.sum(0)
    assert np.array_equal(stays.sum(0), np.minimum(total, capacity)), "exactly the capacity"
    even = offered * np.minimum(total, capacity) / np.maximum(total, 1)
    assert (np.abs(stays - even) < 1).all(), "each source in proportion, to within one"
    for g, e in np.argwhere(stays < offered):
        mine = experts[g] == e
        lost = scores[g][mine & (kept[g] == -1)]
        assert lost.max() <= scores[g][kept[g] == e].min(initial=np.inf), "the lowest scores go"


@pytest.mark.parametrize("capacity", [1, 15, 42, 57])
def test_nothing_is_lost_to_rounding(rng, capacity):
    """One source sends all; in float32 total · (capacity / total) may fall short."""
    tokens, num_experts = 240, 4
    for source in range(G):
        experts = np.full((G, tokens, num_experts), -1, np.int32)
        for e, total in enumerate(rng.integers(capacity, tokens + 1, num_experts)):
            experts[source, :total, e] = e
        kept, _ = drop_all(num_experts, capacity)(experts, np.ones(experts.shape, np.float32))
        assert (counts_of(np.asarray(kept), num_experts).sum(0) == capacity).all()


@pytest.mark.parametrize("capacity", [1, 6, 10, 15])
def test_no_source_is_favoured(rng, capacity):
    """Sources that send the same lose the same to within one, and gains by rounding go round."""
    one = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    experts = np.broadcast_to(one, (G, T, K))
    kept, _ = drop_all(E, capacity)(experts, rng.random(experts.shape).astype(np.float32))
    stays = counts_of(np.asarray(kept))
    assert (stays.max(0) - stays.min(0) <= 1).all()

    every = np.broadcast_to(np.arange(E, dtype=np.int32), (G, 5, E))  # 5 from each for each expert
    kept, dropped = drop_all(E, capacity)(every, rng.random(every.shape).astype(np.float32))
    assert (counts_of(np.asarray(kept)).sum(0) == min(capacity, 5 * G)).all()
    assert len(set(np.asarray(dropped).tolist())) == 1, "over G experts each source gains equally"


def test_expert_capacity():
    """The even share times the factor, rounded up, never nothing."""
    assert expert_capacity(1.0, 128, 2, 8, 4) == 128
    assert expert_capacity(1.25, 128, 2, 8, 4) == 160
    assert expert_capacity(1.0, 10, 3, 7, 1) == 5
    assert expert_capacity(0.01, 4, 1, 64, 2) == 1


# ---- in the layer -----------------------------------------------------------------------------

SHAPE, D, TOKENS = (2, 2, 1), 16, 8


def moe(factor):
    return MoEConfig(
        RouterConfig(num_experts=5, top_k=2, z_loss_coef=0.1, bias=True),
        ExpertsConfig(hidden=8),
        ExchangeConfig("all_to_all", bucket_rows=5, capacity_factor=factor),
    )


def draw(rng):
    config = moe(None)
    weights = random_weights(rng, config, D)
    weights["router_b"][0] += 3  # popular
    x, ct = rng.normal(size=(2, 4 * TOKENS, D)).astype(np.float32)
    want = run_oracle(config, weights, x, ct)
    return (weights, x, ct) if want.gap > 1e-4 else draw(rng)


def test_gradients_with_drops(rng):
    """Equal to the oracle in which the dropped assignments have no weight."""
    config, (weights, x, ct) = moe(1.0), draw(rng)
    want = run_oracle(config, weights, x, ct)
    room = expert_capacity(1.0, TOKENS, 2, 5, 2)
    sources = want.experts.reshape(2, 2, TOKENS, 2).astype(np.int32)  # each data rank by itself
    scores = want.scores.reshape(sources.shape).astype(np.float32)
    stays = np.stack([drop_all(5, room)(e, s)[0] for e, s in zip(sources, scores)])
    for group in stays:
        assert counts_of(group, 5).sum(0).max() == room
    kept = np.zeros((4 * TOKENS, 5), bool)
    for token, experts in enumerate(stays.reshape(-1, 2)):
        kept[token, experts[experts >= 0]] = True
    want = run_oracle(config, weights, x, ct, kept=kept)

    sharded = sharded_layer(SHAPE, config, D, TOKENS)
    run = sharded(weights, x, ct)
    for name, error in errors(run, want).items():
        assert error < 1.2e-6, f"{name} is off by {error:.1e} of its norm"
    slots = np.where(stays >= 0, sharded.home[stays], -1)
    dropped = int((stays < 0).sum())
    assert dropped > 0
    check_report(run, want, sharded, slots=slots, dropped=dropped)


def test_large_capacity_is_dropless(rng):
    """To the bit, outputs and gradients."""
    inputs = draw(rng)
    roomy, dropless = (sharded_layer(SHAPE, moe(f), D, TOKENS)(*inputs) for f in (100.0, None))
    assert int(roomy[2].counters.dropped) == 0
    assert np.array_equal(roomy[0], dropless[0]) and roomy[1] == dropless[1]
    for name, grad in dropless[3].items():
        assert np.array_equal(roomy[3][name], grad), name
