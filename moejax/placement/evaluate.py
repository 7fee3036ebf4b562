"""What a placement costs on real choices: fan-out, remote sends, load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from moejax.placement.topology import Topology
from moejax.placement.trace import Trace

__all__ = [
    "Choice",
    "Measures",
    "cut",
    "devices_of",
    "load_max_mean",
    "mean_of",
    "measure",
    "measure_slots",
    "measure_trace",
]

# choose(experts_NK, slots_P, topology, source_N) → int [N, K] slots, −1 for none.
Choice = Callable[[np.ndarray, np.ndarray, Topology, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class Measures:
    """Means over tokens that chose any expert.

    Attributes:
        fanout: distinct devices of a token's experts, its own included if it is one of them.
        remote_sends: of these, other devices than the token's own.
        remote_hosts: distinct hosts of a token's experts other than its own.
        load_max_mean: the largest device load over the mean, load counted in assignments and
            divided by the device's speed.
    """

    fanout: float
    remote_sends: float
    remote_hosts: float
    load_max_mean: float


def measure(
    experts_NK: np.ndarray,
    slots_P: np.ndarray,
    topology: Topology,
    source_N: np.ndarray | None = None,
    choose: Choice | None = None,
) -> Measures:
    """Measures one layer's placement on tokens.

    Args:
        experts_NK: int, logical experts, −1 for none.
        slots_P: int32 [G·S], the expert of each slot, −1 for an empty one.
        topology: the devices.
        source_N: the device of each token. None: the mean over tokens being on any device with
            equal chance.
        choose: picks the slot of every assignment; needed where an expert has several.

    Raises:
        ValueError: an expert that is chosen has no slot, or has several and `choose` is None.
    """
    if choose is None:
        slot_E = _only_slot(slots_P, int(experts_NK.max(initial=-1)) + 1)
        chosen_NK = np.where(experts_NK >= 0, slot_E[np.clip(experts_NK, 0, None)], -1)
        if (chosen_NK[experts_NK >= 0] < 0).any():
            raise ValueError("a chosen expert has no slot")
    else:
        chosen_NK = choose(experts_NK, slots_P, topology, source_N)
    return measure_slots(chosen_NK, topology, source_N)


def measure_slots(
    slots_NK: np.ndarray, topology: Topology, source_N: np.ndarray | None = None
) -> Measures:
    """As `measure`, from the slot of every assignment, −1 for none."""
    devices, host_G = topology.devices, topology.host_G
    device_NK = np.where(slots_NK >= 0, slots_NK // topology.slots, devices)
    routed_N = (slots_NK >= 0).any(1)
    tokens = max(int(routed_N.sum()), 1)
    touched_NG = _touched(device_NK, devices)
    host_of = np.append(host_G, topology.num_hosts)
    touched_NH = _touched(host_of[device_NK], topology.num_hosts)
    fanout = int(touched_NG.sum())
    if source_N is None:
        own = fanout / devices
        own_hosts = float(touched_NH.sum(0) @ np.bincount(host_G) / devices)
    else:
        rows = np.arange(len(slots_NK))
        own = int(touched_NG[rows, source_N].sum())
        own_hosts = int(touched_NH[rows, host_G[source_N]].sum())
    load_G = np.bincount(device_NK.reshape(-1), minlength=devices + 1)[:devices]
    return Measures(
        fanout / tokens,
        (fanout - own) / tokens,
        (int(touched_NH.sum()) - own_hosts) / tokens,
        float(load_max_mean(load_G[None], topology)[0]),
    )


def _touched(place_NK: np.ndarray, places: int) -> np.ndarray:
    touched = np.zeros((len(place_NK), places + 1), bool)
    np.put_along_axis(touched, place_NK, True, axis=1)
    return touched[:, :places]


def _only_slot(slots_P: np.ndarray, least: int) -> np.ndarray:
    experts = slots_P[slots_P >= 0]
    slot_E = np.full(max(least, int(experts.max(initial=-1)) + 1), -1, np.int64)
    slot_E[experts] = np.flatnonzero(slots_P >= 0)
    if np.bincount(experts, minlength=1).max() > 1:
        raise ValueError("an expert has several slots: give a function that chooses one")
    return slot_E


def measure_trace(
    trace: Trace,
    slots_LP: np.ndarray,
    topology: Topology,
    source_N: np.ndarray | None = None,
    choose: Choice | None = None,
) -> tuple[Measures, ...]:
    """One `Measures` for each layer of a trace."""
    return tuple(
        measure(trace.experts_NLK[:, layer], slots_P, topology, source_N, choose)
        for layer, slots_P in enumerate(slots_LP)
    )


def mean_of(measures: Sequence[Measures]) -> Measures:
    """The mean over layers of each number."""
    return Measures(*(float(v) for v in np.mean([astuple(m) for m in measures], axis=0)))


def devices_of(slots_LP: np.ndarray, topology: Topology, num_experts: int) -> np.ndarray:
    """The device of every expert, of placements that hold each once.

    Returns:
        int64 [L, E].

    Raises:
        ValueError: a layer does not hold every expert once.
    """
    device_LE = np.full((len(slots_LP), num_experts), -1, np.int64)
    for device_E, slots_P in zip(device_LE, slots_LP):
        filled = np.flatnonzero(slots_P >= 0)
        experts = slots_P[filled]
        if len(experts) != num_experts or (np.sort(experts) != np.arange(num_experts)).any():
            raise ValueError("a layer does not hold every expert once")
        device_E[experts] = filled // topology.slots
    return device_LE


def cut(pairs_LEE: np.ndarray, device_LE: np.ndarray) -> np.ndarray:
    """The share of pair weight whose experts lie on two devices; float64 [L]."""
    apart_LEE = device_LE[:, :, None] != device_LE[:, None, :]
    total_L = pairs_LEE.sum((1, 2), dtype=np.float64)
    between_L = np.sum(pairs_LEE, axis=(1, 2), dtype=np.float64, where=apart_LEE)
    return between_L / np.maximum(total_L, 1e-300)


def load_max_mean(load_LG: np.ndarray, topology: Topology) -> np.ndarray:
    """The largest load over speed, as a multiple of what it were if shared by speed; [L].

    Infinite where a device without room has load.
    """
    share_LG = load_LG / np.maximum(load_LG.sum(-1, keepdims=True), 1e-300)
    speed_G = np.broadcast_to(topology.speed_G, share_LG.shape)
    worst = np.where(share_LG > 0, np.inf, 0.0)
    return np.divide(share_LG, speed_G, out=worst, where=speed_G > 0).max(-1)
