"""The router against a float64 oracle written token by token, forward and backward."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import numpy as jnp
from routing_support import (
    VARIANTS,
    E,
    T,
    draw_logits,
    oracle_choice,
    oracle_grad,
    oracle_values,
    route_jit,
    sigmoid,
)

from moejax.config import RouterConfig
from moejax.routing import route


@partial(jax.jit, static_argnums=0)
def value_and_grads(config, logits, bias, mask, c_TK, c_balance, c_z):
    def functional(logits, bias):
        out = route(logits, config, bias_E=bias, token_mask_T=mask, axes=())
        value = jnp.sum(out.scores_TK * c_TK) + c_balance * out.losses.load_balance
        return value + c_z * out.losses.z, out

    return jax.value_and_grad(functional, argnums=(0, 1), has_aux=True)(logits, bias)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_variant_equals_the_oracle(name, masked, rng):
    config = VARIANTS[name]
    experts_total = config.num_experts
    bias = np.zeros(experts_total, np.float32)
    if config.selection_bias:
        bias = (0.7 * rng.standard_normal(experts_total)).astype(np.float32)
    logits, experts = draw_logits(rng, config, bias, (T, experts_total))
    mask = np.ones(T, bool)
    padded = logits.copy()
    if masked:
        mask[[1, 4]] = False
        padded[1] = np.nan  # what padding holds must not matter
    c_TK = rng.standard_normal((T, config.top_k)).astype(np.float32)
    c_balance, c_z = np.float32(rng.standard_normal(2))

    (_, out), (grad, bias_grad) = value_and_grads(
        config, padded, bias, mask if masked else None, c_TK, c_balance, c_z
    )

    want = logits.astype(np.float64)
    scores, balance, z, count, entropy = oracle_values(want, experts, mask, config)

    def functional(x):
        scores, balance, z, *_ = oracle_values(x, experts, mask, config)
        return np.sum(scores * c_TK) + c_balance * balance + c_z * z

    np.testing.assert_array_equal(out.experts_TK, np.where(mask[:, None], experts, -1))
    np.testing.assert_allclose(out.scores_TK, scores, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(out.losses.load_balance, balance, rtol=2e-6)
    np.testing.assert_allclose(out.losses.z, z, rtol=2e-6)
    np.testing.assert_allclose(out.losses.total, balance + z, rtol=2e-6)
    np.testing.assert_array_equal(out.counts_E, count)
    np.testing.assert_allclose(out.entropy_sum, entropy, rtol=2e-6, atol=1e-6)
    assert out.num_tokens == mask.sum()
    np.testing.assert_allclose(grad, oracle_grad(functional, want), rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(bias_grad, 0)
    assert {a.dtype for a in (out.scores_TK, out.losses.z, out.entropy_sum)} == {
        np.dtype(np.float32)
    }
    assert {a.dtype for a in (out.experts_TK, out.counts_E, out.num_tokens)} == {np.dtype(np.int32)}


def test_scores_alone_carry_a_gradient(rng):
    config = RouterConfig(E, 2, load_balance_coef=0.0)
    logits = jnp.asarray(rng.standard_normal((T, E)), jnp.float32)
    grad = jax.grad(lambda x: route(x, config, axes=()).scores_TK[:, 0].sum())(logits)
    assert np.count_nonzero(grad) == 2 * T


@pytest.mark.parametrize("name", ["softmax", "topk_softmax", "sigmoid", "groups_max"])
def test_ties_go_to_the_lower_id(name, rng):
    config = VARIANTS[name]
    equal = route_jit(np.zeros((1, E), np.float32), config)
    np.testing.assert_array_equal(equal.experts_TK, [np.arange(config.top_k)])
    logits = rng.integers(0, 2, (T, E)).astype(np.float32)
    want, _ = oracle_choice(logits.astype(np.float64), config, np.zeros(E))
    np.testing.assert_array_equal(route_jit(logits, config).experts_TK, want)


def test_bias_moves_the_choice_and_not_the_weights(rng):
    config = RouterConfig(E, 2, "sigmoid", renormalize=False, selection_bias=True)
    logits = rng.standard_normal((T, E)).astype(np.float32)
    bias = np.zeros(E, np.float32)
    bias[[3, 6]] = 5.0, 4.0
    out = route_jit(logits, config, bias_E=bias)
    np.testing.assert_array_equal(out.experts_TK, [[3, 6]] * T)
    np.testing.assert_allclose(out.scores_TK, sigmoid(logits[:, [3, 6]]), rtol=1e-6)


def test_negative_biased_scores_stay_inside_the_groups(rng):
    """Scores below 0 would lose against experts masked with 0."""
    config = RouterConfig(
        E, 3, "sigmoid", selection_bias=True, num_groups=2, top_groups=1, group_score="top2_sum"
    )
    bias = np.full(E, -9, np.float32)
    logits, experts = draw_logits(rng, config, bias)
    np.testing.assert_array_equal(route_jit(logits, config, bias_E=bias).experts_TK, experts)


def test_even_use_costs_the_coefficient():
    config = RouterConfig(E, 2, load_balance_coef=0.25, forced_balance=True)
    out = route_jit(np.zeros((E, E), np.float32), config)
    np.testing.assert_allclose(out.losses.load_balance, 0.25, rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax_raw", "sigmoid_raw"])
def test_one_token(name, rng):
    config = VARIANTS[name]
    logits, experts = draw_logits(rng, config, np.zeros(E), (1, E))
    out = route_jit(logits, config)
    scores, balance, z, count, _ = oracle_values(
        logits.astype(np.float64), experts, np.ones(1, bool), config
    )
    np.testing.assert_array_equal(out.experts_TK, experts)
    np.testing.assert_allclose(out.scores_TK, scores, rtol=2e-6)
    np.testing.assert_allclose(out.losses.total, balance + z, rtol=2e-6)
    np.testing.assert_array_equal(out.counts_E, count)


def test_all_tokens_masked():
    config = VARIANTS["softmax"]
    out = route_jit(np.ones((T, E), np.float32), config, token_mask_T=np.zeros(T, bool))
    assert np.all(np.asarray(out.experts_TK) == -1) and not np.any(out.scores_TK)
    assert out.losses.total == 0 and out.num_tokens == 0 and out.entropy_sum == 0


# ---- properties -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["softmax", "topk_softmax", "sigmoid", "groups_max", "groups_top2"]),
    logits=hnp.arrays(np.float32, (4, E), elements=st.floats(-300, 300, width=32)),
    bias=hnp.arrays(np.float32, (E,), elements=st.floats(-2, 2, width=32)),
    mask=hnp.arrays(np.bool_, (4,)),
)
def test_properties(name, logits, bias, mask):
    config = VARIANTS[name]
    ones = np.ones((4, config.top_k), np.float32)
    one = np.float32(1)
    (_, out), (grad, _) = value_and_grads(config, logits, bias, mask, ones, one, one)
    experts, scores = np.asarray(out.experts_TK), np.asarray(out.scores_TK)
    assert all(len(set(row)) == config.top_k for row in experts[mask])
    assert np.all((experts[mask] >= 0) & (experts[mask] < E)) and np.all(experts[~mask] == -1)
    np.testing.assert_allclose(scores.sum(-1), config.scaling_factor * mask, rtol=1e-5)
    assert np.all(scores >= 0) and np.all(np.isfinite(grad))
    np.testing.assert_array_equal(grad[~mask], 0)
    assert out.counts_E.sum() == config.top_k * mask.sum()
    assert 0 <= out.entropy_sum <= mask.sum() * np.log(E) * (1 + 1e-6)
    if config.num_groups > 1:
        groups = experts[mask] // (E // config.num_groups)
        assert all(len(set(row)) <= config.top_groups for row in groups)
