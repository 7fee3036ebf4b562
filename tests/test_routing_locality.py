"""Routing that knows where experts are: choice, weights, gradients, what stays what it was."""

from functools import cache, partial
from itertools import combinations

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from locality_support import (
    HOSTS,
    E,
    G,
    R,
    S,
    T,
    devices_with,
    distances_from,
    oracle,
    oracle_weights,
    plain_choice,
    plain_probs,
    random_slots,
)

from moejax.config import ExpertsConfig, LocalityConfig, MoEConfig, RouterConfig
from moejax.errors import UserError
from moejax.layer import MoELayer
from moejax.placement.arrays import from_slots, slots_at_home
from moejax.placement.choice import place
from moejax.routing import route
from moejax.routing.locality import distances, reach_of
from sharding.mesh import EXPERT, TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

BOTH = {"load_balance_coef": 0.3, "z_loss_coef": 0.2}
FAR = {"device_penalty": 0.3, "host_penalty": 0.6}

# name: router, locality, hosts
VARIANTS = {
    "softmax": (RouterConfig(E, 3, **BOTH), LocalityConfig(0.4), None),
    "softmax_raw_scaled": (
        RouterConfig(E, 3, renormalize=False, scaling_factor=2.5),
        LocalityConfig(**FAR, weights="scaled"),
        HOSTS,
    ),
    "softmax_bias_groups": (
        RouterConfig(E, 2, renormalize=False, selection_bias=True, num_groups=4, top_groups=2),
        LocalityConfig(**FAR),
        HOSTS,
    ),
    "topk_softmax_scaled": (
        RouterConfig(E, 2, "topk_softmax"),
        LocalityConfig(**FAR, weights="scaled"),
        HOSTS,
    ),
    "topk_softmax_bias_devices": (
        RouterConfig(E, 3, "topk_softmax", selection_bias=True),
        LocalityConfig(0.3, max_devices=2),
        None,
    ),
    "sigmoid_bias_groups_scaled": (
        RouterConfig(E, 3, "sigmoid", True, 2.5, True, 0.0, 4, 2, "top2_sum"),
        LocalityConfig(**FAR, weights="scaled"),
        HOSTS,
    ),
    "sigmoid_raw_scaled": (
        RouterConfig(E, 2, "sigmoid", False),
        LocalityConfig(0.5, weights="scaled"),
        None,
    ),
    "local_device": (
        RouterConfig(E, 2, "sigmoid"),
        LocalityConfig(local_threshold=0.5),
        None,
    ),
    "local_device_rarely_enough": (
        RouterConfig(E, 4),
        LocalityConfig(local_threshold=0.02, max_hosts=1, max_devices=2),
        HOSTS,
    ),
    "local_host_penalties_devices": (
        RouterConfig(E, 3),
        LocalityConfig(0.2, local_threshold=0.05, local="host", max_devices=2),
        HOSTS,
    ),
    "one_device": (RouterConfig(E, 3), LocalityConfig(max_devices=1), None),
    "one_host_two_devices": (
        RouterConfig(E, 4, "sigmoid", selection_bias=True),
        LocalityConfig(0.1, max_hosts=1, max_devices=2),
        HOSTS,
    ),
    "devices_groups_bias": (
        RouterConfig(E, 4, selection_bias=True, num_groups=4, top_groups=3),
        LocalityConfig(max_devices=2),
        None,
    ),
}


@cache
def program(router, locality, hosts, home=False):
    """Routes and places on all devices; and the gradient of the weights by the logits."""

    def one(logits_TE, ct_TK, mask_T, bias_E, placement=None):
        reach = reach_of(locality, router.top_k, placement, E, G, hosts)
        bias_E = bias_E if router.selection_bias else None

        def total(logits_TE):
            found = route(
                logits_TE, router, bias_E=bias_E, token_mask_T=mask_T, axes=(), reach=reach
            )
            return jnp.sum(found.scores_TK * ct_TK), found

        grad, found = jax.grad(total, has_aux=True)(logits_TE)
        slots_TK = found.experts_TK
        if placement is not None:
            slots_TK = place(found.experts_TK, placement, S, hosts, found.devices_TG, few=0)
        return grad, found, slots_TK, distances(placement, E, G, hosts)

    axes = (0, 0, 0, None) if home else (0, 0, 0, None, None)
    return jax.jit(jax.vmap(one, in_axes=axes, axis_name=EXPERT))


