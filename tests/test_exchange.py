"""Plan, budget and counters against loops in Python."""

import math
from collections import Counter
from functools import cache, partial

import jax
import numpy as np
import pytest
from brute_counters import brute_counters, brute_waves
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax import exchange
from moejax.config import ExchangeConfig
from moejax.errors import UserError
from moejax.exchange import Budget
from moejax.exchange.budget import choose, probability_of_device
from moejax.exchange.plan import select_wave
from sharding.mesh import EXPERT, MeshShape, make_mesh

# ---- the plan ---------------------------------------------------------------------------------

# (G, S, T, K, C, quota): rows and assignments both tight, one of them, neither; one slot or more
# than K of them; K = 1; one device.
BUDGETS = [
    (4, 3, 12, 4, 5, 4),
    (3, 5, 11, 3, 1, 1),
    (8, 2, 9, 5, 4, 8),
    (5, 1, 13, 3, 3, 3),
    (2, 6, 10, 6, 10, 7),
    (8, 4, 7, 1, 2, 2),
    (1, 8, 6, 2, 6, 12),
    (6, 3, 8, 4, 8, 24),
]


def make_budget(shape, mode="all_to_all") -> Budget:
    devices, slots, tokens, top_k, rows, quota = shape
    mode = "local" if devices == 1 else mode
    return Budget(mode, devices, slots, tokens, top_k, rows, quota, "test")


@cache
def plan_all(budget: Budget):
    """Plans of all sources together; vmap stands for the devices along `expert`."""

    def one(slots_TK):
        (plan,) = exchange.make_plans(slots_TK, budget, EXPERT)
        return plan

    return jax.jit(jax.vmap(one, axis_name=EXPERT))


@cache
def select_all(budget: Budget):
    one = partial(select_wave, budget=budget)
    return jax.jit(jax.vmap(one, in_axes=(0, None)))


KINDS = ("uniform", "one_device", "skewed", "nothing")


def draw_slots(rng, budget: Budget, kind: str) -> np.ndarray:
    """Distinct slots of every token of every source, −1 for none; [G, T, K]."""
    total = budget.devices * budget.slots
    slots = np.full((budget.devices, budget.tokens, budget.top_k), -1, np.int32)
    weight = np.ones(total)
    if kind == "skewed":
        weight = rng.dirichlet(np.full(total, 0.2)) + 1e-9
    elif kind == "one_device":
        weight[budget.slots :] = 1e-9
    for source in range(budget.devices):
        for token in range(budget.tokens):
            key = rng.exponential(size=total) / weight
            slots[source, token] = np.argsort(key)[: budget.top_k]
    slots[rng.random(slots.shape) < rng.choice([0, 0.3])] = -1  # dropped assignments
    slots[rng.random(slots.shape[:2]) < rng.choice([0, 0.5])] = -1  # masked tokens
    return np.full_like(slots, -1) if kind == "nothing" else slots


def check_travel(slots_GTK, budget: Budget):
    """Follows every assignment through all waves."""
    plan = plan_all(budget)(slots_GTK)
    waves = np.asarray(plan.num_waves)
    assert (waves == waves[0]).all(), "sources disagree on the number of waves"
    brute = [brute_waves(s, budget) for s in slots_GTK]
    assert waves[0] == max(b[0] for b in brute)
    rows_per_pair = np.array([[b[1][g] for g in range(budget.devices)] for b in brute])
    assert np.array_equal(plan.rows_G, rows_per_pair)
    if budget.quota >= budget.rows * budget.copies:
        assert waves[0] == max(1, -(-rows_per_pair.max() // budget.rows))
    if budget.single_wave:
        assert waves[0] == 1

    devices, rows, copies = budget.devices, budget.rows, budget.copies
    assignments, token_rows = Counter(), Counter()
    for w in range(waves[0]):
        wave = select_all(budget)(plan, jnp.int32(w))
        ids = np.asarray(wave.ids_MJ).reshape(devices, devices, rows, copies)
        owner = np.asarray(wave.rows.copy_M).reshape(devices, devices, rows) // budget.top_k
        carried = np.asarray(wave.assignments.copy_M).reshape(devices, devices, rows, copies)
        for source, target in np.ndindex(devices, devices):
            pair = 0
            for row in range(rows):
                token = owner[source, target, row]
                held = ids[source, target, row] < budget.slots
                pair += held.sum()
                assert held.any() == (token < budget.tokens), "a row without an assignment"
                if token < budget.tokens:
                    token_rows[source, target, token] += 1
                for place in np.flatnonzero(held):
                    at, k = divmod(int(carried[source, target, row, place]), budget.top_k)
                    assert at == token, "an assignment in another token's row"
                    slot = target * budget.slots + ids[source, target, row, place]
                    assert slots_GTK[source, at, k] == slot
                    assignments[source, at, k] += 1
            assert pair <= budget.quota + copies - 1
        # what a device computes in a wave fits the room that the experts reserve
        assert (ids < budget.slots).sum(axis=(0, 2, 3)).max() <= budget.assignments
    expected = {tuple(i): 1 for i in np.argwhere(slots_GTK >= 0).tolist()}
    assert assignments == expected, "an assignment travels once over all waves"
    assert all(n == 1 for n in token_rows.values()), "a token travels once to a device"
    assert len(token_rows) == rows_per_pair.sum()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BUDGETS), st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_every_assignment_travels_once(shape, kind, seed):
    budget = make_budget(shape)
    check_travel(draw_slots(np.random.default_rng(seed), budget, kind), budget)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_assignment_travels_once_for_any_sizes(data):
    devices, slots = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 6))
    tokens = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, min(6, devices * slots)))
    rows = data.draw(st.integers(1, tokens))
    quota = data.draw(st.integers(1, rows * min(top_k, slots)))
    budget = make_budget((devices, slots, tokens, top_k, rows, quota))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    check_travel(draw_slots(rng, budget, data.draw(st.sampled_from(KINDS))), budget)


