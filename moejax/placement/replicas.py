"""Which experts get a second slot: extra slots filled by what they save in traffic and in load.

Only pair counts and loads are known, so what replicas save is predicted by a model of a token that
uses expert e. The other experts that it uses on device g are taken for Poisson distributed, with
mean m[e, g] = Σ_j P(j | e) · x[j, g], x[j, g] being the share of expert j that device g serves; a
token is on any device with equal chance. As `choice.place` does, a replicated expert takes the
token's own device, else one where another of its experts is, else any. So

* an expert with one slot pays its part of a row, shared with the others there: (1 − 1/G) · φ(m),
  φ(m) = (1 − e^−m) / m being the mean of 1 / (1 + n) for n ~ Poisson(m);
* one with several pays a row if the token comes from none of its n devices and none is gone to
  anyway: (1 − n/G) · Π e^−m.

Loads follow from the shares. What they have over the cap is moved to other replicas by the choice,
at the price of about a row each: it is charged as such, and what replicas cannot even out, dearly.
First greedily, then by swaps. On generated traffic predicted device loads correlate with measured
ones by 0.93 to 0.99; predicted sends are too low by a quarter, but nearly in the right order.
"""

from __future__ import annotations

import numpy as np

from moejax.errors import UserError
from moejax.placement.choice import LOAD_PERCENT, ROUNDS
from moejax.placement.planner import HOST_WEIGHT
from moejax.placement.statistics import Statistics
from moejax.placement.topology import Topology

__all__ = ["add_replicas"]

_ROW = 0.7  # rows that moving an assignment off a full device costs
_STUCK = 3.0  # rows for each assignment, times what the fullest device keeps over the cap
_SLACK = 0.01  # kept below the cap, since a batch differs from the statistics
_CANDIDATES, _TRIED = 8, 3  # experts for the place of each replica, looked at and tried
_SWEEPS, _MOST_TRIED = 3, 192  # of all replicas; of a layer
_SHIFTS, _SHIFT = 8, 0.35  # of traffic, to which loads must adapt; standard deviation of log load


def add_replicas(
    slots_LP: np.ndarray,
    statistics: Statistics,
    topology: Topology,
    *,
    load_cap: float = 1.05,
    host_weight: float = HOST_WEIGHT,
    max_replicas: int = 4,
) -> np.ndarray:
    """Fills the slots that a plan without replicas leaves.

    Args:
        slots_LP: int [L, G·S₀], a plan that holds every expert once.
        statistics: of the traffic.
        topology: with S ≥ S₀ slots a device; as many are filled as its `room` allows.
        load_cap: of the largest device load over the mean, by speed.
        host_weight: what a row to another host costs, in rows to another device of the same one.
        max_replicas: R, the most copies of an expert; `choice.place` takes time by R².

    Returns:
        int32 [L, G·S], no expert twice on a device. Each device's first slots are as they were.

    Raises:
        UserError: the plan does not fit the statistics or the topology.
    """
    slots_LP = np.asarray(slots_LP)
    layers, experts = statistics.load_LE.shape
    devices, slots = topology.devices, topology.slots
    few, rest = divmod(slots_LP.shape[-1], devices)
    if slots_LP.ndim != 2 or len(slots_LP) != layers or rest or few > slots:
        raise UserError(
            f"slots of shape {slots_LP.shape}: for {layers} layers on {devices} devices of "
            f"{slots} slots they are [{layers}, {devices} · S], S at most {slots}"
        )
    if max_replicas < 1 or load_cap < 1:
        raise UserError(
            f"max_replicas={max_replicas}, load_cap={load_cap}: both must be at least 1"
        )
    planned = np.full((layers, devices, slots), -1, np.int32)
    planned[:, :, :few] = slots_LP.reshape(layers, devices, few)
    for layer, slots_GS in enumerate(planned):
        held = slots_GS[slots_GS >= 0]
        if not np.array_equal(np.sort(held), np.arange(experts)):
            raise UserError(
                f"slots of layer {layer}: must hold each of the {experts} experts once; plan "
                "without replicas first"
            )
        room_G = topology.room_G - (slots_GS >= 0).sum(1)
        if (room_G < 0).any():
            raise UserError(
                f"slots of layer {layer}: device {int(room_G.argmin())} holds more than its room "
                f"of {int(topology.room_G[room_G.argmin()])}; plan for this topology"
            )
        filling = _Filling(slots_GS, statistics.layer(layer), topology, load_cap, host_weight)
        filling.add_greedily(room_G, max_replicas)
        for _ in range(_SWEEPS):
            if not filling.swap_all(max_replicas):
                break
        for slots_S, new_E in zip(slots_GS, (filling.has_EG & ~filling.home_EG).T):
            slots_S[np.flatnonzero(slots_S < 0)[: new_E.sum()]] = np.flatnonzero(new_E)
    return planned.reshape(layers, -1)


