"""The choice of experts. No gradient passes through it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float32, Int32

from moejax.config import RouterConfig
from pallas_kernels.route.api import top_k
from sharding.collectives import axis_index, axis_size

__all__ = [
    "choose_experts",
    "deal_experts",
    "keep_best_groups",
    "only_order_counts",
    "selection_scores",
]


def selection_scores(
    logits_TE: Float32[Array, "T E"],
    config: RouterConfig,
    bias_E: Float32[Array, " E"] | None = None,
    *,
    sums: bool = False,
) -> Float32[Array, "T E"]:
    """What the choice compares: probabilities, sigmoids or logits, plus the selection bias.

    Where nothing but the order counts, probabilities are left as logits: the order is theirs, and
    what rounding makes equal stays apart.

    Args:
        logits_TE: float32 [T, E].
        config: `score_function` and the fields on groups are read.
        bias_E: float32 [E], or None for no bias.
        sums: scores are also added up.

    Returns:
        float32 [T, E], without gradient.
    """
    only_order = only_order_counts(config, bias_E, sums=sums)
    match config.score_function:
        case "softmax" if not only_order:
            select_TE = jax.nn.softmax(logits_TE, axis=-1)
        case "sigmoid" if not only_order:
            select_TE = jax.nn.sigmoid(logits_TE)
        case _:  # topk_softmax compares before it normalises
            select_TE = logits_TE
    if bias_E is not None:
        select_TE = select_TE + bias_E
    return lax.stop_gradient(select_TE)


def only_order_counts(
    config: RouterConfig, bias_E: Float32[Array, " E"] | None, *, sums: bool = False
) -> bool:
    """Whether selection scores are compared and nothing else; arguments as of these."""
    grouped = config.top_groups < config.num_groups
    return bias_E is None and not sums and not (grouped and config.group_score != "max")


def choose_experts(
    select_TE: Float32[Array, "T E"],
    values_TE: Float32[Array, "T E"],
    config: RouterConfig,
    *,
    softmax: bool,
) -> tuple[Int32[Array, "T K"], Float32[Array, "T K"]]:
    """The K best experts of each token, within its best groups.

    Among equal scores the lower id wins, for groups as for experts.

    Args:
        select_TE: float32 [T, E], as `selection_scores` returns them.
        values_TE: float32 [T, E].
        config: `top_k`, `num_groups`, `top_groups` and `group_score` are read.
        softmax: normalises the values of a token's K chosen by a softmax.

    Returns:
        int32 [T, K], distinct within a token, by descending score; their values [T, K] or the
        softmax of these, through which gradients pass.

    Source: groups by `max`, arXiv 2405.04434 §2.1.3; by the sum of the 2 best, arXiv 2412.19437
    §2.1.2.
    """
    select_TE = keep_best_groups(select_TE, config)
    return top_k(select_TE, config.top_k, values_TE=values_TE, softmax=softmax)


def keep_best_groups(
    select_TE: Float32[Array, "T E"], config: RouterConfig
) -> Float32[Array, "T E"]:
    """The scores, −inf for experts outside of their token's best groups."""
    if config.top_groups == config.num_groups:
        return select_TE
    # A biased score may be negative, so experts out of reach get -inf, not 0.
    return jnp.where(_within_best_groups(select_TE, config), select_TE, -jnp.inf)


def _within_best_groups(select_TE: jax.Array, config: RouterConfig) -> jax.Array:
    """Whether an expert lies in one of its token's best groups; bool [T, E]."""
    num_tokens, num_experts = select_TE.shape
    group_size = num_experts // config.num_groups
    grouped = select_TE.reshape(num_tokens, config.num_groups, group_size)
    if config.group_score == "max":
        group_scores = jnp.max(grouped, axis=-1)
    else:  # a group of one expert has no second best
        group_scores = jnp.sum(lax.top_k(grouped, min(2, group_size))[0], axis=-1)
    best = lax.top_k(group_scores, config.top_groups)[1]
    keep = jnp.any(best[:, :, None] == jnp.arange(config.num_groups), axis=1)
    return jnp.repeat(keep, group_size, axis=1)


def deal_experts(num_tokens: int, config: RouterConfig, axes: Sequence[str]) -> Int32[Array, "T K"]:
    """Forced balance: deals the experts like cards, K to a token, by global token position.

    The deck is shuffled once, the same way everywhere: were it in order, the experts of a token
    would be neighbours on one device and the exchange would look cheaper than it is.

    Args:
        num_tokens: tokens T of this device, equal on all devices.
        config: `num_experts` and `top_k` are read.
        axes: mesh axes that tokens are split over, () outside of a shard_map.

    Returns:
        int32 [T, K], distinct within a token. Over the union of the devices' tokens no expert is
        dealt more than once more than another, masked tokens included.
    """
    num_experts, top_k = config.num_experts, config.top_k
    device = jnp.int32(0)
    for axis in axes:
        device = device * axis_size(axis) + axis_index(axis)
    # Reduced before each product: positions times K could leave int32 on a large mesh.
    start = (device % num_experts) * (num_tokens % num_experts)
    position_T = (start + jnp.arange(num_tokens, dtype=jnp.int32)) % num_experts
    card_TK = (position_T[:, None] * top_k + jnp.arange(top_k, dtype=jnp.int32)) % num_experts
    deck_E = np.random.default_rng(0).permutation(num_experts).astype(np.int32)
    return jnp.asarray(deck_E)[card_TK]
