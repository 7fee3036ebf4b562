"""Placements to begin a search from, many problems at once.

Shape letters as in `moejax.placement.search`.
"""

from __future__ import annotations

import numpy as np

from moejax.placement.problem import Problem

__all__ = ["grow", "order_of", "pack", "shuffle"]


def pack(problem: Problem) -> np.ndarray:
    """The hottest expert first, each on the device that it fills least, in share of its capacity.

    The greedy rule for machines of several speeds (Graham 1969) with a number of slots each, as in
    DeepSeek's EPLB.

    Returns:
        int64 [B, P], the expert in each slot.
    """
    room_G, capacity_BG, closed = _room(problem)
    batch, slots = problem.load_BP.shape
    row_B = np.arange(batch)
    device_BP = np.full((batch, slots), -1)
    count_BG = np.zeros(capacity_BG.shape, np.int64)
    load_BG = np.zeros(capacity_BG.shape)
    hottest_BP = np.argsort(-problem.load_BP, axis=1, kind="stable")
    for place in range(slots - closed):
        expert_B = hottest_BP[:, place]
        load_B = problem.load_BP[row_B, expert_B]
        filled_BG = (load_BG + load_B[:, None]) / capacity_BG
        filled_BG[count_BG >= room_G] = np.inf
        device_B = filled_BG.argmin(1)
        device_BP[row_B, expert_B] = device_B
        load_BG[row_B, device_B] += load_B
        count_BG[row_B, device_B] += 1
    return order_of(device_BP, problem)


def grow(problem: Problem, rng: np.random.Generator | None = None) -> np.ndarray:
    """Fills one device after the other: the hottest expert left, then whoever is nearest to those.

    Args:
        problem: what to solve.
        rng: begins each device with a random expert instead, hot ones likelier.

    Returns:
        int64 [B, P], the expert in each slot.
    """
    room_G, capacity_BG, closed = _room(problem)
    batch, slots = problem.load_BP.shape
    row_B = np.arange(batch)
    device_BP = np.full((batch, slots), -1)
    # Experts without load are the last ones, and stay in the slots that are closed.
    taken_BP = np.zeros((batch, slots), np.float32)
    taken_BP[:, slots - closed :] = np.inf
    for device in np.argsort(-capacity_BG.mean(0), kind="stable"):
        near_BP = problem.load_BP
        if rng is not None:
            near_BP = near_BP * rng.random((batch, slots), np.float32)
        spare_B = capacity_BG[:, device].astype(np.float32)
        for place in range(room_G[device]):
            over_BP = np.maximum(problem.load_BP - spare_B[:, None], 0)
            # Above capacity only if everybody is, and then the coldest.
            expert_B = (near_BP - 1e4 * over_BP - taken_BP).argmax(1)
            device_BP[row_B, expert_B] = device
            taken_BP[row_B, expert_B] = np.inf
            spare_B -= problem.load_BP[row_B, expert_B]
            pairs_BP = problem.pairs_BPP[row_B, expert_B]
            near_BP = pairs_BP.copy() if place == 0 else near_BP + pairs_BP
    return order_of(device_BP, problem)


def shuffle(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """Experts dealt at random; int64 [B, P], the expert in each slot."""
    room_G, _, closed = _room(problem)
    batch, slots = problem.load_BP.shape
    device_BP = np.full((batch, slots), -1)
    device_BP[:, : slots - closed] = rng.permuted(
        np.tile(np.repeat(np.arange(len(room_G)), room_G), (batch, 1)), axis=1
    )
    return order_of(device_BP, problem)


def order_of(device_BP: np.ndarray, problem: Problem) -> np.ndarray:
    """The expert in each slot, from the device of each expert.

    Args:
        device_BP: int64 [B, P]; −1 for experts without load, which fill what is left.
        problem: says which slots are open.

    Returns:
        int64 [B, P]; on a device experts are in order, those without load last.
    """
    slots = device_BP.shape[1]
    devices = problem.capacity_BG.shape[1]
    device_BP = device_BP.copy()
    for device_P in device_BP:
        spare_G = slots // devices - np.bincount(device_P[device_P >= 0], minlength=devices)
        device_P[device_P < 0] = np.repeat(np.arange(devices), spare_G)
    return np.argsort(device_BP, axis=1, kind="stable")


def _room(problem: Problem) -> tuple[np.ndarray, np.ndarray, int]:
    """Open slots of each device [G], capacities that can be divided by, the slots closed."""
    devices = problem.capacity_BG.shape[1]
    room_G = problem.open_P.reshape(devices, -1).sum(1)
    return room_G, np.maximum(problem.capacity_BG, 1e-12), int((~problem.open_P).sum())