def test_plan_agrees_over_the_mesh(rng):
    """In a real shard_map, over both token axes: one busy source makes everybody do its waves."""
    budget = make_budget((2, 2, 4, 1, 1, 1))
    slots = np.full((4, 4, 1), -1, np.int32)
    slots[3] = 0  # the last source sends 4 rows to device 0

    def body(slots_TK):
        return exchange.make_plans(slots_TK, budget)[0].num_waves[None]

    tokens = P(("data", EXPERT))
    run = jax.shard_map(
        body,
        mesh=make_mesh(MeshShape(data=2, expert=2)),
        in_specs=tokens,
        out_specs=tokens,
        check_vma=False,
    )
    assert np.asarray(jax.jit(run)(slots.reshape(16, 1))).tolist() == [4, 4, 4, 4]


# ---- counters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["local", "all_to_all", "ring", "remote"])
@pytest.mark.parametrize("hosts", [None, (0, 0, 0, 0, 1, 1, 1, 1), (0, 1, 2, 0, 1, 2, 0, 1)])
def test_counters(rng, mode, hosts):
    shape = (1, 8, 6, 2, 6, 12) if mode == "local" else (8, 2, 9, 5, 4, 8)
    if mode in ("ring", "remote"):
        shape = (8, 2, 9, 5, 9, 8)
    budget = make_budget(shape, mode)
    hosts = (0,) if mode == "local" and hosts else hosts

    def one(slots_TK):
        plans = exchange.make_plans(slots_TK, budget, EXPERT)
        return exchange.count(plans, budget, jnp.int32(0), hosts)

    slots = draw_slots(rng, budget, rng.choice(KINDS[:3]))
    counters = jax.jit(jax.vmap(one, axis_name=EXPERT))(slots)
    found = {k: int(np.sum(v)) for k, v in vars(counters).items()}
    found["waves"] = int(np.max(counters.waves))
    assert all(v.dtype == jnp.int32 for v in vars(counters).values())
    assert found == brute_counters(slots, budget, hosts)


# ---- the budget -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts,slots,top_k", [(8, 2, 2), (64, 8, 6), (9, 4, 6), (5, 5, 1)])
def test_probability_of_device(num_experts, slots, top_k):
    """Against counting the choices that miss the device."""
    miss = math.comb(num_experts - slots, top_k) / math.comb(num_experts, top_k)
    assert probability_of_device(num_experts, slots, top_k) == pytest.approx(1 - miss)


def test_auto_counts_bytes():
    sizes = {"num_experts": 64, "slots": 8, "devices": 8}
    few = choose(ExchangeConfig(), tokens=4096, top_k=1, **sizes)
    many = choose(ExchangeConfig(), tokens=4096, top_k=32, **sizes)
    assert few.mode == "all_to_all" and few.rows < 4096 and not few.single_wave
    assert many.mode == "ring" and many.rows == 4096
    assert few.moved_rows == 7 * few.rows < many.moved_rows == 7 * 4096
    for budget in (few, many):
        assert budget.received_rows == 8 * budget.rows
        assert budget.assignments <= budget.received_rows * budget.copies


def test_budget_limits():
    sizes = {"tokens": 100, "top_k": 4, "num_experts": 16, "slots": 4, "devices": 4}
    roomy = choose(ExchangeConfig("all_to_all", bucket_slack=math.inf), **sizes)
    assert roomy.single_wave and roomy.rows == 100 and roomy.quota == 400
    assert choose(ExchangeConfig("all_to_all", bucket_rows=1000), **sizes).rows == 100
    assert choose(ExchangeConfig("all_to_all", bucket_rows=1), **sizes).rows == 1
    one = choose(ExchangeConfig("ring"), **(sizes | {"slots": 16, "devices": 1}))
    assert one.mode == "local" and one.single_wave and one.moved_rows == 0
    with pytest.raises(UserError, match=r"mode 'local' with expert=4 devices.*use 'auto'"):
        choose(ExchangeConfig("local"), **sizes)
