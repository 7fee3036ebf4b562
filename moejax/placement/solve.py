"""From a problem to its best order: what load can be kept, seeds, search; hosts before devices.

Shape letters as in `moejax.placement.search`; H hosts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moejax.placement.problem import Problem
from moejax.placement.search import EPSILON, Search
from moejax.placement.seeds import grow, pack, shuffle
from moejax.placement.topology import Topology

__all__ = ["Effort", "keep_load", "solve", "solve_by_hosts"]

_HALVINGS = 5
_KICKED = 3  # devices that a kick dissolves
_DEALT = 3  # random orders that are tried, too, before a load counts as out of reach


@dataclass(frozen=True)
class Effort:
    """How long to search.

    Attributes:
        starts: seeds that are searched from side by side.
        kicks: how often the best order is disturbed and searched from anew.
        copies: disturbed ones side by side.
        steps: of tabu search each time, after descent.
        deadline: of `time.monotonic`; it ends the search if it comes first.
    """

    starts: int
    kicks: int
    copies: int
    steps: int
    deadline: float = np.inf

    def part(self, share: float) -> Effort:
        """An effort of a share of the kicks and of the time left."""
        now = time.monotonic()
        left = max(self.deadline - now, 0)
        deadline = now + left * share if np.isfinite(left) else np.inf
        return replace(self, kicks=math.ceil(self.kicks * share), deadline=deadline)


def solve(
    problem: Problem,
    effort: Effort,
    rng: np.random.Generator,
    starts: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """The best order found: from seeds, then from the best with some devices dissolved, repeatedly.

    (Iterated local search: Lourenço, Martin and Stützle 2003.)

    Args:
        problem: what to solve.
        effort: how long.
        rng: for seeds, kicks and search.
        starts: orders [B, P] to begin at, beside the effort's number of seeds.

    Returns:
        int64 [B, P], the expert in each slot.
    """
    orders = [*starts]
    for number in range(effort.starts):
        # Affinity first, then load, then variety.
        if number == 1:
            orders.append(pack(problem))
        elif number == 2:
            orders.append(shuffle(problem, rng))
        else:
            orders.append(grow(problem, rng if number else None))
    best = _search(problem, orders, effort, rng)
    for _ in range(effort.kicks):
        if time.monotonic() > effort.deadline:
            break
        kicked = [_kick(problem, best.order_BP, rng) for _ in range(effort.copies)]
        best = best.or_better(_search(problem, kicked, effort, rng))
    return best.order_BP


@dataclass(frozen=True)
class _Found:
    """Orders [B, P] and what they cost: load above capacity, then pairs."""

    order_BP: np.ndarray
    excess_B: np.ndarray
    cost_B: np.ndarray

    def or_better(self, other: _Found) -> _Found:
        less_B = other.excess_B < self.excess_B - EPSILON
        equal_B = ~less_B & (other.excess_B < self.excess_B + EPSILON)
        better_B = less_B | (equal_B & (other.cost_B < self.cost_B))
        return _Found(
            np.where(better_B[:, None], other.order_BP, self.order_BP),
            np.where(better_B, other.excess_B, self.excess_B),
            np.where(better_B, other.cost_B, self.cost_B),
        )


def _search(
    problem: Problem, orders: Sequence[np.ndarray], effort: Effort, rng: np.random.Generator
) -> _Found:
    times = len(orders)
    many = replace(
        problem,
        pairs_BPP=_again(problem.pairs_BPP, times),
        load_BP=_again(problem.load_BP, times),
        capacity_BG=_again(problem.capacity_BG, times),
        home_BP=None if problem.home_BP is None else _again(problem.home_BP, times),
    )
    penalty_N: np.ndarray = np.ones(times)
    if problem.home_BP is not None:
        # Few moves: some starts spend them on pairs first, some on load.
        penalty_N = 4.0 ** np.arange(times)
    penalty_B = np.repeat(penalty_N, len(orders[0]))
    search = Search(many, np.concatenate(orders), rng, penalty_B)
    search.descend(4 * problem.load_BP.shape[1], effort.deadline)
    search.roam(effort.steps, effort.deadline)
    order_NBP = search.best_BP.reshape(times, *orders[0].shape)
    excess_NB = search.best_excess_B.reshape(times, -1)
    cost_NB = search.best_cost_B.reshape(times, -1)
    best = _Found(order_NBP[0], excess_NB[0], cost_NB[0])
    for number in range(1, times):
        best = best.or_better(_Found(order_NBP[number], excess_NB[number], cost_NB[number]))
    return best


def _again(array: np.ndarray, times: int) -> np.ndarray:
    return np.concatenate([array] * times) if times > 1 else array


def _kick(problem: Problem, order_BP: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Deals the experts of a few devices anew among them."""
    open_G = problem.open_P.reshape(problem.capacity_BG.shape[1], -1)
    useful = np.flatnonzero(open_G.any(1))
    kicked_BP = order_BP.copy()
    for order_P in kicked_BP:
        chosen = rng.choice(useful, min(_KICKED, len(useful)), replace=False)
        slot = (chosen[:, None] * open_G.shape[1] + np.arange(open_G.shape[1])).reshape(-1)
        slot = slot[problem.open_P[slot]]
        order_P[slot] = order_P[rng.permutation(slot)]
    return kicked_BP


