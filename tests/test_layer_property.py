"""The layer against the dense float64 oracle, on routings and masks that hypothesis makes up."""

import chex
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moe_harness import check_report, errors, random_weights, run_oracle, sharded_layer

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig

D, TOKENS, DEVICES, EXPERTS = 16, 8, 8, 10
BOUND = 3e-6  # norm-relative; worst of 2000 examples 1.1e-6, with few tokens
SMALLEST_GAP = 1e-4  # between logits, so that float32 and float64 choose alike

# Ten experts on eight devices: two devices have two of them, and the last slot of the others is
# empty. Buckets of 3 rows for 8 tokens: up to three waves.
CONFIG = MoEConfig(
    RouterConfig(EXPERTS, 3, load_balance_coef=0.1, z_loss_coef=0.05, bias=True),
    ExpertsConfig(hidden=8, bias=True),
    ExchangeConfig("all_to_all", bucket_rows=3),
)


@st.composite
def masks(draw):
    """No token, all, those of some devices, or any."""
    some = st.lists(st.booleans(), min_size=DEVICES, max_size=DEVICES)
    any_ = st.lists(st.booleans(), min_size=DEVICES * TOKENS, max_size=DEVICES * TOKENS)
    kind = draw(st.sampled_from(["all", "devices", "any", "none"]))
    if kind == "devices":
        return np.repeat(draw(some), TOKENS)
    if kind == "any":
        return np.array(draw(any_))
    return np.full(DEVICES * TOKENS, kind == "all")


BIASES = st.lists(st.sampled_from([0.0, 0.0, 9.0, -9.0]), min_size=EXPERTS, max_size=EXPERTS)


def check(bias, mask, alike, seed) -> int | None:
    """Compares one layer call, and returns its waves; None where two choices nearly tie."""
    rng = np.random.default_rng(seed)
    sharded = sharded_layer((1, DEVICES, 1), CONFIG, D, TOKENS)
    weights = random_weights(rng, CONFIG, D)
    weights["router_b"] += np.array(bias, np.float32)
    x = rng.normal(size=(sharded.num_tokens, D)).astype(np.float32)
    if alike:
        x = x[:1] + np.float32(0.1) * x
    ct = rng.normal(size=x.shape).astype(np.float32)
    want = run_oracle(CONFIG, weights, x, ct, mask)
    if want.gap <= SMALLEST_GAP:
        return None
    run = sharded(weights, x, ct, mask)
    chex.assert_shape(run[0], x.shape)
    chex.assert_tree_all_finite((run[0], run[1], run[3]))
    for name, error in errors(run, want).items():
        assert error <= BOUND, f"{name} is off by {error:.1e} of its norm"
    return check_report(run, want, sharded)


@settings(max_examples=20, deadline=None)
@given(bias=BIASES, mask=masks(), alike=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_routing(bias, mask, alike, seed):
    """Experts that are wanted or shunned, tokens that resemble each other, masks: one program."""
    assume(check(bias, mask, alike, seed) is not None)


def test_such_a_bias_needs_several_waves():
    """Three wanted experts: 8 rows of every source for each of their devices, in buckets of 3."""
    wanted = [9.0] * 3 + [0.0] * 7
    assert check(wanted, np.ones(DEVICES * TOKENS, bool), alike=True, seed=0) >= 3
