"""The router's oracle, in float64 and token by token, and the variants it is compared for."""

from functools import partial

import jax
import numpy as np

from moejax.config import RouterConfig
from moejax.routing import route

T, E, D = 5, 8, 6

route_jit = jax.jit(partial(route, axes=()), static_argnames=("config",))


# ---- the oracle: float64, one token at a time -------------------------------------------------


def softmax(v):
    e = np.exp(v - np.max(v))
    return e / e.sum()


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def oracle_choice(logits, config, bias):
    """Ids by descending score, and the smallest gap between scores the choice compared."""
    experts, gap = [], np.inf
    for row in logits:
        score = {"softmax": softmax, "sigmoid": sigmoid, "topk_softmax": np.array}
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
            every, prob = sigmoid(row), sigmoid(row) / sigmoid(row).sum()
            scores[t] = every[experts[t]]
        else:
            prob = softmax(row)
            scores[t] = prob[experts[t]]
        if config.score_function == "topk_softmax":
            scores[t] = softmax(chosen)
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


BOTH = {"load_balance_coef": 0.3, "z_loss_coef": 0.2}

VARIANTS = {
    "softmax": RouterConfig(E, 2, renormalize=True, **BOTH),
    "softmax_raw": RouterConfig(E, 3, renormalize=False, scaling_factor=2.5, **BOTH),
    "softmax_bias": RouterConfig(E, 3, renormalize=False, selection_bias=True, **BOTH),
    "topk_softmax": RouterConfig(E, 2, "topk_softmax", **BOTH),
    "topk_softmax_bias": RouterConfig(E, 2, "topk_softmax", False, 1.5, True, **BOTH),
    "sigmoid": RouterConfig(E, 2, "sigmoid", True, 2.5, selection_bias=True, **BOTH),
    "sigmoid_raw": RouterConfig(E, 2, "sigmoid", False, **BOTH),
    "k_1": RouterConfig(E, 1, renormalize=False, **BOTH),
    "k_all": RouterConfig(E, E, **BOTH),
    "one_expert": RouterConfig(1, 1, renormalize=False, **BOTH),
    "groups_max": RouterConfig(E, 3, num_groups=4, top_groups=2, **BOTH),
    "groups_top2": RouterConfig(E, 3, "sigmoid", True, 2.5, True, 0.0, 4, 2, "top2_sum", **BOTH),
    "groups_top2_of_one": RouterConfig(
        E, 2, num_groups=E, top_groups=3, group_score="top2_sum", **BOTH
    ),
    "no_losses": RouterConfig(E, 2, load_balance_coef=0.0),
}
