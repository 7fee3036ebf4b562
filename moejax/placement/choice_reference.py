"""The choice of replicas in numpy, of all devices at once: the twin of `choice.place`.

What the benchmark measures with, and what tests compare `place` with. Shape letters
as in `choice`, and N tokens of all devices.
"""

from __future__ import annotations

import numpy as np

from moejax.placement.arrays import from_slots
from moejax.placement.choice import LOAD_PERCENT, ROUNDS
from moejax.placement.topology import Topology

__all__ = ["at_random", "reference", "settle"]


def reference(
    experts_NK: np.ndarray,
    slots_P: np.ndarray,
    topology: Topology,
    source_N: np.ndarray | None = None,
    correct: bool = True,
    devices_NG: np.ndarray | None = None,
) -> np.ndarray:
    """What `choice.place` chooses on each device for its tokens, taken in order, in one batch.

    Args:
        experts_NK: int, logical experts, −1 for none.
        slots_P: int [G·S], the expert of each slot, −1 for an empty one.
        topology: the devices; speeds play no part.
        source_N: the device of each token; None: dealt in turn.
        correct: whether overloaded devices hand assignments on.
        devices_NG: bool [N, G], the devices that a token may use; None: all.

    Returns:
        int64 [N, K] physical slots, −1 for none.
    """
    tokens, devices = len(experts_NK), topology.devices
    source_N = np.arange(tokens) % devices if source_N is None else source_N
    slots_ER, count_E = _table(slots_P, experts_NK)
    valid_NK, expert_NK = experts_NK >= 0, np.maximum(experts_NK, 0).astype(np.int64)
    device_ER = slots_ER // topology.slots
    real_ER = np.arange(slots_ER.shape[1]) < count_E[:, None]
    device_NKR = np.where(real_ER, device_ER, -1)[expert_NK]
    device_NKR[~valid_NK] = -1
    movable_NK = valid_NK
    if devices_NG is not None:
        usable_NKR = np.zeros(device_NKR.shape, bool)
        for g in range(devices):
            usable_NKR |= (device_NKR == g) & devices_NG[:, g, None, None]
        device_NKR = np.where(usable_NKR, device_NKR, -1)
        movable_NK = valid_NK & (usable_NKR.sum(-1) > 1)
    pick_NK = np.zeros(expert_NK.shape, np.int64)
    if slots_ER.shape[1] > 1:
        turn_N = np.zeros(tokens, np.int64)
        for g in range(devices):
            turn_N[source_N == g] = g + np.arange(np.count_nonzero(source_N == g))
        count_NK = count_E[expert_NK]
        if devices_NG is not None:
            count_NK = np.where(valid_NK, (device_NKR >= 0).sum(-1), count_NK)
        # What may be used comes first, as turns are counted among them.
        order_NKR = (device_NKR < 0).argsort(-1, kind="stable")
        first_NKR = np.take_along_axis(device_NKR, order_NKR, -1)
        host_G = topology.host_G if topology.num_hosts > 1 else None
        pick_NK = _nearest(first_NKR, count_NK, source_N, turn_N, host_G)
        pick_NK = np.take_along_axis(order_NKR, pick_NK[..., None], -1)[..., 0]
        if correct:
            _correct(
                pick_NK, expert_NK, device_NKR, movable_NK, source_N, device_ER, real_ER, devices
            )
    return np.where(valid_NK, slots_ER[expert_NK, pick_NK], -1)


def at_random(
    experts_NK: np.ndarray,
    slots_P: np.ndarray,
    topology: Topology,
    source_N: np.ndarray | None = None,
) -> np.ndarray:
    """Any replica with equal chance, by a fixed seed; arguments as of `reference`."""
    del topology, source_N
    slots_ER, count_E = _table(slots_P, experts_NK)
    expert_NK = np.maximum(experts_NK, 0)
    pick_NK = np.random.default_rng(0).integers(count_E[expert_NK])
    return np.where(experts_NK >= 0, slots_ER[expert_NK, pick_NK], -1)


