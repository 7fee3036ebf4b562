"""The MoE layer against a dense float64 oracle: outputs, gradients, statistics, counters.

Each case is one compiled function; all routings of a case are data to it, so they run in one test.
"""

from collections import defaultdict
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from moe_harness import (
    check_report,
    error_norms,
    random_weights,
    relative,
    run_oracle,
    sharded_layer,
)
from oracle import Dense, dense_moe

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig
from moejax.errors import UserError
from moejax.placement.arrays import num_slots

D = 16
BFLOAT16 = ml_dtypes.bfloat16
FLOAT32_BOUND = 1.2e-6  # norm-relative; worst of many seeds, over all outputs and gradients: 3.8e-7
# bfloat16, over all routings of a case together: worst of 9,500 cases of 8 tokens 8.3e-3, and
# 1.1e-2 for gradients of vectors. One routing alone is at the mercy of the few roundings that
# dominate its 8 tokens: worst 1.9e-2 and 4.2e-2 of 57,000; an assignment lost would be 0.2.
BFLOAT16_BOUND, BFLOAT16_VECTORS = 1e-2, 1.5e-2
BFLOAT16_ALONE, BFLOAT16_VECTORS_ALONE = 3e-2, 6e-2
SMALLEST_GAP = 1e-4  # between logits, so that float32 and float64 choose alike

FULL = {"bias": True, "shared_hidden": 8, "shared_gate": True}
ROUTINGS = ("random", "empty_expert", "one_expert", "one_device", "one_token", "no_token")


def moe(
    num_experts, top_k, mode="auto", rows=None, *, slack=1.5, chunks=1, renormalize=True, **experts
):
    return MoEConfig(
        RouterConfig(
            num_experts=num_experts,
            top_k=top_k,
            renormalize=renormalize,
            load_balance_coef=0.1,
            z_loss_coef=0.05,
            bias=True,
        ),
        ExpertsConfig(**({"hidden": 8} | experts)),
        ExchangeConfig(mode=mode, bucket_rows=rows, bucket_slack=slack, chunks=chunks),
    )


def bend(routing, weights, mask, rng, devices):
    """Changes the router's bias or the mask so that the routing is of the kind wanted."""
    num_experts = weights["router"].shape[1]
    per_device = num_slots(num_experts, devices)
    bias = weights["router_b"]
    if routing == "empty_expert":
        bias[rng.integers(num_experts)] -= 12
    elif routing == "one_expert":
        bias[rng.integers(num_experts)] += 9
    elif routing == "one_device":
        bias[:per_device] += 12  # the first device's home experts
    elif routing == "one_token":
        mask[:] = False
        mask[rng.integers(mask.size)] = True
    elif routing == "no_token":
        mask[:] = False


def draw(rng, config, tokens, routing, devices, dtype=np.float32):
    """Weights, tokens, cotangent and mask whose choice is not within rounding of another."""
    for _ in range(100):
        weights = random_weights(rng, config, D)
        mask = np.ones(tokens, bool)
        bend(routing, weights, mask, rng, devices)
        if dtype == BFLOAT16:  # the layer casts these, so they must be exact in it
            weights = {
                k: v if "router" in k or "gate" in k else v.astype(dtype).astype(np.float32)
                for k, v in weights.items()
            }
        x = rng.normal(size=(tokens, D)).astype(dtype)
        ct = rng.normal(size=(tokens, D)).astype(np.float32)
        want = run_oracle(config, weights, x, ct, mask)
        if want.gap > SMALLEST_GAP:
            return weights, x, ct, mask, want
    raise AssertionError("no routing without near ties")


def bounds_for(name, dtype):
    """How far an output or gradient may be off, norm-relative: in one routing, in all together."""
    if dtype == np.float32:
        return FLOAT32_BOUND, FLOAT32_BOUND
    if "b_" in name or name == "shared_gate":
        return BFLOAT16_VECTORS_ALONE, BFLOAT16_VECTORS
    return BFLOAT16_ALONE, BFLOAT16_BOUND


def check_kind(routing, want, config, devices):
    """The routing really is what its name says."""
    tokens = (want.experts[:, 0] >= 0).sum()
    if routing == "empty_expert":
        assert want.counts.min() == 0
    elif routing == "one_expert":
        assert want.counts.max() == tokens
    elif routing == "one_device":
        here = num_slots(config.router.num_experts, devices)
        assert want.counts[:here].sum() == tokens * min(here, config.router.top_k)
    elif routing == "one_token":
        assert tokens == 1
    elif routing == "no_token":
        assert tokens == 0


def run_case(rng, shape, config, tokens, routings=ROUTINGS, dtype=np.float32, **how):
    """All routings of a case; returns the waves each needed, and the budget."""
    sharded = sharded_layer(shape, config, D, tokens, **how)
    waves, squares = {}, defaultdict(list)
    for routing in routings:
        weights, x, ct, mask, want = draw(rng, config, sharded.num_tokens, routing, shape[1], dtype)
        check_kind(routing, want, config, shape[1])
        run = sharded(weights, x, ct, mask)
        assert run[0].dtype == dtype
        for name, pair in error_norms(run, want).items():
            squares[name].append(np.square(pair))
            error, alone = relative(*pair), bounds_for(name, dtype)[0]
            assert error <= alone, f"{routing}: {name} is off by {error:.1e} of its norm"
        waves[routing] = check_report(run, want, sharded, how.get("hosts"))
    for name, pairs in squares.items():
        error, together = relative(*np.sqrt(np.sum(pairs, axis=0))), bounds_for(name, dtype)[1]
        assert error <= together, f"{name} is off by {error:.1e} of its norm over all routings"
    return waves, sharded.layer.budget(tokens)