def keep_load(problem: Problem, rng: np.random.Generator) -> tuple[Problem, np.ndarray, np.ndarray]:
    """Raises capacities that no order was found to keep, all of a problem by one factor.

    Returns:
        The problem with capacities that can be kept; an order that keeps them, int64 [B, P];
        whether they are those asked for, bool [B].
    """
    order_BP = pack(problem)
    worst_B = _worst(problem, order_BP)
    lower_B = np.maximum(_least_factor(problem), 1.0)
    for halving in range(1 + _HALVINGS):
        near = EPSILON if halving == 0 else 1e-3
        unsure = np.flatnonzero(worst_B > lower_B * (1 + near))
        if not len(unsure):
            break
        # At first what was asked for, then halfway between what is out of reach and what is not.
        low, high = lower_B[unsure], worst_B[unsure]
        target = low if halving == 0 else (low + high) / 2
        part = replace(
            _rows(problem, unsure),
            pairs_BPP=np.zeros_like(problem.pairs_BPP[unsure]),
            capacity_BG=(problem.capacity_BG[unsure] * target[:, None]).astype(np.float32),
        )
        orders = [order_BP[unsure]]
        if halving == 0:
            orders += [shuffle(part, rng) for _ in range(_DEALT)]
        steps = max(64, order_BP.shape[1] // 2)
        best = _search(part, orders, Effort(starts=0, kicks=0, copies=0, steps=steps), rng)
        found = _worst(_rows(problem, unsure), best.order_BP)
        better = found < high
        order_BP[unsure[better]] = best.order_BP[better]
        worst_B[unsure] = np.minimum(found, high)
        lower_B[unsure] = np.where(best.excess_B > 0, target, low)
    kept_B = worst_B <= 1 + EPSILON
    factor_B = np.where(kept_B, 1.0, worst_B)
    capacity_BG = (problem.capacity_BG * factor_B[:, None]).astype(np.float32)
    return replace(problem, capacity_BG=capacity_BG), order_BP, kept_B


def _rows(problem: Problem, rows: np.ndarray) -> Problem:
    return replace(
        problem,
        pairs_BPP=problem.pairs_BPP[rows],
        load_BP=problem.load_BP[rows],
        capacity_BG=problem.capacity_BG[rows],
        home_BP=None if problem.home_BP is None else problem.home_BP[rows],
    )


def _worst(problem: Problem, order_BP: np.ndarray) -> np.ndarray:
    batch, devices = problem.capacity_BG.shape
    load_BG = np.take_along_axis(problem.load_BP, order_BP, 1).reshape(batch, devices, -1).sum(2)
    return (load_BG / np.maximum(problem.capacity_BG, 1e-12)).max(1).astype(np.float64)


def _least_factor(problem: Problem) -> np.ndarray:
    """No order is below: the hottest expert among the coldest on the device that bears most."""
    devices = problem.capacity_BG.shape[1]
    room_G = problem.open_P.reshape(devices, -1).sum(1)
    closed = int((~problem.open_P).sum())
    sorted_BP = np.sort(problem.load_BP, axis=1)[:, closed:]
    before_BP = np.cumsum(sorted_BP, axis=1) - sorted_BP
    with_hottest_BG = sorted_BP[:, -1:] + before_BP[:, np.maximum(room_G, 1) - 1]
    factor_BG = with_hottest_BG / np.maximum(problem.capacity_BG, 1e-12)
    return np.where(room_G > 0, factor_BG, np.inf).min(1).astype(np.float64)


# ---- hosts ------------------------------------------------------------------------------------


def solve_by_hosts(
    problem: Problem,
    num_experts: int,
    topology: Topology,
    effort: Effort,
    rng: np.random.Generator,
) -> np.ndarray:
    """Experts divided among hosts, then among each host's devices.

    Loads of a host are kept halfway between its capacity and an even share, so that its devices
    can keep theirs.

    Args:
        problem: what to solve; its kin are not looked at.
        num_experts: E; those from there on stand for empty slots.
        topology: says which devices share a host.
        effort: how long.
        rng: for seeds and search.

    Returns:
        int64 [B, P], the expert in each slot.
    """
    batch, slots = problem.load_BP.shape
    members = [np.flatnonzero(topology.host_G == host) for host in range(topology.num_hosts)]
    host_PB = _divide(problem, num_experts, members, effort.part(0.5), rng)
    size = slots // topology.devices
    order_BP = np.empty((batch, slots), np.int64)
    for host, member in enumerate(members):
        expert_BP = np.stack([np.flatnonzero(host_P == host) for host_P in host_PB])
        slot_P = (member[:, None] * size + np.arange(size)).reshape(-1)
        row_B11 = np.arange(batch)[:, None, None]
        inner = Problem(
            problem.pairs_BPP[row_B11, expert_BP[:, :, None], expert_BP[:, None]],
            np.take_along_axis(problem.load_BP, expert_BP, 1),
            problem.capacity_BG[:, member],
            problem.open_P[slot_P],
        )
        inner_BP = solve(inner, effort.part(0.5 / (len(members) - host)), rng)
        order_BP[:, slot_P] = np.take_along_axis(expert_BP, inner_BP, 1)
    return order_BP


def _divide(
    problem: Problem,
    num_experts: int,
    members: list[np.ndarray],
    effort: Effort,
    rng: np.random.Generator,
) -> np.ndarray:
    """The host of every expert, int64 [B, P]; hosts take as many as they have slots."""
    batch, slots = problem.load_BP.shape
    hosts = len(members)
    size = slots // problem.capacity_BG.shape[1]
    widest = max(map(len, members)) * size
    open_HP = np.zeros((hosts, widest), bool)
    for host, member in enumerate(members):
        room = problem.open_P.reshape(-1, size)[member].sum()
        open_HP[host, :room] = True
    extra = hosts * widest - slots
    capacity_BH = np.stack([problem.capacity_BG[:, m].sum(1) for m in members], axis=1)
    even_BH = capacity_BH / capacity_BH.sum(1, keepdims=True)
    even_BH = even_BH * problem.load_BP.sum(1, keepdims=True)
    outer = Problem(
        np.pad(problem.pairs_BPP, ((0, 0), (0, extra), (0, extra))),
        np.pad(problem.load_BP, ((0, 0), (0, extra))),
        ((capacity_BH + even_BH) / 2).astype(np.float32),
        open_HP.reshape(-1),
    )
    order_BP = solve(outer, effort, rng)
    host_BP = np.empty((batch, hosts * widest), np.int64)
    np.put_along_axis(host_BP, order_BP, np.repeat(np.arange(hosts), widest)[None], 1)
    # Hosts of other widths: whoever stands for an empty slot goes where slots are left.
    wanted_H = np.array([len(member) * size for member in members])
    for host_P in host_BP:
        spare_H = wanted_H - np.bincount(host_P[:num_experts], minlength=hosts)
        host_P[num_experts:slots] = np.repeat(np.arange(hosts), spare_H)
    return host_BP[:, :slots]
