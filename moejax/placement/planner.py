"""Plans where experts live: few devices for each token, loads within a cap.

A token's experts on one device need one send. From counts of pairs the planner knows how often two
experts serve one token, and makes the weight of pairs on different devices small: the *cut*, as a
share of all pair weight. Plain counts predict fan-out on unseen tokens as well as any weighting of
them that was tried, and within 0.4 % of a search on sampled tokens themselves.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from moejax.errors import UserError
from moejax.placement.evaluate import cut, devices_of, load_max_mean
from moejax.placement.problem import Problem, problem_of
from moejax.placement.relabel import arrange, relabel
from moejax.placement.seeds import order_of
from moejax.placement.solve import Effort, keep_load, solve, solve_by_hosts
from moejax.placement.statistics import Statistics
from moejax.placement.topology import Topology

__all__ = ["HOST_WEIGHT", "Plan", "check_present", "describe", "improve", "plan"]

HOST_WEIGHT = 4.0  # a send to another host as a multiple of one inside: links differ that much
_ROUNDING = 2e-5  # float32 loads above the cap by less keep it
_NEARBY_STARTS, _NEARBY_STEPS = 6, 96  # of a search within some moves
_TOGETHER = 1 << 17  # elements that a step of the search looks at, so that they stay in cache


@dataclass(frozen=True)
class Plan:
    """Where the experts of each layer go.

    Attributes:
        slots_LP: int32 [L, P], the expert in each slot; −1 for an empty one.
        cut_L: float64, the share of pair weight between devices.
        host_cut_L: float64, between hosts.
        load_L: float64, the largest device load over the mean, by speed.
        load_kept_L: bool, whether that is within the cap. Otherwise it is about the least there is.
        moved_L: int64, experts on another device than at present; 0 without a present.
    """

    slots_LP: np.ndarray
    cut_L: np.ndarray
    host_cut_L: np.ndarray
    load_L: np.ndarray
    load_kept_L: np.ndarray
    moved_L: np.ndarray


def plan(
    statistics: Statistics,
    topology: Topology,
    *,
    load_cap: float = 1.05,
    host_weight: float = HOST_WEIGHT,
    present_LP: np.ndarray | None = None,
    most_moved: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
) -> Plan:
    """Plans all layers, each by itself.

    Args:
        statistics: pair counts and loads.
        topology: the devices.
        load_cap: the largest device load allowed, as a multiple of the mean (by speed).
        host_weight: what a remote host costs, in remote devices.
        present_LP: int32 [L, P], where experts are now; the plan keeps what it can in place.
        most_moved: experts of a layer that may change their device.
        seconds: time for all layers together; 0: a first plan, quickly. None: as many steps as
            bring most of the gain, so that equal inputs give equal plans on any machine.
        seed: of the search.

    Raises:
        UserError: an argument lies outside its range, experts do not fit, or the present
            placement is not one.
    """
    _check(statistics, topology, load_cap, host_weight, present_LP, most_moved, seconds)
    began = time.monotonic()
    layers, slots = statistics.num_layers, topology.devices * topology.slots
    whole = _effort(slots, seconds)
    size = 3 * topology.slots * slots * (1 + whole.starts)
    together = max(1, _TOGETHER // size)
    slots_LP = np.empty((layers, slots), np.int32)
    for first in range(0, layers, together):
        part = slice(first, first + together)
        effort = whole
        if seconds:
            # What is left of the time goes to the layers that are left, alike.
            share = min(1.0, together / (layers - first))
            effort = replace(whole, deadline=began + seconds).part(share)
            effort = replace(effort, kicks=whole.kicks)
        slots_LP[part] = _Part(
            statistics.layers(part),
            topology,
            load_cap,
            host_weight,
            None if present_LP is None else present_LP[part],
            effort,
            np.random.default_rng([seed, first]),
        ).plan(most_moved)
    return describe(slots_LP, statistics, topology, load_cap, present_LP)


def _effort(slots: int, seconds: float | None) -> Effort:
    """Chosen by measuring: at 64 slots many searches are cheap, at 512 later kicks gain little."""
    if seconds == 0:
        return Effort(starts=1, kicks=0, copies=0, steps=slots // 2)
    if slots <= 128:
        kicks = 1 if slots >= 64 else 256 // slots  # of few slots, a kick is a fresh start
        effort = Effort(starts=3, kicks=kicks, copies=4, steps=max(32, 2 * slots))
    else:
        effort = Effort(starts=2 if slots <= 256 else 1, kicks=6, copies=1, steps=slots // 4)
    return effort if seconds is None else replace(effort, kicks=1 << 30)


def describe(
    slots_LP: np.ndarray,
    statistics: Statistics,
    topology: Topology,
    load_cap: float,
    present_LP: np.ndarray | None = None,
) -> Plan:
    """What placements are expected to cost; each holds every expert once."""
    device_LE = devices_of(slots_LP, topology, statistics.num_experts)
    load_LG = np.stack(
        [
            np.bincount(device_E, load_E, topology.devices)
            for device_E, load_E in zip(device_LE, statistics.load_LE)
        ]
    )
    load_L = load_max_mean(load_LG, topology)
    moved_L = np.zeros(len(slots_LP), np.int64)
    if present_LP is not None:
        present_LE = devices_of(present_LP, topology, statistics.num_experts)
        moved_L = (present_LE != device_LE).sum(1)
    return Plan(
        slots_LP,
        cut(statistics.pairs_LEE, device_LE),
        cut(statistics.pairs_LEE, topology.host_G[device_LE]),
        load_L,
        load_L <= load_cap * (1 + _ROUNDING),
        moved_L,
    )


@dataclass(frozen=True)
class _Part:
    """Layers that are planned side by side."""

    statistics: Statistics
    topology: Topology
    load_cap: float
    host_weight: float
    present_LP: np.ndarray | None
    effort: Effort
    rng: np.random.Generator

    def plan(self, most_moved: int | None) -> np.ndarray:
        """int32 [L, P]."""
        topology, experts = self.topology, self.statistics.num_experts
        present_LE = None
        if self.present_LP is not None:
            present_LE = devices_of(self.present_LP, topology, experts)
        device_LE = self._anew(present_LE)
        if present_LE is not None:
            device_LE = np.stack(
                [relabel(new, old, topology) for new, old in zip(device_LE, present_LE)]
            )
            if most_moved is not None:
                many = (device_LE != present_LE).sum(1) > most_moved
                if many.any():
                    nearby_LE = improve(
                        problem_of(self.statistics, topology, self.load_cap, self.host_weight),
                        present_LE,
                        most_moved,
                        self.rng,
                        self.effort.deadline,
                    )
                    device_LE[many] = nearby_LE[many]
        presents = [None] * len(device_LE) if self.present_LP is None else self.present_LP
        return np.stack([arrange(d, topology, p) for d, p in zip(device_LE, presents)])

    def _anew(self, present_LE: np.ndarray | None) -> np.ndarray:
        topology, experts = self.topology, self.statistics.num_experts
        problem = problem_of(self.statistics, topology, self.load_cap, self.host_weight)
        problem, least_BP, _ = keep_load(problem, self.rng)
        starts = [least_BP]
        effort = self.effort
        if problem.kin_GG is not None:
            starts.append(solve_by_hosts(problem, experts, topology, effort.part(0.5), self.rng))
            effort = replace(effort.part(0.5), starts=1)
        if present_LE is not None:
            starts.append(order_of(_padded(present_LE, problem), problem))
        order_LP = solve(problem, effort, self.rng, starts)
        return problem.devices_of(order_LP)[:, :experts]


def improve(
    problem: Problem,
    present_LE: np.ndarray,
    most_moved: int,
    rng: np.random.Generator,
    deadline: float = np.inf,
) -> np.ndarray:
    """The best placement found within some moves of the present one.

    Args:
        problem: what to solve, of L layers.
        present_LE: the device of every expert.
        most_moved: experts of a layer that may be on another device.
        rng: of the search.
        deadline: of `time.monotonic`.

    Returns:
        int64 [L, E], devices.
    """
    home_LP = _padded(present_LE, problem)
    near = replace(problem, home_BP=home_LP, most_moved=most_moved)
    # No kick: it would leave the neighbourhood.
    effort = Effort(starts=0, kicks=0, copies=0, steps=_NEARBY_STEPS, deadline=deadline)
    start_LP = order_of(home_LP, problem)
    starts = [start_LP]
    for _ in range(_NEARBY_STARTS - 1):
        # Elsewhere by one swap, if that is allowed, and for the rest by what is tabu how long.
        other_LP = start_LP.copy()
        for order_P in other_LP if most_moved >= 2 else ():
            swapped = rng.choice(np.flatnonzero(problem.open_P), 2)
            order_P[swapped] = order_P[swapped[::-1]]
        starts.append(other_LP)
    order_LP = solve(near, effort, rng, starts)
    return problem.devices_of(order_LP)[:, : present_LE.shape[1]]


def _padded(device_LE: np.ndarray, problem: Problem) -> np.ndarray:
    extra = problem.load_BP.shape[1] - device_LE.shape[1]
    return np.pad(device_LE, ((0, 0), (0, extra)), constant_values=-1)


def check_present(present_LP: np.ndarray, statistics: Statistics, topology: Topology) -> None:
    """A present placement holds every expert once, in the slots there are.

    Raises:
        UserError: it does not.
    """
    shape = (statistics.num_layers, topology.devices * topology.slots)
    if present_LP.shape != shape:
        raise UserError(
            f"present: slots of shape {present_LP.shape}: must be [layers, devices · slots] {shape}"
        )
    try:
        device_LE = devices_of(present_LP, topology, statistics.num_experts)
    except ValueError as error:
        raise UserError(f"present: {error}; plan from nothing, then add replicas") from None
    for layer, device_E in enumerate(device_LE):
        over_G = np.bincount(device_E, minlength=topology.devices) - topology.room_G
        if (over_G > 0).any():
            device = int(over_G.argmax())
            raise UserError(
                f"present: layer {layer} has {int(over_G[device])} experts more on device {device} "
                f"than its room of {int(topology.room_G[device])}; plan from nothing"
            )


def _check(
    statistics: Statistics,
    topology: Topology,
    load_cap: float,
    host_weight: float,
    present_LP: np.ndarray | None,
    most_moved: int | None,
    seconds: float | None,
) -> None:
    if not (math.isfinite(load_cap) and load_cap >= 1):
        raise UserError(f"load_cap={load_cap}: must be at least 1, the mean load")
    if not (math.isfinite(host_weight) and host_weight >= 0):
        raise UserError(f"host_weight={host_weight}: must not be negative")
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise UserError(f"seconds={seconds}: must not be negative; 0 makes a first plan")
    topology.check_fits(statistics.num_experts)
    if most_moved is not None and (most_moved < 0 or present_LP is None):
        raise UserError(
            f"most_moved={most_moved}: must not be negative, and needs the present placement"
        )
    if present_LP is not None:
        check_present(present_LP, statistics, topology)
