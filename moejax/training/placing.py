"""Where a run computes its experts: looks at the traffic now and then, and follows it.

Masters and moments stay at home (`moejax.placement.fetch`): a look changes the arrays that the next
steps get, and nothing is compiled or stored anew.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.layer import hosts_along_experts
from moejax.placement.arrays import Placement
from moejax.placement.controller import Controller, stacked
from moejax.placement.counting import read_counters, read_each
from moejax.placement.fetch import fetch_traffic
from moejax.placement.history import History, in_words
from moejax.training.config import TrainConfig
from moejax.training.rundir import RunDir
from moejax.training.state import Blueprint, TrainState
from sharding.distributed import from_first, is_first, say
from sharding.traffic_formulas import fetch_collectives

__all__ = ["Placing"]

_PLANNED = ("plan", "moves")

_MORE = "raise --rebalance-every or --placement-stats-window if it stays so"


class Placing:
    """The placement of a run, from its own traffic; at home with `placement="home"`.

    Args:
        run: where to write what was done.
        blueprint: model and mesh.
        config: of the run.

    Raises:
        UserError: a placement is asked for where there is one device, or no expert.
    """

    def __init__(self, run: RunDir, blueprint: Blueprint, config: TrainConfig):
        self._run, self._mesh = run, blueprint.mesh
        self.arrays: Placement | None = None
        """What a step takes, [L, …]."""
        self.metrics: dict[str, Any] = {}
        """What a step's line of `metrics.jsonl` says besides.

        expert_fetch_bytes: a device sends in a step, for copies and their gradients.
        """
        self._every = 0
        self._history: History | None = None
        if config.placement == "home":
            return
        model, devices = config.model, blueprint.shape.expert
        layers = sum(layer.moe is not None for layer in model.layers())
        if devices == 1:
            raise UserError(
                "placement=auto on a mesh of expert=1: there is one place for all experts; take "
                "more devices along expert or leave it out"
            )
        self._experts = model.moe.router.num_experts
        self._controller = Controller(
            self._experts,
            layers,
            devices,
            hosts=hosts_along_experts(model.moe, devices, blueprint.hosts),
            replicas=config.replicas,
        )
        self._every, self._steps = config.rebalance_every, config.steps
        self._config, self._shape = config, blueprint.shape
        self._history = History(self._controller.slots_LP, devices)
        self._take()

    def is_due(self, step: int) -> bool:
        """Whether to look after this step; not after the last, since nobody would use it."""
        return self._every > 0 and step % self._every == 0 and step < self._steps

    def look(self, step: int, state: TrainState) -> None:
        """Plans from what was counted, and takes the plan for the steps to come.

        All processes count, process 0 plans, all take its plan.
        """
        assert state.counts is not None and self._history is not None
        statistics = read_counters(state.counts, self._mesh)
        counts = read_each(state.counts, self._mesh)
        slots_LP, told = self._controller.slots_LP, None
        if is_first():  # the search stops by the clock, so each process would find another plan
            told = self._controller.look(statistics)
        now = self._controller.slots_LP.tolist() if told and told.kind in _PLANNED else None
        now = from_first("placement", now)
        if now is not None:
            self._controller.slots_LP = np.array(now, np.int32)
            self._take()
        if told is None:
            return
        self._history.looked(step, slots_LP, statistics.pairs_LEE, statistics.load_LE, counts)
        row = {"step": step, **dataclasses.asdict(told), **self.metrics}
        self._run.append_placement(row)
        say(f"step {step}: placement: {in_words(told, _MORE)}")

    def finish(self) -> None:
        """Writes the placement and draws what it did, if it ever looked."""
        if self._history is None or not self._run.writable:
            return
        self._history.finish(self._run.placement_path, self._controller.slots_LP)

    def _take(self) -> None:
        controller = self._controller
        self.arrays = stacked(controller.slots_LP, self._experts, controller.max_replicas)
        topology = controller.topology
        waves = [fetch_traffic(slots_P, topology.devices).waves for slots_P in controller.slots_LP]
        crossings = fetch_collectives(self._config, self._shape, topology.slots, waves)
        self.metrics = {"expert_fetch_bytes": round(sum(c.sent for c in crossings))}
