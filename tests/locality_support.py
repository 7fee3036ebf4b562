"""Routing that knows where experts are, in float64 and token by token, and what it is tried on."""

import numpy as np
from routing_support import sigmoid, softmax

G, S, E, R, T = 4, 4, 12, 3, 6
HOSTS = (0, 0, 1, 1)


def random_slots(rng, extra):
    """Every expert once, `extra` copies on other devices, the rest of the slots empty; [G·S]."""
    while True:
        held = [[] for _ in range(G)]
        for e in [*rng.permutation(E), *rng.choice(E, extra)]:
            room = [g for g in range(G) if len(held[g]) < S and e not in held[g]]
            if room and sum(e in h for h in held) < R:
                held[rng.choice(room)].append(e)
        if set().union(*held) == set(range(E)):
            return np.concatenate([rng.permutation(h + [-1] * (S - len(h))) for h in held])


def devices_with(slots, devices=G):
    """The devices that hold each expert."""
    per_device = len(slots) // devices
    return [
        set((np.flatnonzero(slots == e) // per_device).tolist()) for e in range(slots.max() + 1)
    ]


def far(me, device, hosts):
    return 0 if device == me else 1 if hosts is None or hosts[device] == hosts[me] else 2


def distances_from(me, slots, hosts, devices=G):
    held = devices_with(slots, devices)
    return np.array([min(far(me, d, hosts) for d in where) for where in held])


def scales(locality, distance):
    near, device, host = 1.0, 1 - locality.device_penalty, 1 - locality.host_penalty
    return np.array([near, device, host if locality.host_penalty else device])[distance]


def plain_probs(row, config):
    return sigmoid(row) if config.score_function == "sigmoid" else softmax(row)


class Gaps(list):
    """Distances between what was compared; exact ties, of equal copies, are decided by rule."""

    def note(self, values):
        differences = np.diff(np.sort([v for v in values if np.isfinite(v)]))
        self += [d for d in differences if d > 0]


def best_units(units, nearness, select, limit, k, gaps):
    """Units taken one by one, and what they hold; None where they hold fewer than k."""
    taken, covered = [], set()
    lowest, c = min(select.values()), -(-k // limit)
    for left in range(limit, 0, -1):
        new = {u: (held & set(select)) - covered for u, held in units.items() if u not in taken}
        new = {u: held for u, held in new.items() if held}

        def reachable(u, new=new, left=left, covered=frozenset(covered)):
            others = sorted((len(h) for v, h in new.items() if v != u), reverse=True)
            return len(covered) + len(new[u]) + sum(others[: left - 1])

        if any(reachable(u) >= k for u in new):
            new = {u: held for u, held in new.items() if reachable(u) >= k}
        if not new:
            break
        score = {
            u: sum(sorted([select[e] for e in held] + [lowest] * c, reverse=True)[:c])
            for u, held in new.items()
        }
        gaps.note(score.values())
        best = max(score.values())
        taken.append(min((u for u in new if score[u] == best), key=lambda u: (nearness[u], u)))
        covered |= new[taken[-1]]
    return (taken, covered) if len(covered) >= k else None


def oracle(row, config, locality, bias, slots, me, hosts, devices=G):
    """A token's experts, best first, the devices open to it, and the smallest gap."""
    gaps, k, slots = Gaps(), config.top_k, np.asarray(slots)
    distance = distances_from(me, slots, hosts, devices)
    scale = scales(locality, distance)
    plain = plain_probs(row, config)
    logarithms = config.score_function == "topk_softmax"
    select = (row + np.log(scale) if logarithms else plain * scale) + bias
    gaps.note(select)
    allowed, open_devices = set(range(len(row))), set(range(devices))
    if config.top_groups < config.num_groups:
        size = len(row) // config.num_groups
        groups = [sorted(part, reverse=True) for part in select.reshape(-1, size)]
        worth = [g[0] if config.group_score == "max" else sum(g[:2]) for g in groups]
        gaps.note(worth)
        best = sorted(range(config.num_groups), key=lambda g: (-worth[g], g))[: config.top_groups]
        allowed = {e for e in allowed if e // size in best}
    if locality.local_threshold is not None:
        reach = 0 if locality.local == "device" else 1
        near = {e for e in allowed if distance[e] <= reach}
        kth = sorted((plain[e] for e in near), reverse=True)[k - 1 : k]
        if kth:
            gaps.append(abs(kth[0] - locality.local_threshold))
        if kth and kth[0] >= locality.local_threshold:
            allowed, open_devices = near, {d for d in open_devices if far(me, d, hosts) <= reach}
    host_of = hosts or (0,) * devices
    on_device = {d: set(part.tolist()) - {-1} for d, part in enumerate(slots.reshape(devices, -1))}

    def worths():
        ids = sorted(allowed)
        values = softmax(select[ids]) if logarithms else select[ids]
        return dict(zip(ids, values))

    if locality.max_hosts is not None and locality.max_hosts < len(set(host_of)):
        units, nearness = {}, {}
        for d in sorted(open_devices):
            units[host_of[d]] = set()
            nearness[host_of[d]] = min(nearness.get(host_of[d], 2), far(me, d, hosts))
        for d in range(devices):
            if host_of[d] in units:
                units[host_of[d]] |= on_device[d]
        if found := best_units(units, nearness, worths(), locality.max_hosts, k, gaps):
            allowed = allowed & found[1]
            open_devices = {d for d in open_devices if host_of[d] in found[0]}
    if locality.max_devices is not None and locality.max_devices < devices:
        units = {d: on_device[d] for d in open_devices}
        nearness = {d: far(me, d, hosts) for d in open_devices}
        if found := best_units(units, nearness, worths(), locality.max_devices, k, gaps):
            allowed, open_devices = allowed & found[1], set(found[0])
    ranked = sorted(allowed, key=lambda e: (-select[e], e))
    return ranked[:k], open_devices, min(gaps)


def oracle_weights(row, chosen, config, locality, distance):
    """The weights of chosen experts."""
    score = plain_probs(row, config)
    if locality.weights == "scaled":
        score = score * scales(locality, distance)
    score = score[chosen]
    if config.renormalize or config.score_function == "topk_softmax":
        score = score / score.sum()
    return score * config.scaling_factor


def plain_choice(row, config, bias):
    """What would be chosen without locality."""
    from routing_support import oracle_choice

    return oracle_choice(row[None], config, bias)[0][0]