class _Filling:
    """One layer's experts on devices, and what the model predicts for them."""

    def __init__(
        self,
        slots_GS: np.ndarray,
        statistics: Statistics,
        topology: Topology,
        load_cap: float,
        host_weight: float,
    ) -> None:
        self.load_E = statistics.load_LE[0].astype(np.float64)
        self.load_E /= max(self.load_E.sum(), 1e-300)
        pairs_EE = statistics.pairs_LEE[0].astype(np.float64)
        self.follow_EE = pairs_EE / np.maximum(statistics.load_LE[0], 1e-9)[:, None]
        self.home_EG = np.zeros((len(self.load_E), topology.devices), bool)
        device, place = np.nonzero(slots_GS >= 0)
        self.home_EG[slots_GS[device, place], device] = True
        self.has_EG = self.home_EG.copy()
        self.topology, self.cap, self.host_weight = topology, load_cap - _SLACK, host_weight
        self.host_GH = np.eye(topology.num_hosts)[topology.host_G]
        self.speed_G = topology.speed_G
        rng = np.random.default_rng(0)
        device_E = self.home_EG.argmax(1)
        shift_NE = _SHIFT * rng.normal(size=(_SHIFTS, topology.devices))[:, device_E]
        shift_NE += _SHIFT * rng.normal(size=shift_NE.shape)
        shift_NE[0] = 0
        self.shifts_NE = self.load_E * np.exp(shift_NE)
        self.tries = _MOST_TRIED
        self.refresh()

    def refresh(self) -> None:
        """Shares, company and cost of the present replicas; company depends on shares and back."""
        count_E1 = self.has_EG.sum(1, keepdims=True)
        self.x_EG = self.has_EG / count_E1
        for _ in range(2):
            self.m_EG = self.follow_EE @ self.x_EG
            self.x_EG = _shares(self.has_EG, self.m_EG)
        self.m_EG = self.follow_EE @ self.x_EG
        self.cost = float(self._cost(self.has_EG, self.x_EG, self.m_EG)) + self._stuck()

    def _cost(self, has: np.ndarray, x: np.ndarray, m: np.ndarray) -> np.ndarray:
        """Rows for each assignment, and what is over the cap; [...] of [..., E, G]."""
        rows = _rows(has, m, self.load_E)
        if self.topology.num_hosts > 1:
            rows = rows + self.host_weight * _rows(
                has @ self.host_GH > 0, m @ self.host_GH, self.load_E
            )
        over = np.maximum((self.load_E[:, None] * x).sum(-2) - self.cap * self.speed_G, 0)
        return rows + _ROW * over.sum(-1)

    def _stuck(self) -> float:
        """What the fullest device keeps over the cap when the choice has done what it can.

        The mean over some shifts of the traffic, in which what a device holds becomes more or less
        popular, and each expert for itself.
        """
        if np.ptp(self.speed_G):  # the choice shares loads out evenly
            return 0.0
        count_E = self.has_EG.sum(1)
        device_ER = np.argsort(~self.has_EG, axis=1, kind="stable")[:, : count_E.max()]
        x_ER = np.take_along_axis(self.x_EG, device_ER, 1)
        load_NER = self.shifts_NE[:, :, None] * x_ER
        fullest_N = _evened(load_NER, device_ER, np.arange(count_E.max()) < count_E[:, None])
        return _STUCK * float(np.maximum(fullest_N - self.cap - _SLACK, 0).mean())

    def gain(self) -> np.ndarray:
        """What a copy of each expert on each device would save, about; float64 [E, G]."""
        devices = self.topology.devices
        hit_EG = -np.expm1(-self.m_EG)
        alone_E = np.exp(-np.where(self.has_EG, self.m_EG, 0).sum(1))
        gain_EG = (self.load_E * alone_E)[:, None] * (hit_EG + (1 - hit_EG) / devices)
        if self.topology.num_hosts > 1:
            has_EH = self.has_EG @ self.host_GH > 0
            m_EH = self.m_EG @ self.host_GH
            away_E = np.exp(-np.where(has_EH, m_EH, 0).sum(1))
            near_EH = -np.expm1(-m_EH) * ~has_EH
            saved_EH = (self.load_E * away_E)[:, None] * near_EH
            gain_EG += self.host_weight * saved_EH @ self.host_GH.T
        # Load goes from dear devices to cheap ones, at most half of what there is.
        load_G = (self.load_E[:, None] * self.x_EG).sum(0)
        price_G = np.clip((load_G / np.maximum(self.speed_G, 1e-9) - 0.95) / 0.2, 0, 1)
        from_E1 = (self.x_EG * price_G).sum(1, keepdims=True)
        gain_EG += _ROW * self.load_E[:, None] * (from_E1 - price_G) / 2
        return gain_EG

    def add_greedily(self, room_G: np.ndarray, max_replicas: int) -> None:
        """Fills the room, best gain first."""
        room_G = room_G.copy()
        while True:
            may_E = self.has_EG.sum(1) < max_replicas
            may_EG = ~self.has_EG & may_E[:, None] & (room_G > 0)
            if not may_EG.any():
                break
            best = np.where(may_EG, self.gain(), -np.inf).argmax()
            e, g = np.unravel_index(best, may_EG.shape)
            self.has_EG[e, g] = True
            room_G[g] -= 1
            x_G = _shares(self.has_EG[e], self.m_EG[e])
            self.m_EG += np.outer(self.follow_EE[:, e], x_G - self.x_EG[e])
            self.x_EG[e] = x_G
        self.refresh()

    def swap_all(self, max_replicas: int) -> bool:
        """Tries another expert in the place of each replica; returns whether any was better."""
        swapped = False
        # Those that serve least first.
        pairs = np.argwhere(self.has_EG & ~self.home_EG)
        served = self.load_E[pairs[:, 0]] * self.x_EG[pairs[:, 0], pairs[:, 1]]
        for e, g in pairs[np.argsort(served, kind="stable")]:
            gain_E = self.gain()[:, g]
            may_E = ~self.has_EG[:, g] & (self.has_EG.sum(1) < max_replicas)
            others = np.argsort(np.where(may_E, -gain_E, np.inf), kind="stable")
            others = others[: min(_CANDIDATES, int(may_E.sum()))]
            swapped |= len(others) > 0 and self._swap(int(e), int(g), others)
        return swapped

    def _swap(self, e: int, g: int, others: np.ndarray) -> bool:
        """Replaces a replica by the best of some, if that is better."""
        has_EG = self.has_EG.copy()
        has_EG[e, g] = False
        x_G = _shares(has_EG[e], self.m_EG[e])
        without_EG = self.m_EG + np.outer(self.follow_EE[:, e], x_G - self.x_EG[e])
        count, rows = len(others), np.arange(len(others))
        has_CEG, x_CEG = np.repeat(has_EG[None], count, 0), np.repeat(self.x_EG[None], count, 0)
        x_CEG[:, e] = x_G
        has_CEG[rows, others, g] = True
        new_CG = _shares(has_CEG[rows, others], without_EG[others])
        change_CG = new_CG - x_CEG[rows, others]
        x_CEG[rows, others] = new_CG
        m_CEG = without_EG + self.follow_EE[:, others].T[:, :, None] * change_CG[:, None]
        cost_C = self._cost(has_CEG, x_CEG, m_CEG)
        before = self.has_EG, self.x_EG, self.m_EG, self.cost
        for best in np.argsort(cost_C, kind="stable")[:_TRIED]:
            if cost_C[best] >= before[3] or self.tries == 0:
                break
            self.tries -= 1
            self.has_EG = has_CEG[best]
            self.refresh()
            if self.cost < before[3] * (1 - 1e-6):
                return True
            self.has_EG, self.x_EG, self.m_EG, self.cost = before
        return False


