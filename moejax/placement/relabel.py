"""Which device takes which part of a new placement, so that as few experts as possible move.

Devices of one host with equal speed and room are interchangeable, and so are hosts with the same
devices: a plan says which experts are together, not where.
"""

from __future__ import annotations

import numpy as np

from moejax.placement.topology import Topology

__all__ = ["arrange", "assign", "relabel"]


def assign(value_NN: np.ndarray) -> np.ndarray:
    """The column of each row so that the sum of values is largest.

    Shortest augmenting paths (the Hungarian method; Jonker and Volgenant 1987), O(N³).

    Args:
        value_NN: float, square; −inf is not allowed.

    Returns:
        int64 [N], a permutation.
    """
    size = len(value_NN)
    cost_NN = value_NN.max(initial=0) - value_NN.astype(np.float64)
    row_price, column_price = np.zeros(size), np.zeros(size)
    row_of = np.full(size, -1)
    for start in range(size):
        distance = np.full(size, np.inf)
        before = np.full(size, -1)  # the column from which each column was reached
        done = np.zeros(size, bool)
        row, last, base = start, -1, 0.0
        while True:
            step = base + cost_NN[row] - row_price[row] - column_price
            closer = ~done & (step < distance)
            distance[closer], before[closer] = step[closer], last
            last = int(np.where(done, np.inf, distance).argmin())
            base = distance[last]
            done[last] = True
            if row_of[last] < 0:
                break
            row = row_of[last]
        row_price[start] += base
        inner = done.copy()
        inner[last] = False
        row_price[row_of[inner]] += base - distance[inner]
        column_price[inner] -= base - distance[inner]
        while before[last] >= 0:
            row_of[last] = row_of[before[last]]
            last = before[last]
        row_of[last] = start
    return np.argsort(row_of)


def relabel(device_E: np.ndarray, present_E: np.ndarray, topology: Topology) -> np.ndarray:
    """The same plan with devices exchanged so that the most experts stay where they are.

    Args:
        device_E: int, the device of each expert in the plan.
        present_E: the device of each expert now.
        topology: says which devices are alike.

    Returns:
        int64 [E], the plan in new labels.
    """
    devices, host_G = topology.devices, topology.host_G
    stay_GG = np.zeros((devices, devices))
    np.add.at(stay_GG, (device_E, present_E), 1)
    kind = [(float(s), int(r)) for s, r in zip(topology.speed_G, topology.room_G)]
    members = [np.flatnonzero(host_G == host) for host in range(topology.num_hosts)]
    makeup = [tuple(sorted(kind[g] for g in member)) for member in members]
    # Any exchange of equals beats one of unequals.
    never = -1.0 - device_E.size * devices
    alike_GG = np.array([[0.0 if a == b else never for b in kind] for a in kind])
    value_GG = stay_GG + alike_GG
    inner: dict[tuple[int, int], np.ndarray] = {}
    value_HH = np.full((len(members), len(members)), never * devices)
    for i, mine in enumerate(members):
        for j, other in enumerate(members):
            if makeup[i] == makeup[j]:
                block = value_GG[np.ix_(mine, other)]
                inner[i, j] = assign(block)
                value_HH[i, j] = block[np.arange(len(mine)), inner[i, j]].sum()
    label_G = np.arange(devices)
    for i, j in enumerate(assign(value_HH)):
        label_G[members[i]] = members[j][inner[i, int(j)]]
    return label_G[device_E]


def arrange(
    device_E: np.ndarray, topology: Topology, present_P: np.ndarray | None = None
) -> np.ndarray:
    """Slots from devices: who stays on a device keeps the slot, others fill in order.

    Returns:
        int32 [P], −1 for empty slots.
    """
    slots_P = np.full(topology.devices * topology.slots, -1, np.int32)
    if present_P is not None:
        at_P = np.arange(len(slots_P)) // topology.slots
        stays_P = (present_P >= 0) & (device_E[present_P] == at_P)
        slots_P[stays_P] = present_P[stays_P]
    placed = np.zeros(len(device_E), bool)
    placed[slots_P[slots_P >= 0]] = True
    for device in range(topology.devices):
        own = slots_P[device * topology.slots : (device + 1) * topology.slots]
        coming = np.flatnonzero((device_E == device) & ~placed)
        own[np.flatnonzero(own < 0)[: len(coming)]] = coming
    return slots_P
