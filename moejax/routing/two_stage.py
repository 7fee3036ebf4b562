"""Choices that stay near: local experts where they are good enough, few devices, few hosts.

Every step takes selection scores, −inf for experts that are out of reach, and the devices that a
token may use, and gives both back with less in them. At least K experts of a token stay in reach:
a step that would leave fewer leaves the token as it is.

Shape letters: T tokens of this device, E experts, K experts of a token, G devices along `expert`,
S slots of a device, U units (devices or hosts), W slots of one.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from moejax.config import RouterConfig
from moejax.routing.locality import Reach
from pallas_kernels.route.api import top_k

__all__ = ["local_tokens", "stay_near", "within_devices"]


def stay_near(
    select_TE: Float32[Array, "T E"],
    logits_TE: Float32[Array, "T E"],
    config: RouterConfig,
    reach: Reach,
) -> tuple[Float32[Array, "T E"], Bool[Array, "T G"] | None]:
    """Local experts only where these suffice, then the best hosts, then the best devices.

    Args:
        select_TE: float32 [T, E], −inf for experts out of reach, of which K or more are not.
        logits_TE: float32 [T, E], of the router.
        config: `score_function` and `top_k` are read.
        reach: where experts are.

    Returns:
        the scores, −inf for further ones; bool [T, G], the devices whose copies may be used, None
        for all.
    """
    locality, k = reach.config, config.top_k
    devices = len(reach.host_G)
    select_TE = lax.stop_gradient(select_TE)
    open_TG = None
    if locality.local_threshold is not None:
        farthest = 0 if locality.local == "device" else 1
        logits_TE = lax.stop_gradient(logits_TE)
        sigmoid = config.score_function == "sigmoid"
        probs_TE = jax.nn.sigmoid(logits_TE) if sigmoid else jax.nn.softmax(logits_TE, axis=-1)
        near_TE = (reach.distance_E <= farthest) & (select_TE > -jnp.inf)
        local_T = local_tokens(probs_TE, near_TE, k, locality.local_threshold)
        select_TE = jnp.where(near_TE | ~local_T[:, None], select_TE, -jnp.inf)
        open_TG = (reach.distance_G <= farthest) | ~local_T[:, None]
    slots_GS = reach.slot_expert_P.reshape(devices, -1)
    limit, hosts = locality.max_hosts, 1 + max(reach.host_G)
    if limit is not None and limit < hosts:
        host_G = jnp.asarray(reach.host_G, jnp.int32)
        is_on_HG = np.arange(hosts)[:, None] == np.asarray(reach.host_G)
        open_TH = None
        if open_TG is not None:
            open_TH = (open_TG[:, None, :] & is_on_HG).any(-1)
        distance_H = jnp.min(jnp.where(is_on_HG, reach.distance_G, 2), axis=1)
        select_TE, open_TH = within_devices(
            select_TE, _of_hosts(slots_GS, is_on_HG), distance_H, limit, config, open_TH
        )
        near_TG = open_TH[:, host_G]
        open_TG = near_TG if open_TG is None else open_TG & near_TG
    limit = locality.max_devices
    if limit is not None and limit < devices:
        select_TE, open_TG = within_devices(
            select_TE, slots_GS, reach.distance_G, limit, config, open_TG
        )
    return select_TE, open_TG


def _of_hosts(slots_GS: jax.Array | np.ndarray, is_on_HG: np.ndarray) -> jax.Array:
    """The slots of each host, filled up with −1; int32 [H, W]."""
    slots = slots_GS.shape[1]
    most = int(is_on_HG.sum(1).max())
    # Sorted, a host's own devices come first.
    device_HN = np.argsort(~is_on_HG, axis=1, kind="stable")[:, :most]
    real_HN = np.take_along_axis(is_on_HG, device_HN, axis=1)
    content = jnp.where(real_HN[:, :, None], jnp.asarray(slots_GS)[device_HN], -1)
    return content.reshape(len(is_on_HG), most * slots)


def local_tokens(
    probs_TE: Float32[Array, "T E"], near_TE: Bool[Array, "T E"], k: int, threshold: float
) -> Bool[Array, " T"]:
    """Tokens whose k-th best near expert has at least this probability.

    Args:
        probs_TE: float32 [T, E], without penalties and bias: the softmax over all experts, or
            sigmoids.
        near_TE: the experts that count. A token with fewer than k of them is none.
        k: of a token.
        threshold: at least 0.
    """
    _, best_Tk = top_k(jnp.where(near_TE, probs_TE, -1.0), k)
    return best_Tk[:, -1] >= threshold


def within_devices(
    select_TE: Float32[Array, "T E"],
    slot_expert_UW: Int32[Array, "U W"] | np.ndarray,
    distance_U: Int32[Array, " U"],
    limit: int,
    config: RouterConfig,
    open_TU: Bool[Array, "T U"] | None = None,
) -> tuple[Float32[Array, "T E"], Bool[Array, "T U"]]:
    """The experts on the best `limit` devices (or hosts) of each token.

    A device's score is the sum of its experts' best ⌈K / limit⌉ selection scores (arXiv 2412.19437
    §2.1.2); of logarithms, of their softmax. It is taken of the experts that devices taken before
    do not hold: where experts have copies, these count once; where they have none, it makes no
    difference. A device with fewer experts than that is filled up with the token's lowest score, so
    that adding a number to all scores changes nothing. Of equals the nearer, then the lower one.

    Devices are taken one by one, and only those with which K experts can still be reached, if one
    supposes that the others share no copies. Where they do, too few experts may be left in the
    end: such a token keeps all that it had, since it cannot do with fewer than K experts.

    Args:
        select_TE: float32 [T, E], −inf for experts out of reach.
        slot_expert_UW: int32 [U, W], the expert in each slot, −1 for none.
        distance_U: int32 [U].
        limit: less than U.
        config: `score_function` and `top_k` are read.
        open_TU: which may be taken; None: all.

    Returns:
        the scores, −inf for experts elsewhere; bool [T, U], the devices taken, or for a token that
        keeps all it had, those it had.
    """
    (tokens, experts), (units, slots) = select_TE.shape, slot_expert_UW.shape
    k = config.top_k
    content_UW = _once(jnp.asarray(slot_expert_UW))
    expert_UW = jnp.maximum(content_UW, 0)
    holds_UE = (content_UW[..., None] == jnp.arange(experts, dtype=jnp.int32)).any(1)
    reached_TE = select_TE > -jnp.inf
    score_TE = select_TE
    if config.score_function == "topk_softmax":
        score_TE = jax.nn.softmax(select_TE, axis=-1)
    lowest_T = jnp.min(jnp.where(reached_TE, score_TE, jnp.inf), axis=-1)
    may_TU = jnp.ones((tokens, units), bool) if open_TU is None else open_TU
    score_TUW = score_TE[:, expert_UW]
    best = min(-(-k // limit), slots)
    turn_U = distance_U * units + jnp.arange(units, dtype=jnp.int32)

    covered_TE = jnp.zeros((tokens, experts), bool)
    taken_TU = jnp.zeros((tokens, units), bool)
    count_T = jnp.zeros(tokens, jnp.int32)
    for left in range(limit, 0, -1):
        new_TE = reached_TE & ~covered_TE
        new_TUW = new_TE[:, expert_UW] & (content_UW >= 0) & (may_TU & ~taken_TU)[..., None]
        fresh_TU = jnp.sum(new_TUW, axis=-1, dtype=jnp.int32)
        filled_TUW = jnp.where(new_TUW, score_TUW, lowest_T[:, None, None])
        sum_TU = jnp.sum(lax.top_k(filled_TUW, best)[0], axis=-1)
        enough_TU = count_T[:, None] + _most_with(fresh_TU, left) >= k
        can_TU = fresh_TU > 0
        can_TU = can_TU & (enough_TU | ~(can_TU & enough_TU).any(-1, keepdims=True))
        # In memory: added up again in another fusion, the largest may equal none.
        sum_TU = lax.optimization_barrier(jnp.where(can_TU, sum_TU, -jnp.inf))
        is_best_TU = can_TU & (sum_TU == jnp.max(sum_TU, axis=-1, keepdims=True))
        last = jnp.int32(3 * units)
        pick_T = jnp.argmin(jnp.where(is_best_TU, turn_U, last), axis=-1).astype(jnp.int32)
        any_T = is_best_TU.any(-1)
        is_pick_TU = (pick_T[:, None] == jnp.arange(units, dtype=jnp.int32)) & any_T[:, None]
        taken_TU = taken_TU | is_pick_TU
        covered_TE = covered_TE | (holds_UE[pick_T] & reached_TE & any_T[:, None])
        count_T = count_T + jnp.sum(jnp.where(is_pick_TU, fresh_TU, 0), axis=-1, dtype=jnp.int32)
    short_T1 = (count_T < k)[:, None]
    taken_TU = jnp.where(short_T1, may_TU, taken_TU)
    return jnp.where(covered_TE | short_T1, select_TE, -jnp.inf), taken_TU


def _once(slot_expert_UW: jax.Array) -> jax.Array:
    """An expert twice in one unit counts once: −1 in its later slots."""
    slots = slot_expert_UW.shape[1]
    before_WW = np.tril(np.ones((slots, slots), bool), -1)
    same_UWW = slot_expert_UW[:, :, None] == slot_expert_UW[:, None, :]
    return jnp.where((same_UWW & before_WW).any(-1), -1, slot_expert_UW)


def _most_with(fresh_TU: jax.Array, left: int) -> jax.Array:
    """For each unit, what it and the largest left − 1 others have together; int32 [T, U]."""
    top_TL = lax.top_k(fresh_TU, left)[0]
    all_T1 = jnp.sum(top_TL, axis=-1, keepdims=True, dtype=jnp.int32)
    least_T1 = top_TL[:, -1:]
    # A unit that is not among the largest takes the place of the least of these.
    return all_T1 - jnp.maximum(least_T1 - fresh_TU, 0)
