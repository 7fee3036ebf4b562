"""What the search solves: pair weights, loads and capacities of many layers, as shares.

Shape letters as in `moejax.placement.search`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moejax.placement.statistics import Statistics
from moejax.placement.topology import Topology

__all__ = ["Problem", "problem_of"]


@dataclass(frozen=True)
class Problem:
    """B independent problems of equal shape; the kin and what is open are common to all.

    Attributes:
        pairs_BPP: float32, pair weights of experts, symmetric, zero diagonal; each problem's sum
            to 2 (or 0), so that costs are shares.
        load_BP: float32, the experts' loads; each problem's sum to 1.
        capacity_BG: float32, the load each device may have.
        open_P: bool, slots whose expert may move.
        kin_GG: float32, symmetric, 1 on the diagonal; None: 0 elsewhere.
        home_BP: int64, the device of each expert at present, −1 for none; None if it is no matter.
        most_moved: how many experts may be elsewhere; the start keeps to it.
    """

    pairs_BPP: np.ndarray
    load_BP: np.ndarray
    capacity_BG: np.ndarray
    open_P: np.ndarray
    kin_GG: np.ndarray | None = None
    home_BP: np.ndarray | None = None
    most_moved: int = 1 << 30

    def cost(self, device_BE: np.ndarray) -> np.ndarray:
        """What pairs cost, without load, counted from nothing.

        Args:
            device_BE: int64, the device of the first E experts; the others have no pairs.

        Returns:
            float64 [B].
        """
        experts, devices = device_BE.shape[1], self.capacity_BG.shape[1]
        kin_GG = np.eye(devices, dtype=np.float32) if self.kin_GG is None else self.kin_GG
        apart_BEE = 1 - kin_GG[device_BE[:, :, None], device_BE[:, None]]
        apart_BEE *= self.pairs_BPP[:, :experts, :experts]
        return apart_BEE.sum((1, 2), dtype=np.float64) / 2

    def devices_of(self, order_BP: np.ndarray) -> np.ndarray:
        """The device of every expert, from the expert in each slot; int64 [B, P]."""
        slots = order_BP.shape[1]
        at_P = np.arange(slots) // (slots // self.capacity_BG.shape[1])
        device_BP = np.empty_like(order_BP)
        np.put_along_axis(device_BP, order_BP, np.broadcast_to(at_P, order_BP.shape), 1)
        return device_BP


def problem_of(
    statistics: Statistics, topology: Topology, load_cap: float, host_weight: float
) -> Problem:
    """The search's problem of each layer: shares instead of counts, empty slots filled up."""
    layers, experts = statistics.load_LE.shape
    slots = topology.devices * topology.slots
    pairs_LPP = np.zeros((layers, slots, slots), np.float32)
    total_L = statistics.pairs_LEE.sum((1, 2), dtype=np.float64)
    scale_L = (2 / np.maximum(total_L, 1e-30)).astype(np.float32)
    np.multiply(statistics.pairs_LEE, scale_L[:, None, None], out=pairs_LPP[:, :experts, :experts])
    load_LP = np.zeros((layers, slots), np.float32)
    total_L = statistics.load_LE.sum(1, dtype=np.float64)
    load_LP[:, :experts] = statistics.load_LE / np.maximum(total_L, 1e-30)[:, None]
    capacity_G = (load_cap * topology.speed_G).astype(np.float32)
    open_P = (np.arange(topology.slots) < topology.room_G[:, None]).reshape(-1)
    kin_GG = None
    if 1 < topology.num_hosts < topology.devices and host_weight > 0:
        same_GG = topology.host_G[:, None] == topology.host_G
        kin_GG = (np.eye(topology.devices) + host_weight * same_GG) / (1 + host_weight)
        kin_GG = kin_GG.astype(np.float32)
    capacity_LG = np.tile(capacity_G, (layers, 1))
    return Problem(pairs_LPP, load_LP, capacity_LG, open_P, kin_GG)
