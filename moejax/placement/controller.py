"""Follows the traffic: a plan from what was counted first, a few moves at a time after that.

The controller knows nothing of devices or weights. Whoever runs the model gives it counts now and
then, and takes the slots it answers with to where experts are computed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.placement.arrays import Placement, host_arrays, num_slots, slots_at_home
from moejax.placement.online import rebalance
from moejax.placement.planner import Plan, describe, plan
from moejax.placement.replicas import add_replicas
from moejax.placement.statistics import Statistics
from moejax.placement.topology import Topology

__all__ = ["Controller", "Rebalance", "stacked"]

LEAST_TOKENS = 2000.0
"""Tokens of a layer that must have been counted: 2,000 to 8,000 tell which experts go together."""

LEAST_DRIFT = 0.05
"""Copies are chosen anew where this share of a layer's load has gone to other experts."""


@dataclass(frozen=True)
class Rebalance:
    """What one look at the traffic led to.

    Attributes:
        kind: `plan` the first time, `moves` after that, `none` where everything stays, `waits`
            where too few tokens have been counted.
        moved: experts that changed their device, all layers together, copies not counted.
        replicas: slots beyond one for each expert that are filled, all layers together.
        cut: share of pair weight between devices, mean over layers, copies not counted: before
            and after.
        load: largest device load over the mean of the worst layer, without copies: before and
            after.
        tokens: counted, of the layer with fewest.
        seconds: it took the planner.
    """

    kind: str
    moved: int
    replicas: int
    cut: tuple[float, float]
    load: tuple[float, float]
    tokens: float
    seconds: float


class Controller:
    """Where the experts of all layers are, and where they should go.

    Args:
        num_experts: E.
        layers: L, those with experts.
        devices: G along `expert`.
        hosts: the host of each device; None: one for all.
        replicas: slots of a device beyond those that hold every expert once, for copies.
        max_replicas: most copies of an expert; with no extra slots there is one of each.
        load_cap: the largest device load over the mean that is planned for.
        swaps: of two experts of a layer, in one look, after the first.

    Raises:
        UserError: there are fewer experts than devices, or an argument lies outside its range.
    """

    def __init__(
        self,
        num_experts: int,
        layers: int,
        devices: int,
        *,
        hosts: tuple[int, ...] | None = None,
        replicas: int = 0,
        max_replicas: int = 4,
        load_cap: float = 1.05,
        swaps: int = 2,
    ):
        slots = num_slots(num_experts, devices)
        most = num_experts * (min(max_replicas, devices) - 1) // devices
        if not 0 <= replicas <= most:
            raise UserError(
                f"replicas={replicas}: must lie between 0 and {most}, with which each of "
                f"{num_experts} experts is on {min(max_replicas, devices)} of {devices} devices"
            )
        self._once = Topology(devices, slots, hosts)
        self._whole = replace(self._once, slots=slots + replicas)
        self._num_experts = num_experts
        self._max_replicas = min(max_replicas, devices) if replicas else 1
        self._load_cap, self._swaps = load_cap, swaps
        self._once_LP = np.tile(slots_at_home(num_experts, devices), (layers, 1))
        self.slots_LP = self._widened(self._once_LP)
        """int32 [L, G·S], the expert in each slot; −1 for none."""
        self._planned = False
        self._load_at_plan_LE = np.zeros((layers, num_experts))

    @property
    def topology(self) -> Topology:
        """The devices, with all their slots."""
        return self._whole

    @property
    def max_replicas(self) -> int:
        """R, which never changes: programs are compiled for it."""
        return self._max_replicas

    def look(self, statistics: Statistics) -> Rebalance:
        """Plans from recent traffic and changes `slots_LP`.

        Args:
            statistics: of all layers, older windows decayed.
        """
        start = time.perf_counter()
        before = describe(self._once_LP, statistics, self._once, self._load_cap)
        if statistics.tokens_L.min() < LEAST_TOKENS:
            return self._told("waits", before, before, statistics, start)
        kind = "moves" if self._planned else "plan"
        if self._planned:
            after = rebalance(
                self._once_LP,
                statistics,
                self._once,
                load_cap=self._load_cap,
                load_trigger=self._load_cap + 0.05,
                swaps=self._swaps,
            )
        else:
            after = plan(statistics, self._once, load_cap=self._load_cap, present_LP=self._once_LP)
        self._planned, self._once_LP = True, after.slots_LP
        changed_L = after.moved_L > 0
        if self._max_replicas > 1:
            changed_L |= self._drift(statistics.load_LE) > LEAST_DRIFT
        if changed_L.any():
            self.slots_LP = self.slots_LP.copy()
            self.slots_LP[changed_L] = self._with_copies(statistics, changed_L)
        kind = kind if changed_L.any() else "none"
        return self._told(kind, before, after, statistics, start)

    def _with_copies(self, statistics: Statistics, which_L: np.ndarray) -> np.ndarray:
        """All slots of some layers."""
        once_LP = self._once_LP[which_L]
        if self._max_replicas == 1:
            return self._widened(once_LP)
        self._load_at_plan_LE[which_L] = statistics.load_LE[which_L]
        return add_replicas(
            once_LP,
            statistics.layers(which_L),
            self._whole,
            load_cap=self._load_cap,
            max_replicas=self._max_replicas,
        )

    def _drift(self, load_LE: np.ndarray) -> np.ndarray:
        """[L], the share of the load that has gone to other experts since copies were chosen."""
        new_LE, old_LE = (
            load / np.maximum(load.sum(1, keepdims=True), 1e-30)
            for load in (load_LE, self._load_at_plan_LE)
        )
        return np.abs(new_LE - old_LE).sum(1) / 2

    def _widened(self, once_LP: np.ndarray) -> np.ndarray:
        layers, devices = len(once_LP), self._whole.devices
        wide_LGS = np.full((layers, devices, self._whole.slots), -1, np.int32)
        wide_LGS[:, :, : self._once.slots] = once_LP.reshape(layers, devices, -1)
        return wide_LGS.reshape(layers, -1)

    def _told(
        self, kind: str, before: Plan, after: Plan, statistics: Statistics, start: float
    ) -> Rebalance:
        return Rebalance(
            kind,
            moved=int(after.moved_L.sum()),
            replicas=int((self.slots_LP >= 0).sum()) - self._num_experts * len(self.slots_LP),
            cut=(float(before.cut_L.mean()), float(after.cut_L.mean())),
            load=(float(before.load_L.max()), float(after.load_L.max())),
            tokens=float(statistics.tokens_L.min()),
            seconds=time.perf_counter() - start,
        )


def stacked(slots_LP: np.ndarray, num_experts: int, max_replicas: int) -> Placement:
    """The placement arrays of all layers, [L, …], in host memory.

    Args:
        slots_LP: int32 [L, G·S], −1 for an empty slot.
        num_experts: E.
        max_replicas: R.
    """
    each: Any = [host_arrays(slots_P, num_experts, max_replicas) for slots_P in slots_LP]
    fields: Any = map(np.stack, zip(*each, strict=True))
    return Placement(*fields)
