"""Experts that move while texts are served: whose weights lie in which slots, and what goes next.

Shape letters: L layers with experts, E experts, G devices along `expert`, S slots of a device, P =
G·S.

Between two steps of the engine a few layers are carried to their new slots. The devices are only
told to; a layer's arrays change together with its weights, so each step finds experts where its
arrays say. Nothing but shapes is compiled, and S and R never change. Keys and values know nothing
of experts: texts under way go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.inference.placement_choice import PlacementChoice
from moejax.inference.request import PlacementStats
from moejax.placement.arrays import Placement, slots_at_home
from moejax.placement.background import BackgroundPlanner
from moejax.placement.controller import Rebalance, stacked
from moejax.placement.counting import Counts, begin_reading, fade, make_counters
from moejax.placement.history import History, in_words
from moejax.placement.migrate import Migrator
from moejax.placement.resident import make_resident, resident_blueprint
from moejax.placement.statistics import Statistics
from moejax.training.files import disk_errors
from moejax.training.metrics import MetricsLog
from sharding.mesh import in_turn

__all__ = ["LAYERS_PER_STEP", "ServingPlacement"]

LAYERS_PER_STEP = 2
"""Layers that are carried between two steps: a text waits for no more."""

_KEPT = 0.5  # of the counts, after a look that planned
_PATIENCE = 5.0  # seconds that an end waits for the layers being planned
_MORE = "more texts or a larger --rebalance-every bring more"


class ServingPlacement:
    """The weights of a model with its experts in slots, and what moves them.

    The engine's thread calls everything but `close`.

    blueprint: the model with its experts in slots.
    params: its weights now.
    arrays: of the placement they lie in, [L, …], on the devices.
    counters: of the experts that are chosen; None where nobody follows the traffic.

    Args:
        blueprint: model and mesh, experts at home, quantized or not.
        params: weights as from `load_weights`; the experts' are given up one array at a time.
        choice: from `choose_placement`.
        tell: gets a line now and then, from any thread.
        layers_per_step: see `LAYERS_PER_STEP`.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self,
        blueprint: Any,
        params: Any,
        choice: PlacementChoice,
        *,
        tell: Callable[[str], None] = print,
        layers_per_step: int = LAYERS_PER_STEP,
    ):
        self._mesh, self._devices = blueprint.mesh, blueprint.shape.expert
        self._experts: int = blueprint.config.moe.router.num_experts
        self._planner, self._every, self._line = choice.planner, choice.every, tell
        self._most = layers_per_step
        target_LP, replicas = self._beginning(choice)
        layers, slots = len(target_LP), target_LP.shape[1] // self._devices
        home_LP = np.tile(slots_at_home(self._experts, self._devices, slots), (layers, 1))
        self.blueprint = resident_blueprint(blueprint, slots)
        self._migrator = Migrator(self.blueprint)
        params = make_resident(params, blueprint, self.blueprint)
        if self._planner is not None:
            params = self._migrator.warm_up(params, home_LP)
        self.params = self._migrator.move(params, home_LP, target_LP)
        # Never written to: devices may still read what they were given.
        self._present_LP = self._target_LP = target_LP
        self._host = stacked(target_LP, self._experts, replicas)
        self.arrays = self._on_devices(self._host)
        self._tables: dict[int, Any] = {}
        """Of the layers that wait for being carried, in order."""
        self._steps = self._looked = self._looks = self._moved = self._since = 0
        self._seconds, self._told = 0.0, ""
        self._failed = self._looking = False
        self._history = History(target_LP, self._devices)
        self._log: MetricsLog | None = None
        self._folder = Path(choice.folder) if choice.folder else None
        if self._folder is not None:
            with disk_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            self._log = MetricsLog(self._folder / "placement.jsonl")
            self._log.append({"step": 0, "kind": "start"})  # a folder may be used again
        self.counters: Counts | None = None
        self.reset()
        if self.counters is not None:
            # Compiled now, not when texts wait.
            jax.block_until_ready(begin_reading(self.counters, self._mesh))
            self._fade()

    def reset(self) -> None:
        """Forgets what was counted: after a step has failed, the counters may be gone."""
        if self._planner is not None:
            made = make_counters(self._mesh, len(self._target_LP), self._experts)
            self.counters = jax.block_until_ready(made)

    def counted(self, counters: Counts | None) -> None:
        """Takes the counters as a step leaves them; it was given the old ones."""
        self.counters = counters

    def between_steps(self) -> None:
        """Takes what was planned, carries a few layers, looks at the traffic when it is time."""
        planner = self._planner
        if planner is None:
            return
        self._steps += 1
        layers, told = planner.take()
        if planner.failure is not None and not self._failed:
            self._failed, self._looking = True, False
            self._tell(
                f"placement: planning has failed, the traffic is followed no more: "
                f"{planner.failure!r}"
            )
        if layers:
            self._target_LP = self._target_LP.copy()
            for layer, slots_P, arrays in layers:
                self._target_LP[layer] = slots_P
                self._tables[layer] = arrays
        if told is not None:
            self._looking = False
            self._looks += 1
            self._seconds += told.seconds
            if told.kind != "waits":
                self._fade()
        idle = not self._looking and planner.failure is None
        if self._tables:
            self._carry()
        elif idle and self._steps - self._looked >= self._every:
            self._look(planner)
        if self._since and not self._tables and not self._looking:
            self._tell(
                f"step {self._steps}: placement: as planned; {self._since} experts have gone to a "
                "device that had them not"
            )
            self._since = 0

    def stats(self) -> PlacementStats:
        """What has been done."""
        planner = self._planner
        return PlacementStats(
            following=planner is not None and planner.failure is None,
            looks=self._looks,
            experts_moved=self._moved,
            copies=int((self._present_LP >= 0).sum()) - self._experts * len(self._present_LP),
            layers_waiting=len(self._tables),
            planner_seconds=self._seconds,
        )

    def close(self) -> None:
        """Ends the planning, and writes and draws what it led to; when no step comes any more."""
        if self._planner is None:
            return
        ended = self._planner.stop(_PATIENCE)
        if self._folder is not None and ended:
            try:
                self._history.finish(self._folder / "placement.png", self._target_LP)
            except UserError as error:
                self._tell(f"placement: {error}")
        self._close_log()

    def _tell(self, line: str) -> None:
        """A line; whoever reads them may be gone, which is no reason to serve no more."""
        with contextlib.suppress(OSError, ValueError):
            self._line(line)

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _beginning(self, choice: PlacementChoice) -> tuple[np.ndarray, int]:
        """The slots to begin with, and R."""
        if choice.planner is not None:
            return choice.planner.slots_LP, choice.planner.max_replicas
        assert choice.slots_LP is not None
        copies = [np.bincount(slots_P[slots_P >= 0]).max() for slots_P in choice.slots_LP]
        return choice.slots_LP, int(max(copies))

    def _look(self, planner: BackgroundPlanner) -> None:
        """Begins to plan from what was counted; the devices bring it when they get to it."""
        assert self.counters is not None
        self._looked = self._steps
        reading = in_turn(self._mesh, begin_reading(self.counters, self._mesh))
        counts: list[Counts] = []

        def read() -> Statistics:
            total, each = jax.device_get(reading)
            counts.append(each)
            return Statistics(total.pairs_LEE, total.load_LE, total.tokens_L)

        done = partial(self._note_look, self._steps, self._present_LP, counts)
        self._looking = planner.begin(read, done)

    def _note_look(
        self,
        step: int,
        slots_LP: np.ndarray,
        counts: list[Counts],
        statistics: Statistics,
        told: Rebalance,
    ) -> None:
        """In the planner's thread: a line, and what the picture will show."""
        # A server looks for weeks: what repeats itself is not told.
        if told.kind != "none" and told.kind != self._told:
            self._tell(f"step {step}: placement: {in_words(told, _MORE)}")
        self._told = told.kind if told.kind == "waits" else ""
        self._history.looked(step, slots_LP, statistics.pairs_LEE, statistics.load_LE, counts[0])
        try:
            if self._log is not None:
                self._log.append({"step": step, **asdict(told)})
        except UserError as error:  # a full disk
            self._close_log()
            self._tell(f"placement: nothing more is logged: {error}")

    def _carry(self) -> None:
        """Moves the layers that wait longest, and the arrays that say where they are."""
        chosen = list(self._tables)[: self._most]
        old_LP, new_LP = self._present_LP, self._present_LP.copy()
        new_LP[chosen] = self._target_LP[chosen]
        self.params = self._migrator.move(self.params, old_LP, new_LP, chosen)
        fields = [array.copy() for array in jax.tree.leaves(self._host)]
        for layer in chosen:
            for array, row in zip(fields, self._tables.pop(layer), strict=True):
                array[layer] = row
            moved = _arrivals(old_LP[layer], new_LP[layer], self._devices)
            self._moved, self._since = self._moved + moved, self._since + moved
        self._host, self._present_LP = Placement(*fields), new_LP
        self.arrays = self._on_devices(self._host)

    def _fade(self) -> None:
        assert self.counters is not None
        self.counters = in_turn(self._mesh, fade(self.counters, self._mesh, _KEPT))

    def _on_devices(self, arrays: Placement) -> Placement:
        return jax.device_put(arrays, NamedSharding(self._mesh, P()))


def _arrivals(old_P: np.ndarray, new_P: np.ndarray, devices: int) -> int:
    """Experts that come to a device which has them not, copies included."""
    pairs = zip(old_P.reshape(devices, -1), new_P.reshape(devices, -1), strict=True)
    return sum(len(np.setdiff1d(new_S, [-1, *old_S])) for old_S, new_S in pairs)