def draw(rng, config, locality, hosts, slots):
    """Logits whose choice does not hang on rounding, the bias, and what is chosen."""
    bias = np.zeros(E)
    if config.selection_bias:
        bias = rng.normal(size=E).astype(np.float32) * (
            1.0 if config.score_function == "topk_softmax" else 0.2
        )
    logits = np.zeros((G, T, E), np.float32)
    wanted = {}
    for g in range(G):
        for t in range(T):
            gap = 0.0
            while gap < 1e-5:
                logits[g, t] = 1.5 * rng.standard_normal(E)
                row = logits[g, t].astype(np.float64)
                *wanted[g, t], gap = oracle(row, config, locality, bias, slots, g, hosts)
    return logits, bias.astype(np.float32), wanted


def check(rng, name, run, slots, placement):
    """One draw of logits against the oracle; returns the tokens whose choice was changed."""
    config, locality, hosts = VARIANTS[name]
    logits, bias, wanted = draw(rng, config, locality, hosts, slots)
    mask = rng.random((G, T)) > 0.15
    ct = rng.standard_normal((G, T, config.top_k)).astype(np.float32)
    args = (logits, ct, mask, bias) if placement is None else (logits, ct, mask, bias, placement)
    grad, found, slots_GTK, distance = map(partial(jax.tree.map, np.asarray), run(*args))
    held, changed = devices_with(slots), 0
    kept = np.zeros(G)
    for g in range(G):
        assert np.array_equal(distance[g], distances_from(g, slots, hosts))
        for t in range(T):
            experts, scores = found.experts_TK[g, t], found.scores_TK[g, t]
            if not mask[g, t]:
                assert (experts == -1).all() and not scores.any() and not grad[g, t].any()
                assert (slots_GTK[g, t] == -1).all()
                continue
            chosen, open_devices = wanted[g, t]
            assert experts.tolist() == chosen, (g, t)
            assert len(set(chosen)) == config.top_k
            row = logits[g, t].astype(np.float64)
            weights = partial(
                oracle_weights,
                chosen=chosen,
                config=config,
                locality=locality,
                distance=distance[g],
            )
            np.testing.assert_allclose(scores, weights(row), rtol=2e-6)
            slope = np.array(
                [ct[g, t] @ (weights(row + d) - weights(row - d)) / 2e-5 for d in np.eye(E) * 1e-5]
            )
            size = np.abs(ct[g, t]).sum() * config.scaling_factor
            np.testing.assert_allclose(grad[g, t], slope, atol=2e-6 * size)
            if placement is not None:
                assert np.array_equal(slots[slots_GTK[g, t]], experts)
                used = set((slots_GTK[g, t] // S).tolist())
                assert used <= open_devices
                limit = locality.max_devices or G
                assert len(open_devices) <= limit or open_devices == set(range(G))
            plain = plain_choice(row, config, bias.astype(np.float64))
            changed += set(plain) != set(chosen)
            probs = plain_probs(row, config)
            kept[g] += min(1, probs[chosen].sum() / probs[plain].sum())
            if locality.max_devices and open_devices == set(range(G)):
                unions = (
                    {e for e in range(E) if held[e] & set(few)}
                    for few in combinations(range(G), locality.max_devices)
                )
                # Given up only where copies or groups leave too little: never for lack of search.
                assert config.top_groups < config.num_groups or not all(
                    len(union) >= config.top_k for union in unions
                )
    np.testing.assert_allclose(found.kept, kept, rtol=1e-5)
    assert np.array_equal(found.num_tokens, mask.sum(1))
    return changed


SLOW = ("softmax_raw_scaled", "local_device", "softmax", "sigmoid_raw_scaled")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in VARIANTS]
)
def test_against_the_oracle(rng, name):
    """Random placements with copies and empty slots, by one compiled function."""
    run = program(*VARIANTS[name])
    changed = 0
    for extra in (0, 4):
        slots = random_slots(rng, extra)
        changed += check(rng, name, run, slots, from_slots(slots, E, max_replicas=R))
    assert changed, "nothing was tried"
    assert run._cache_size() == 1


