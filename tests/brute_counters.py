"""What an exchange moves, by walking the tokens one by one."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np

from moejax.exchange.budget import Budget


def walk(slots_TK, budget: Budget):
    """Rows of one source in the order of its tokens: token's slots, device, wave.

    The rule: of one (source, device) pair a row opens a new wave for every C rows that went before,
    and for every `quota` assignments, unless C rows cannot hold more than that.
    """
    rows, assigned = Counter(), Counter()
    for token in slots_TK:
        needed = Counter(int(s) // budget.slots for s in token if s >= 0)
        for device, count in needed.items():
            yield token, device, wave_of(rows[device], assigned[device], budget)
            rows[device] += 1
            assigned[device] += count


def wave_of(rows: int, assigned: int, budget: Budget) -> int:
    """The wave of a row before which there are so many rows and assignments."""
    tight = budget.quota < budget.rows * min(budget.top_k, budget.slots)
    return rows // budget.rows + (assigned // budget.quota if tight else 0)


def brute_waves(slots_TK, budget: Budget) -> tuple[int, Counter]:
    """Waves of one source by walking its tokens, and its rows for each device."""
    steps = list(walk(slots_TK, budget))
    waves = 1 + max((wave for _, _, wave in steps), default=0)
    return waves, Counter(device for _, device, _ in steps)


def brute_counters(slots_STK, budget: Budget, hosts=None) -> dict[str, int]:
    """Counters summed over all sources (data × expert, expert fastest), nothing being dropped."""
    if budget.inside is not None:
        return brute_hierarchy(slots_STK, budget)
    hosts = [0] * budget.devices if hosts is None else hosts
    split = partial(np.split, indices_or_sections=budget.chunks)
    waves = max(brute_waves(chunk, budget)[0] for s in slots_STK for chunk in split(s))
    total = dict.fromkeys(("rows_self", "rows_host", "rows_network", "rows_padding"), 0)
    for source, slots_TK in enumerate(slots_STK):
        me = source % budget.devices
        away = 0
        rows = sum((brute_waves(chunk, budget)[1] for chunk in split(slots_TK)), Counter())
        for device, count in rows.items():
            if device == me:
                total["rows_self"] += count
                continue
            away += count
            near = hosts[device] == hosts[me]
            total["rows_host" if near else "rows_network"] += count
        if budget.mode == "remote":  # sends what is needed
            continue
        sent = {"local": 0, "ring": budget.tokens, "all_to_all": budget.rows}[budget.mode]
        total["rows_padding"] += waves * budget.chunks * (budget.devices - 1) * sent - away
    assigned = int((slots_STK >= 0).sum())
    return total | {"waves": waves, "assignments": assigned, "dropped": 0}


def brute_hierarchy(slots_STK, budget: Budget) -> dict[str, int]:
    """The same where rows cross once to each host and are spread there."""
    inner = budget.inside
    local, hosts, sources = inner.devices, budget.devices, len(slots_STK)
    own, network, waves = 0, 0, 1
    rows, assigned = Counter(), Counter()  # that one device passes on to another, or keeps
    for source, slots_TK in enumerate(slots_STK):
        block, me = divmod(source, hosts * local)
        home, place = divmod(me, local)
        for chunk, piece in enumerate(np.split(slots_TK, budget.chunks)):
            for token, host, wave in walk(piece, budget):
                waves = max(waves, wave + 1)
                network += host != home
                forwarder = (chunk, block, host, place, wave)
                there = [int(s) // inner.slots for s in token if s >= 0]
                needed = Counter(d % local for d in there if d // local == host)
                own += host == home and place in needed
                for device, count in needed.items():
                    rows[forwarder, device] += 1
                    assigned[forwarder, device] += count
    inside = [1] * waves  # of each wave between hosts
    for (forwarder, device), count in rows.items():
        last = wave_of(count - 1, assigned[forwarder, device] - 1, inner)
        inside[forwarder[-1]] = max(inside[forwarder[-1]], last + 1)
    spread = sum(n for (forwarder, device), n in rows.items() if device != forwarder[3])
    moved = waves * (hosts - 1) * budget.rows + sum(inside) * (local - 1) * inner.rows
    return {
        "rows_self": own,
        "rows_host": spread,
        "rows_network": network,
        "rows_padding": sources * budget.chunks * moved - spread - network,
        "waves": sum(inside),
        "assignments": int((slots_STK >= 0).sum()),
        "dropped": 0,
    }
