"""Small repairs of a placement while traffic drifts: a few experts move, only when it pays."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from moejax.errors import UserError
from moejax.placement.evaluate import devices_of
from moejax.placement.planner import (
    HOST_WEIGHT,
    Plan,
    check_present,
    describe,
    improve,
)
from moejax.placement.problem import problem_of
from moejax.placement.relabel import arrange
from moejax.placement.solve import keep_load
from moejax.placement.statistics import Statistics
from moejax.placement.topology import Topology

__all__ = ["rebalance"]


def rebalance(
    present_LP: np.ndarray,
    statistics: Statistics,
    topology: Topology,
    *,
    load_cap: float = 1.05,
    host_weight: float = HOST_WEIGHT,
    swaps: int = 2,
    load_trigger: float = 1.1,
    cut_trigger: float = 0.002,
    seed: int = 0,
) -> Plan:
    """Moves a few experts of the layers whose load, or whose cut, is off.

    A layer stays as it is unless its load is above `load_trigger`, or the moves would lower what
    pairs cost by `cut_trigger` without raising the load. Where no placement keeps the load, both
    loads rise by what is lacking. A search from the present placement takes as many moves as are
    allowed: two for a swap, but three may go round in a circle.

    Args:
        present_LP: int32 [L, P], every expert once.
        statistics: of recent traffic, older windows decayed.
        topology: the devices.
        load_cap: the load to come down to, as a multiple of the mean.
        host_weight: what a remote host costs, in remote devices.
        swaps: half of the experts of a layer that may move.
        load_trigger: the load, as a multiple of the mean, that is too much.
        cut_trigger: the share of the cost of pairs that is worth the moves.
        seed: of the search.

    Returns:
        The plan; `moved_L` is 0 for layers that stay.

    Raises:
        UserError: an argument lies outside its range, or the present placement is none.
    """
    topology.check_fits(statistics.num_experts)
    check_present(present_LP, statistics, topology)
    if not (math.isfinite(load_cap) and 1 <= load_cap <= load_trigger):
        raise UserError(
            f"load_cap={load_cap}, load_trigger={load_trigger}: must be at least 1, and the "
            "trigger no less than the cap"
        )
    if swaps < 0 or not cut_trigger >= 0:
        raise UserError(f"swaps={swaps}, cut_trigger={cut_trigger}: must not be negative")
    if not (math.isfinite(host_weight) and host_weight >= 0):
        raise UserError(f"host_weight={host_weight}: must not be negative")
    rng = np.random.default_rng(seed)
    experts = statistics.num_experts
    asked = problem_of(statistics, topology, load_cap, host_weight)
    problem, _, _ = keep_load(asked, rng)
    now = describe(present_LP, statistics, topology, load_cap)
    raised_L = problem.capacity_BG.sum(1) / np.maximum(asked.capacity_BG.sum(1), 1e-30)
    off_L = now.load_L > load_trigger * raised_L
    # A load that is not off may stay: moves are few, and pairs want them, too.
    stays_L = np.where(off_L, 1, np.maximum(now.load_L / (load_cap * raised_L), 1))
    capacity_LG = (problem.capacity_BG * stays_L[:, None]).astype(np.float32)
    problem = replace(problem, capacity_BG=capacity_LG)
    present_LE = devices_of(present_LP, topology, experts)
    nearby_LE = improve(problem, present_LE, 2 * swaps, rng)
    cost_L = problem.cost(present_LE)
    off_L |= cost_L - problem.cost(nearby_LE) > cut_trigger * cost_L
    device_LE = np.where(off_L[:, None], nearby_LE, present_LE)
    slots_LP = np.stack(
        [arrange(device_E, topology, own_P) for device_E, own_P in zip(device_LE, present_LP)]
    )
    return describe(slots_LP, statistics, topology, load_cap, present_LP)
