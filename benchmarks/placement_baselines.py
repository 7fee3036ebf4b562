"""What the planner is compared with: in order, in turn, by load alone, and a graph partitioner.

All return int32 [L, G·S], the expert of each slot, as `moejax.placement.planner.plan` does.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from moejax.placement.arrays import slots_at_home
from moejax.placement.statistics import Statistics
from moejax.placement.topology import Topology

HAVE_METIS = importlib.util.find_spec("pymetis") is not None


def in_order(statistics: Statistics, topology: Topology) -> np.ndarray:
    """Contiguous: the home of every expert."""
    slots_P = slots_at_home(statistics.num_experts, topology.devices, topology.slots)
    return np.tile(slots_P, (statistics.num_layers, 1))


def in_turn(statistics: Statistics, topology: Topology) -> np.ndarray:
    """Round-robin: expert e on device e mod G."""
    experts = statistics.num_experts
    device_E = np.arange(experts) % topology.devices
    return np.tile(_slots_of(device_E, np.arange(experts), topology), (statistics.num_layers, 1))


def eplb(statistics: Statistics, topology: Topology) -> np.ndarray:
    """DeepSeek's load balancer, which sees loads alone; slots beyond E hold copies.

    As published (github.com/deepseek-ai/EPLB, README and paper arXiv 2412.19437 §3.4.2): what has
    the largest load for each copy gets the next copy; copies are then packed onto devices by
    falling load, each to the least loaded one with a free slot. With several hosts experts are
    first packed onto hosts (their groups being single experts here), and copies are made and
    packed inside each.
    """
    hosts = topology.num_hosts
    order_G = np.argsort(topology.host_G, kind="stable")
    planned = []
    for load_E in statistics.load_LE:
        slots_GS = np.full((topology.devices, topology.slots), -1, np.int32)
        if len(load_E) % hosts:
            raise SystemExit(f"{len(load_E)} experts on {hosts} hosts: hosts must divide them")
        host_E = balanced_packing(load_E, hosts)
        for host, devices in enumerate(np.split(order_G, hosts)):
            mine = np.flatnonzero(host_E == host)
            which = mine[copies(load_E[mine], len(devices) * topology.slots)]
            share = load_E[which] / np.bincount(which, minlength=len(load_E))[which]
            device = balanced_packing(share, len(devices))
            for i, own in enumerate(devices):
                slots_GS[own] = which[device == i]
        planned.append(slots_GS.reshape(-1))
    return np.stack(planned)


def balanced_packing(weight_N: np.ndarray, packs: int) -> np.ndarray:
    """The pack of each item: by falling weight, to the lightest pack that is not full."""
    room = np.full(packs, len(weight_N) // packs)
    pack_N, weight = np.empty(len(weight_N), np.int64), np.zeros(packs)
    for item in np.argsort(-weight_N, kind="stable"):
        pack_N[item] = np.where(room > 0, weight, np.inf).argmin()
        weight[pack_N[item]] += weight_N[item]
        room[pack_N[item]] -= 1
    return pack_N


def copies(load_E: np.ndarray, total: int) -> np.ndarray:
    """The expert of each of `total` copies: each in turn, then whichever has most load a copy."""
    count_E, which = np.ones(len(load_E)), list(range(len(load_E)))
    while len(which) < total:
        which.append(int((load_E / count_E).argmax()))
        count_E[which[-1]] += 1
    return np.array(which)


def metis(statistics: Statistics, topology: Topology) -> np.ndarray:
    """METIS's k-way partition of the graph of pairs, repaired to parts of equal size.

    Through pymetis; Karypis and Kumar 1998. It balances numbers of experts, not loads. The repair
    moves, one after the other, the expert that loses least from a part that is too large to one
    with room.
    """
    import pymetis

    devices, slots, planned = topology.devices, topology.slots, []
    for pairs_EE in statistics.pairs_LEE:
        weight_EE = np.round(pairs_EE / max(pairs_EE.max(), 1) * 10_000).astype(int)
        neighbours = [np.flatnonzero(row) for row in weight_EE]
        graph = pymetis.CSRAdjacency(
            np.cumsum([0, *map(len, neighbours)]).tolist(), np.concatenate(neighbours).tolist()
        )
        weights = np.concatenate([row[n] for row, n in zip(weight_EE, neighbours)])
        _, parts = pymetis.part_graph(devices, graph, eweights=weights.tolist())
        device_E = np.array(parts)
        while True:
            size_G = np.bincount(device_E, minlength=devices)
            if size_G.max() <= slots:
                break
            joined_EG = np.stack([pairs_EE[:, device_E == g].sum(1) for g in range(devices)], 1)
            gain_EG = joined_EG - np.take_along_axis(joined_EG, device_E[:, None], 1)
            gain_EG[size_G[device_E] <= slots] = -np.inf
            gain_EG[:, size_G >= slots] = -np.inf
            expert, device = np.unravel_index(gain_EG.argmax(), gain_EG.shape)
            device_E[expert] = device
        planned.append(_slots_of(device_E, np.arange(len(device_E)), topology))
    return np.stack(planned)


def _slots_of(device_N: np.ndarray, expert_N: np.ndarray, topology: Topology) -> np.ndarray:
    slots_GS = np.full((topology.devices, topology.slots), -1, np.int32)
    for device, slots_S in enumerate(slots_GS):
        own = expert_N[device_N == device]
        slots_S[: len(own)] = own
    return slots_GS.reshape(-1)
