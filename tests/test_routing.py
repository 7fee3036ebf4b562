"""The router against a float64 oracle written token by token, forward and backward."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import RouterConfig
from moejax.routing import Router, RouterBias, route, router_metrics, update_bias
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh

T, E, D = 5, 8, 6
route_jit = jax.jit(partial(route, axes=()), static_argnames=("config",))


# ---- the oracle: float64, one token at a time -------------------------------------------------


def _softmax(v):
    e = np.exp(v - np.max(v))
    return e / e.sum()


def _sigmoid(v):
    return 1 / (1 + np.exp(-v))


def oracle_choice(logits, config, bias):
    """Ids by descending score, and the smallest gap between scores the choice compared."""
    experts, gap = [], np.inf
    for row in logits:
        score = {"softmax": _softmax, "sigmoid": _sigmoid, "topk_softmax": np.array}
        select = score[config.score_function](row) + bias
        allowed = range(len(row))
        if config.num_groups > 1:
            size = len(row) // config.num_groups
            groups = []
            for g in range(config.num_groups):
                best = sorted(select[g * size : (g + 1) * size], reverse=True)
                groups.append(best[0] if config.group_score == "max" else sum(best[:2]))
            if config.top_groups < config.num_groups:
                gap = min(gap, np.diff(np.sort(groups)).min(initial=np.inf))
            best_groups = sorted(range(config.num_groups), key=lambda g: (-groups[g], g))
            best_groups = best_groups[: config.top_groups]
            allowed = [e for e in allowed if e // size in best_groups]
        ranked = sorted(allowed, key=lambda e: (-select[e], e))
        experts.append(ranked[: config.top_k])
        gap = min(gap, np.diff(np.sort(select)).min(initial=np.inf))
    return np.array(experts), gap


def oracle_values(logits, experts, mask, config):
    """Scores [T, K] and the losses for a given choice."""
    scores = np.zeros(experts.shape)
    mean_prob, count = np.zeros(config.num_experts), np.zeros(config.num_experts)
    z = entropy = 0.0
    for t, row in enumerate(logits):
        if not mask[t]:
            continue
        chosen = row[experts[t]]
        if config.score_function == "sigmoid":
            every, prob = _sigmoid(row), _sigmoid(row) / _sigmoid(row).sum()
            scores[t] = every[experts[t]]
        else:
            prob = _softmax(row)
            scores[t] = prob[experts[t]]
        if config.score_function == "topk_softmax":
            scores[t] = _softmax(chosen)
        if config.renormalize:
            scores[t] /= scores[t].sum()
        scores[t] *= config.scaling_factor
        mean_prob += prob / mask.sum()
        entropy -= np.sum(prob * np.log(prob))
        z += np.log(np.sum(np.exp(row))) ** 2 / mask.sum()
        for e in experts[t]:
            count[e] += 1
    share = count / max(count.sum(), 1)
    balance = config.load_balance_coef * config.num_experts * np.sum(share * mean_prob)
    return scores, balance, config.z_loss_coef * z, count, entropy


def oracle_grad(functional, logits, step=1e-5):
    grad = np.zeros_like(logits)
    for i in np.ndindex(logits.shape):
        plus, minus = logits.copy(), logits.copy()
        plus[i] += step
        minus[i] -= step
        grad[i] = (functional(plus) - functional(minus)) / (2 * step)
    return grad


def draw_logits(rng, config, bias, shape=(T, E), scale=1.5):
    """Random float32 logits whose choice does not hang on rounding."""
    while True:
        logits = (scale * rng.standard_normal(shape)).astype(np.float32)
        experts, gap = oracle_choice(logits.astype(np.float64), config, bias.astype(np.float64))
        if gap > 1e-5:
            return logits, experts


# ---- every variant against the oracle ---------------------------------------------------------

both = {"load_balance_coef": 0.3, "z_loss_coef": 0.2}
VARIANTS = {
    "softmax": RouterConfig(E, 2, renormalize=True, **both),
    "softmax_raw": RouterConfig(E, 3, renormalize=False, scaling_factor=2.5, **both),
    "softmax_bias": RouterConfig(E, 3, renormalize=False, selection_bias=True, **both),
    "topk_softmax": RouterConfig(E, 2, "topk_softmax", **both),
    "topk_softmax_bias": RouterConfig(E, 2, "topk_softmax", False, 1.5, True, **both),
    "sigmoid": RouterConfig(E, 2, "sigmoid", True, 2.5, selection_bias=True, **both),
    "sigmoid_raw": RouterConfig(E, 2, "sigmoid", False, **both),
    "k_1": RouterConfig(E, 1, renormalize=False, **both),
    "k_all": RouterConfig(E, E, **both),
    "one_expert": RouterConfig(1, 1, renormalize=False, **both),
    "groups_max": RouterConfig(E, 3, num_groups=4, top_groups=2, **both),
    "groups_top2": RouterConfig(E, 3, "sigmoid", True, 2.5, True, 0.0, 4, 2, "top2_sum", **both),
    "groups_top2_of_one": RouterConfig(
        E, 2, num_groups=E, top_groups=3, group_score="top2_sum", **both
    ),
    "no_losses": RouterConfig(E, 2, load_balance_coef=0.0),
}


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
    np.testing.assert_allclose(out.scores_TK, _sigmoid(logits[:, [3, 6]]), rtol=1e-6)


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


# ---- the module -------------------------------------------------------------------------------


def test_router_module_against_the_oracle(rng):
    config = RouterConfig(E, 2, bias=True, selection_bias=True, **both)
    router = Router(D, config, rngs=nnx.Rngs(int(rng.integers(2**31))))
    router.b_E[...] = jnp.asarray(rng.standard_normal(E), jnp.float32)
    router.selection_bias_E[...] = jnp.asarray(0.3 * rng.standard_normal(E), jnp.float32)
    bias = np.asarray(router.selection_bias_E[...], np.float64)
    w, b = (np.asarray(v[...], np.float64) for v in (router.w_DE, router.b_E))
    while True:
        x = rng.standard_normal((T, D)).astype(np.float32)
        logits = x.astype(np.float64) @ w + b
        experts, gap = oracle_choice(logits, config, bias)
        if gap > 1e-5:
            break
    c_TK = rng.standard_normal((T, 2)).astype(np.float32)

    @nnx.jit
    def grads(router, x):
        def functional(router, x):
            out = router(x, axes=())
            return jnp.sum(out.scores_TK * c_TK) + out.losses.total, out

        diff = nnx.DiffState(0, nnx.Param)
        return nnx.grad(functional, argnums=(diff, 1), has_aux=True)(router, x)

    (grad, grad_x), out = grads(router, x)

    def functional(logits):
        scores, balance, z, *_ = oracle_values(logits, experts, np.ones(T, bool), config)
        return np.sum(scores * c_TK) + balance + z

    grad_logits = oracle_grad(functional, logits)
    np.testing.assert_array_equal(out.experts_TK, experts)
    np.testing.assert_allclose(grad["w_DE"][...], x.T @ grad_logits, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(grad["b_E"][...], grad_logits.sum(0), rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(grad_x, grad_logits @ w.T, rtol=1e-4, atol=5e-6)
    assert "selection_bias_E" not in grad


def test_variables_carry_their_metadata():
    router = Router(D, RouterConfig(E, 2, bias=True, selection_bias=True), rngs=nnx.Rngs(0))
    for variable in (router.w_DE, router.b_E, router.selection_bias_E):
        assert variable.spec == P() and variable.float32
        assert variable[...].dtype == jnp.float32
    _, params, biases = nnx.split(router, nnx.Param, RouterBias)
    assert set(params) == {"w_DE", "b_E"} and set(biases) == {"selection_bias_E"}
    plain = Router(D, RouterConfig(E, 2), rngs=nnx.Rngs(0))
    assert plain.b_E is None and plain.selection_bias_E is None
    wide = Router(400, RouterConfig(E, 2), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(np.std(wide.w_DE[...]), 0.05, rtol=0.1)


def test_bfloat16_inputs_route_as_their_float32_values(rng):
    config = RouterConfig(300, 8)
    router = Router(64, config, rngs=nnx.Rngs(int(rng.integers(2**31))))
    x = jnp.asarray(rng.standard_normal((16, 64)), jnp.bfloat16)
    call = nnx.jit(lambda router, x: router(x, axes=()))
    half, full = call(router, x), call(router, x.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6 if a.dtype == jnp.float32 else 0)
    logits = np.asarray(x, np.float64) @ np.asarray(router.w_DE[...], np.float64)
    scores, *_ = oracle_values(logits, np.asarray(half.experts_TK), np.ones(16, bool), config)
    np.testing.assert_allclose(half.scores_TK, scores, rtol=1e-5)
    w_half = router.w_DE[...].astype(jnp.bfloat16).astype(jnp.float32)
    rounded = route_jit(jnp.dot(x.astype(jnp.float32), w_half), config)
    assert not np.allclose(rounded.scores_TK, scores, rtol=1e-5)  # the check above can tell


# ---- several devices --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_global_statistics_over_the_mesh(name, rng):
    config = VARIANTS[name]
    per_device = 3
    tokens = 8 * per_device
    router = Router(D, config, rngs=nnx.Rngs(int(rng.integers(2**31))))
    graph, state = nnx.split(router)
    x = rng.standard_normal((tokens, D)).astype(np.float32)
    mask = rng.random(tokens) < 0.7  # unequal numbers of tokens
    mask[:per_device] = False  # a device without any
    c_TK = rng.standard_normal((tokens, config.top_k)).astype(np.float32)

    def share(state, x, mask, c_TK, axes):
        out = nnx.merge(graph, state)(x, token_mask_T=mask, axes=axes)
        return jnp.sum(out.scores_TK * c_TK) + out.losses.total, out

    def grads(state, x, mask, c_TK, axes):
        fn = jax.value_and_grad(partial(share, axes=axes), argnums=(0, 1), has_aux=True)
        (value, out), (grad, grad_x) = fn(state, x, mask, c_TK)
        summed = (value, grad, out.losses, out.counts_E, out.entropy_sum, out.num_tokens)
        if axes:
            summed = lax.psum(summed, axes)
        return *summed, grad_x, out.experts_TK, out.scores_TK

    mesh = make_mesh(MeshShape(2, 4, 1))
    split = P(TOKEN_AXES)
    many = jax.jit(
        jax.shard_map(
            partial(grads, axes=TOKEN_AXES),
            mesh=mesh,
            in_specs=(P(), split, split, split),
            out_specs=(P(),) * 6 + (split,) * 3,
            check_vma=False,
        )
    )(state, x, mask, c_TK)
    one = jax.jit(partial(grads, axes=()))(state, x, mask, c_TK)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("experts", "top_k", "per_device"), [(8, 3, 5), (7, 7, 1), (13, 2, 3)])
def test_forced_balance_is_even_over_the_mesh(experts, top_k, per_device, rng):
    config = RouterConfig(experts, top_k, renormalize=False, forced_balance=True)
    mesh = make_mesh(MeshShape(2, 4, 1))
    logits = rng.standard_normal((8 * per_device, experts)).astype(np.float32)

    def fn(logits):
        def total(x):
            out = route(x, config)
            return out.scores_TK.sum(), out

        grad, out = jax.grad(total, has_aux=True)(logits)
        return lax.psum(out.counts_E, TOKEN_AXES), out.experts_TK, out.scores_TK, grad

    split = P(TOKEN_AXES)
    counts, ids, scores, grad = jax.jit(
        jax.shard_map(
            fn, mesh=mesh, in_specs=split, out_specs=(P(), split, split, split), check_vma=False
        )
    )(logits)
    assert np.ptp(counts) <= 1 and counts.sum() == 8 * per_device * top_k
    assert all(len(set(row)) == top_k for row in np.asarray(ids))
    for t, row in enumerate(logits.astype(np.float64)):
        np.testing.assert_allclose(scores[t], _softmax(row)[ids[t]], rtol=1e-5)
    assert top_k == experts or np.all(np.any(grad != 0, axis=1))
    plain = dataclasses.replace(config, forced_balance=False)
    assert top_k == experts or np.any(route_jit(logits, plain).experts_TK != ids)


# ---- balancing and metrics --------------------------------------------------------------------


def test_update_bias():
    counts = np.array([[4, 0, 2, 2], [1, 1, 1, 1]], np.int32)
    got = jax.jit(update_bias)(np.ones((2, 4), np.float32), counts, 0.25)
    np.testing.assert_allclose(got, [[0.75, 1.25, 1, 1], [1, 1, 1, 1]])
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_bias_balances_a_skewed_router(score_function, rng):
    config = RouterConfig(
        E, 2, score_function, selection_bias=True, bias_update_rate=0.002, load_balance_coef=0.0
    )
    skew = np.linspace(0, 3, E)
    # Fresh tokens each step, so that the bias cannot learn them by heart.
    logits = (skew + rng.standard_normal((300, 1024, E))).astype(np.float32)

    @jax.jit
    def balance(logits):
        def step(bias, logits):
            counts = route(logits, config, bias_E=bias, axes=()).counts_E
            return update_bias(bias, counts, config.bias_update_rate), counts

        return lax.scan(step, jnp.zeros(E, jnp.float32), logits)[1]

    counts = np.asarray(balance(logits))
    over_mean = counts.max(-1) / counts.mean(-1)
    assert over_mean[0] > 2 and counts[0].min() < 0.3 * counts[0].mean()
    assert np.mean(over_mean[-20:]) < 1.2
    late = counts[-20:].sum(0)
    assert late.max() / late.mean() < 1.1


@pytest.mark.parametrize("xp", [np, jnp])
def test_metrics(xp):
    counts = xp.asarray([[6, 0, 0, 2], [2, 2, 2, 2], [0, 0, 0, 0]], dtype=xp.int32)
    entropy = xp.asarray([2.0, 4.0, 0.0], dtype=xp.float32)
    tokens = xp.asarray([4, 4, 0], dtype=xp.int32)
    got = router_metrics(counts, entropy, tokens)
    np.testing.assert_array_equal(got["tokens_per_expert"], counts)
    np.testing.assert_allclose(got["entropy"], [0.5, 1, 0])
    np.testing.assert_allclose(got["max_over_mean"], [3, 1, 0])
    assert got["entropy"].dtype == got["max_over_mean"].dtype == np.float32
    one = router_metrics(np.array([3, 1]), np.float32(1.0), np.int32(2))
    assert one["max_over_mean"] == 1.5 and one["entropy"] == 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_does_not_reach_the_weight_gradient(rng, dtype):
    """NaN in a masked token times a cotangent of 0 would be NaN."""
    router = Router(16, RouterConfig(8, 2), rngs=nnx.Rngs(int(rng.integers(2**31))))
    x = jnp.asarray(rng.standard_normal((6, 16)), dtype)
    mask = jnp.arange(6, dtype=jnp.int32) > 0

    @nnx.jit
    def gradient(router, x):
        def loss(router):
            scores_TK = router(x, token_mask_T=mask, axes=()).scores_TK
            return jnp.sum(scores_TK**2)

        return nnx.grad(loss)(router).w_DE[...]

    clean, dirty = gradient(router, x.at[0].set(0)), gradient(router, x.at[0].set(jnp.nan))
    assert np.isfinite(dirty).all() and np.abs(dirty).max() > 0
    np.testing.assert_array_equal(clean, dirty)