@pytest.mark.parametrize("name", ["softmax", "one_host_two_devices"])
def test_experts_at_home(rng, name):
    slots = slots_at_home(E, G)
    padded = np.pad(slots.reshape(G, -1), ((0, 0), (0, S - E // G)), constant_values=-1)
    assert check(rng, name, program(*VARIANTS[name], home=True), padded.reshape(-1), None)


def test_nothing_underflows_where_only_order_counts():
    """Logits far apart: probabilities would be 0 in float32, and the penalty would not matter."""
    logits = np.full((G, T, E), -300, np.float32)
    logits[..., 0], logits[..., 1], logits[..., E - 1] = 0, -200, -199.5
    placement = from_slots(slots_at_home(E, G, S), E, max_replicas=R)
    args = np.zeros((G, T, 2), np.float32), np.ones((G, T), bool), np.zeros(E, np.float32)
    for function in ("softmax", "sigmoid"):
        config = RouterConfig(E, 2, function)
        run = program(config, LocalityConfig(0.5), None)
        found = run(logits, *args, placement)[1]
        # Half a nat is less than log 2: each device prefers its own.
        assert (np.asarray(found.experts_TK)[0] == [0, 1]).all()
        assert (np.asarray(found.experts_TK)[G - 1] == [0, E - 1]).all()


def test_equal_scores_are_used_near():
    """Copies of the best expert everywhere: the own device is taken, nothing is sent."""
    slots = np.concatenate([[0, 1 + 3 * g, 2 + 3 * g, 3 + 3 * g] for g in range(G)])
    slots[slots >= E] = -1
    config, locality = RouterConfig(E, 2), LocalityConfig(max_devices=1)
    run = program(config, locality, None)
    logits = np.zeros((G, T, E), np.float32)
    logits[..., 0] = 3
    args = np.zeros((G, T, 2), np.float32), np.ones((G, T), bool), np.zeros(E, np.float32)
    _, found, slots_GTK, _ = run(logits, *args, from_slots(slots, E, max_replicas=G))
    for g in range(G):
        assert (np.asarray(slots_GTK)[g] // S == g).all()
        assert np.array_equal(found.devices_TG[g], np.arange(G) == np.full((T, 1), g))


NEAR = LocalityConfig(0.5)


def test_off_is_the_program_without():
    """Of a layer on two devices; what is asked for shows in it."""
    texts = []
    for locality in LocalityConfig(), LocalityConfig(weights="scaled", local="host"), NEAR:
        config = MoEConfig(RouterConfig(4, 2), ExpertsConfig(16), locality=locality)
        layer = MoELayer(8, config, expert_devices=2, rngs=nnx.Rngs(0))
        graph, state = nnx.split(layer)
        run = jax.shard_map(
            lambda state, x, graph=graph: nnx.merge(graph, state)(x)[0],
            mesh=make_mesh(MeshShape(expert=2)),
            in_specs=(specs_of(state), P(TOKEN_AXES)),
            out_specs=P(TOKEN_AXES),
            check_vma=False,
        )
        texts.append(str(jax.make_jaxpr(run)(state, np.zeros((6, 8), np.float32))))
    assert texts[0] == texts[1] != texts[2]
    assert not LocalityConfig(weights="scaled", local="host").active
    for active in ({"device_penalty": 0.1}, {"host_penalty": 0.1}, {"local_threshold": 0.0},
                   {"max_devices": 1}, {"max_hosts": 2}):  # fmt: skip
        assert LocalityConfig(**active).active


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"device_penalty": 1.0}, "device_penalty=1.0: must be at least 0 and less than 1"),
        ({"device_penalty": -0.1}, "device_penalty=-0.1"),
        ({"host_penalty": np.nan}, "host_penalty=nan"),
        ({"device_penalty": 0.5, "host_penalty": 0.4}, "host_penalty=0.4: must be at least"),
        ({"local_threshold": 1.5}, "local_threshold=1.5: a probability"),
        ({"max_devices": 0}, "max_devices=0: a token needs at least 1"),
        ({"max_hosts": 0}, "max_hosts=0"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LocalityConfig(**fields)


def test_refused_together():
    with pytest.raises(UserError, match=r"forced_balance=True with locality"):
        MoEConfig(RouterConfig(forced_balance=True), locality=LocalityConfig(0.1))
    MoEConfig(RouterConfig(forced_balance=True), locality=LocalityConfig(weights="scaled"))


@pytest.mark.parametrize(
    "limit, name", [({"max_devices": 1}, "max_devices=1"), ({"max_hosts": 1}, "max_hosts=1")]
)
def test_too_few_slots_within_the_limit(limit, name):
    router, locality = RouterConfig(E, 7), LocalityConfig(**limit)
    with pytest.raises(UserError, match=rf"{name} with top_k=7: 1 of the mesh hold at most"):
        args = np.zeros((G, T, E), np.float32), np.zeros((G, T, 7), np.float32)
        program(router, locality, HOSTS, home=True)(
            *args, np.ones((G, T), bool), np.zeros(E, np.float32)
        )