def _evened(load_NER: np.ndarray, device_ER: np.ndarray, real_ER: np.ndarray) -> np.ndarray:
    """The fullest device's load over the mean after the rounds of `choice.place`; float64 [N]."""
    devices, shape = int(device_ER.max()) + 1, (len(load_NER), -1)
    load_NER = load_NER * real_ER
    load_NER *= devices / load_NER.sum((1, 2), keepdims=True)
    first_N1 = devices * np.arange(len(load_NER))[:, None]
    at_N = (first_N1 + device_ER.reshape(-1)).reshape(-1)

    def on_devices(x_NER: np.ndarray) -> np.ndarray:
        sums = np.bincount(at_N, x_NER.reshape(-1), len(x_NER) * devices)
        return sums.reshape(shape)

    limit = LOAD_PERCENT / 100
    for _ in range(ROUNDS):
        load_NG = on_devices(load_NER)
        over_NG = np.maximum(load_NG - limit, 0)
        if not over_NG.any():
            break
        at_NER = np.where(real_ER, load_NG[:, device_ER], np.inf)
        best_NE1 = at_NER.argmin(2)[..., None]
        least_NE1 = np.take_along_axis(at_NER, best_NE1, 2)
        gap_NER = np.where(real_ER, at_NER, 0) - least_NE1 * real_ER
        any_NER = load_NER * ((gap_NER > 0) & (over_NG[:, device_ER] > 0))
        good_NER = any_NER * (least_NE1 < limit)
        enough_NG = on_devices(good_NER) >= over_NG
        from_NER = np.where(enough_NG[:, device_ER], good_NER, any_NER)
        part_NG = np.minimum(over_NG / np.maximum(on_devices(from_NER), 1e-12), 1)
        push_NER = np.minimum(from_NER * part_NG[:, device_ER], gap_NER / 2)
        to_NE = np.take_along_axis(np.broadcast_to(device_ER, at_NER.shape), best_NE1, 2)[..., 0]
        into_N = (first_N1 + to_NE).reshape(-1)
        in_NG = np.bincount(into_N, push_NER.sum(2).reshape(-1), load_NG.size).reshape(shape)
        top_N = np.zeros(load_NG.size)
        from_NER = np.where(push_NER > 0, load_NG[:, device_ER], 0)
        np.maximum.at(top_N, into_N, from_NER.max(2).reshape(-1))
        top_NG = top_N.reshape(shape)
        room_NG = np.maximum(np.maximum(limit - load_NG, (top_NG - load_NG) / 2), 0)
        part_NG = np.minimum(room_NG / np.maximum(in_NG, 1e-12), 1)
        push_NER *= np.take_along_axis(part_NG, to_NE, 1)[..., None]
        load_NER = load_NER - push_NER
        got_NE1 = push_NER.sum(2, keepdims=True)
        here_NE1 = np.take_along_axis(load_NER, best_NE1, 2)
        np.put_along_axis(load_NER, best_NE1, here_NE1 + got_NE1, 2)
    return on_devices(load_NER).max(1)


def _shares(has: np.ndarray, m: np.ndarray) -> np.ndarray:
    """x: the part of each expert's tokens that each device serves; [..., G] like `m`."""
    devices = has.shape[-1]
    count = has.sum(-1, keepdims=True)
    hit = -np.expm1(-m) * has
    none = np.exp(-np.where(has, m, 0).sum(-1, keepdims=True))
    away = 1 - count / devices
    joining = (1 - none) * hit / np.maximum(hit.sum(-1, keepdims=True), 1e-300)
    shared = has / devices + away * (joining + none * has / np.maximum(count, 1))
    # Where no other expert is ever met, `none` is 1 and nothing joins.
    return np.where(count > 1, shared, has)


def _rows(has: np.ndarray, m: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Remote rows for each assignment; [...] of has and m [..., E, G]."""
    places = has.shape[-1]
    count = has.sum(-1)
    own_m = np.where(has, m, 0).sum(-1)
    part = np.where(own_m > 1e-9, -np.expm1(-own_m) / np.maximum(own_m, 1e-9), 1.0)
    alone = np.where(count > 1, (1 - count / places) * np.exp(-own_m), (1 - 1 / places) * part)
    return (load_E * alone).sum(-1)