def _table(slots_P: np.ndarray, experts_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slots of each expert and their number; int64 [E, R] and [E]."""
    experts = max(int(slots_P.max(initial=0)), int(experts_NK.max(initial=0))) + 1
    placement = from_slots(slots_P, experts)
    return (
        np.asarray(placement.replica_slots_ER, np.int64),
        np.asarray(placement.replica_count_E, np.int64),
    )


def _nearest(
    device_NKR: np.ndarray,
    count_NK: np.ndarray,
    source_N: np.ndarray,
    turn_N: np.ndarray,
    host_G: np.ndarray | None,
) -> np.ndarray:
    tokens, top_k, replicas = device_NKR.shape
    rows, others = np.arange(tokens), np.arange(replicas)
    here_NKR = device_NKR == source_N[:, None, None]
    pick_NK = here_NKR.argmax(-1)
    open_NK = (count_NK > 1) & ~here_NKR.any(-1) & (device_NKR >= 0).any(-1)
    goes_NK = np.take_along_axis(device_NKR, pick_NK[..., None], -1)[..., 0]
    goes_NK[open_NK | (goes_NK < 0)] = -2
    joins_NKR = np.zeros(device_NKR.shape, np.int64)
    for k in range(top_k):
        for j in set(range(top_k)) - {k}:
            same_NRR = device_NKR[:, k, :, None] == device_NKR[:, j, None, :]
            joins_NKR[:, k] += (same_NRR & open_NK[:, j, None, None]).sum(-1)
    for k in range(top_k):
        device_NR = device_NKR[:, k]
        touched_NR = (device_NR[:, :, None] == goes_NK[:, None, :]).any(-1)
        near_NR = np.zeros(device_NR.shape, bool)
        if host_G is not None:
            host_NK = np.where(goes_NK >= 0, host_G[goes_NK], -1)
            near_NR = host_G[device_NR] == host_G[source_N][:, None]
            near_NR |= (host_G[device_NR][:, :, None] == host_NK[:, None, :]).any(-1)
        dealt_NR = -((others - turn_N[:, None]) % count_NK[:, k, None])
        keys = (dealt_NR, joins_NKR[:, k], near_NR, touched_NR, device_NR >= 0)
        # The last is compared first, as in lexsort; of equals the first replica.
        score_NR = np.zeros(device_NR.shape, np.int64)
        for key_NR in reversed(keys):
            score_NR = score_NR * 4 * (top_k * replicas + replicas) + key_NR
        best_N = score_NR.argmax(1)
        decides_N = open_NK[:, k]
        pick_NK[decides_N, k] = best_N[decides_N]
        goes_NK[decides_N, k] = device_NR[rows, best_N][decides_N]
    return pick_NK


def _correct(
    pick_NK: np.ndarray,
    expert_NK: np.ndarray,
    device_NKR: np.ndarray,
    movable_NK: np.ndarray,
    source_N: np.ndarray,
    device_ER: np.ndarray,
    real_ER: np.ndarray,
    devices: int,
) -> None:
    """Changes the picks of overloaded devices, as `choice._corrected`."""
    experts, replicas = device_ER.shape
    valid_NK = np.asarray((device_NKR >= 0).any(-1))
    group_NK = expert_NK * replicas + pick_NK
    count_GER = np.zeros((devices, experts, replicas), np.int64)
    for g in range(devices):
        mine = group_NK[source_N == g][movable_NK[source_N == g]]
        count_GER[g] = np.bincount(mine, minlength=device_ER.size).reshape(device_ER.shape)
    total_ER = count_GER.sum(0)
    at_NK = np.take_along_axis(device_NKR, pick_NK[..., None], -1)[..., 0]
    fixed_G = np.bincount(at_NK[valid_NK & ~movable_NK], minlength=devices)
    target_ER = settle(total_ER, device_ER, real_ER, devices, fixed_G)
    gives_ER, takes_ER = np.maximum(total_ER - target_ER, 0), np.maximum(target_ER - total_ER, 0)

    at_NK[~valid_NK] = -2
    alone_NKR = device_NKR != source_N[:, None, None]
    for k in range(pick_NK.shape[1]):
        for j in set(range(pick_NK.shape[1])) - {k}:
            alone_NKR[:, k] &= device_NKR[:, k] != at_NK[:, j, None]
    now_NK = np.take_along_axis(alone_NKR, pick_NK[..., None], -1)[..., 0].astype(np.int64)
    wanted_NKR = (takes_ER > 0)[expert_NK] & (device_NKR >= 0)
    then_NK = np.where(wanted_NKR, alone_NKR, 2).min(-1)
    cost_NK = np.where(wanted_NKR.any(-1), then_NK - now_NK, 2)

    upto_ER = takes_ER.cumsum(1)
    e_E1, r_R = np.arange(experts)[:, None], np.arange(replicas)
    flat = pick_NK.reshape(-1)  # a view: picks are changed in place
    for g in range(devices):
        spread_ER = g + 3 * e_E1 + 5 * r_R
        quota_ER = part(count_GER[g], gives_ER, total_ER, spread_ER % devices, devices)
        quota_ER = np.where(gives_ER > 0, np.minimum(quota_ER, count_GER[g]), 0)
        pool_E1 = quota_ER.sum(1, keepdims=True)
        up_E1 = (g + 3 * e_E1 + 2) % devices
        edge_ER = part(pool_E1, upto_ER, upto_ER[:, -1:], up_E1, devices)
        edge_ER = np.where(upto_ER == upto_ER[:, -1:], pool_E1, np.minimum(edge_ER, pool_E1))
        first_ER = quota_ER.cumsum(1) - quota_ER
        mine = np.flatnonzero((movable_NK & (source_N == g)[:, None]).reshape(-1))
        mine = mine[np.lexsort((cost_NK.reshape(-1)[mine], group_NK.reshape(-1)[mine]))]
        for group in np.flatnonzero(quota_ER):
            e, r = divmod(int(group), replicas)
            members = mine[group_NK.reshape(-1)[mine] == group][: quota_ER[e, r]]
            places = first_ER[e, r] + np.arange(len(members))
            to = np.searchsorted(edge_ER[e], places, side="right")
            usable = device_NKR.reshape(-1, replicas)[members, np.minimum(to, replicas - 1)] >= 0
            flat[members[usable]] = to[usable]


def settle(
    count_ER: np.ndarray,
    device_ER: np.ndarray,
    real_ER: np.ndarray,
    devices: int,
    fixed_G: np.ndarray | None = None,
) -> np.ndarray:
    """How many assignments each replica shall have, as `choice._settle`; int64 [E, R]."""
    count_ER = count_ER.copy()
    rows = np.arange(len(count_ER))
    fixed_G = np.zeros(devices, np.int64) if fixed_G is None else fixed_G
    mean = -(-int(count_ER.sum() + fixed_G.sum()) // devices)
    limit = mean + mean * (LOAD_PERCENT - 100) // 100

    def on_devices(x_ER: np.ndarray) -> np.ndarray:
        load_G = np.zeros(devices, np.int64)
        np.add.at(load_G, device_ER, x_ER)
        return load_G

    for _ in range(ROUNDS):
        load_G = on_devices(count_ER) + fixed_G
        over_G = np.maximum(load_G - limit, 0)
        if not over_G.any():
            break
        load_ER = load_G[device_ER]
        open_ER = np.where(real_ER, load_ER, np.iinfo(np.int64).max)
        best_E, least_E = open_ER.argmin(1), open_ER.min(1)
        gap_ER = np.where(real_ER, load_ER - least_E[:, None], 0)
        any_ER = np.where((gap_ER > 1) & (over_G[device_ER] > 0), count_ER, 0)
        good_ER = np.where(least_E[:, None] < limit, any_ER, 0)
        enough_G = on_devices(good_ER) >= over_G
        from_ER = np.where(enough_G[device_ER], good_ER, any_ER)
        out_G = on_devices(from_ER)
        push_ER = part(from_ER, np.minimum(over_G, out_G)[device_ER], out_G[device_ER])
        push_ER = np.minimum(push_ER, gap_ER // 2)
        to_E = device_ER[rows, best_E]
        in_G, top_G = np.zeros((2, devices), np.int64)
        np.add.at(in_G, to_E, push_ER.sum(1))
        np.maximum.at(top_G, to_E, np.where(push_ER > 0, load_ER, 0).max(1))
        room_G = np.maximum(np.maximum(limit - load_G, (top_G - load_G) // 2), 0)
        push_ER = part(push_ER, np.minimum(room_G, in_G)[to_E, None], in_G[to_E, None])
        count_ER -= push_ER
        count_ER[rows, best_E] += push_ER.sum(1)
    return count_ER


def part(
    count: np.ndarray, part: np.ndarray, whole: np.ndarray, up: np.ndarray | int = 0, of: int = 1
) -> np.ndarray:
    """⌊count · part / whole + up / of⌋, the ratio kept to 15 bits, as `choice._part`."""
    whole = np.maximum(whole, 1)
    shift = np.maximum(np.ceil(np.log2(whole + 1.0)).astype(np.int64) - 15, 0)
    whole = whole >> shift
    part = np.minimum(part >> shift, whole)
    return (count * part + up * whole // of) // whole