def _oracle_of(spec, ct, mask, kept, inputs):
    weights = {k: v for k, v in inputs.items() if k != "x"}
    return dense_moe(spec, weights, inputs["x"], ct, mask, kept)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "swiglu_oai", "gelu", "relu2"])
def test_oracle_by_differences(rng, activation):
    """The oracle's hand-written backward, along a random direction of each input."""
    for renormalize in (True, False):
        config = moe(6, 2, renormalize=renormalize, activation=activation, **FULL)
        weights, x, ct, mask, _ = draw(rng, config, 9, "random", 1)
        mask[3] = False
        kept = rng.random((9, 6)) > 0.2
        inputs = {k: v.astype(np.float64) for k, v in {**weights, "x": x}.items()}
        oracle = partial(_oracle_of, Dense(2, activation, renormalize, 0.1, 0.05), ct, mask, kept)
        want = oracle(inputs)
        for name in inputs:
            along = rng.normal(size=inputs[name].shape)

            ahead = oracle({**inputs, name: inputs[name] + 1e-6 * along}).loss
            slope = (ahead - oracle({**inputs, name: inputs[name] - 1e-6 * along}).loss) / 2e-6
            expected = (want.grads[name] * along).sum()
            assert abs(slope - expected) < 1e-6 * max(abs(want.loss), np.linalg.norm(along)), name


def test_one_device(rng):
    waves, budget = run_case(rng, (1, 1, 1), moe(10, 3, **FULL), 16)
    assert budget.mode == "local" and max(waves.values()) == 1


def test_waves_by_rows(rng):
    """Buckets of 3 rows; top-k above the 1 or 2 experts of a device; 10 experts on 8 devices."""
    config = moe(10, 3, "all_to_all", 3, bias=True)
    waves, _ = run_case(rng, (1, 8, 1), config, 8, hosts=(0, 0, 0, 0, 1, 1, 1, 1))
    assert waves["one_device"] >= 3 and waves["one_expert"] >= 3 and waves["one_token"] == 1


def test_waves_by_assignments(rng):
    """Buckets hold every row, but not the four assignments that each of 16 rows may carry."""
    config = moe(32, 4, "all_to_all", 16, activation="geglu")
    waves, budget = run_case(rng, (1, 8, 1), config, 16)
    assert budget.rows == budget.tokens and budget.quota < 16 * 4
    assert waves["one_device"] == 2 and waves["random"] == 1


def test_ring_waves(rng):
    """A ring brings every token in every wave; only assignments can open a further one."""
    waves, budget = run_case(rng, (1, 8, 1), moe(16, 3, "ring", shared_hidden=8), 16)
    assert budget.mode == "ring" and waves["one_device"] == 2


def test_one_expert_per_device_and_token(rng):
    """k = 1, E = G, and `auto` finding that buckets move fewer bytes than a ring."""
    config = moe(8, 1, slack=1.0, renormalize=False, activation="relu2")
    waves, budget = run_case(rng, (1, 8, 1), config, 16)
    assert budget.mode == "all_to_all" and budget.reason.startswith("8 rows")
    assert waves["one_device"] == 2


def test_data_and_expert_parallel(rng):
    """`auto` choosing the ring."""
    _, budget = run_case(rng, (2, 4, 1), moe(10, 3, activation="gelu", **FULL), 8)
    assert budget.mode == "ring"


def test_tensor_parallel(rng):
    """Everything that is split over or added once along `tensor`, with further waves."""
    config = moe(8, 2, "all_to_all", 3, **FULL)
    waves, _ = run_case(rng, (2, 2, 2), config, 8, hosts=(0, 1))
    assert waves["one_device"] >= 3


def test_data_parallel_only(rng):
    run_case(rng, (8, 1, 1), moe(6, 2, **FULL), 4)


def test_experts_that_do_not_divide(rng):
    """64 experts on 3 devices, in buckets that always hold everything: no loop at all."""
    _, budget = run_case(rng, (1, 3, 1), moe(64, 6, "all_to_all", slack=np.inf), 8)
    assert budget.single_wave


def test_every_expert_of_all(rng):
    """K = E, so that every token goes everywhere, on an odd ring."""
    run_case(rng, (1, 3, 1), moe(4, 4, "ring", **FULL), 5, ("random", "one_token", "no_token"))


def test_many_experts_bfloat16(rng):
    """More experts than a byte counts, and than bfloat16 integers: ids must stay exact."""
    config = moe(264, 8, "all_to_all")
    waves, _ = run_case(rng, (1, 8, 1), config, 8, dtype=BFLOAT16)
    assert waves["one_device"] == 2


def test_bfloat16_sums_over_many_tokens(rng):
    """Gradients of biases and matrices add up 2048 tokens: bfloat16 sums would stop growing."""
    config = moe(2, 1, renormalize=False, **FULL)
    run_case(rng, (1, 1, 1), config, 2048, ("random",), dtype=BFLOAT16)


def test_fewer_experts_than_devices_is_refused():
    with pytest.raises(UserError, match=r"num_experts=6 on expert=8 devices: every device needs"):
        sharded_layer((1, 8, 1), moe(6, 2), D, 4)


CROSS = [
    (shape, mode)
    for shape in [(1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (8, 1, 1), (1, 3, 1)]
    for mode in ("local", "all_to_all", "ring", "remote", "auto")
    if mode != "local" or shape[1] == 1
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("shape,mode", CROSS)
def test_every_mode_on_every_mesh(rng, shape, mode, dtype):
    config = moe(10, 3, mode, 3, **FULL)
    run_case(rng, shape, config, 8, dtype=dtype, quick=False)
