"""Where a run computes its experts: looks at the traffic now and then, and follows it.

Masters and moments stay at home (`moejax.placement.fetch`): a look changes the arrays that the next
steps get, and nothing is compiled or stored anew.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from moejax.errors import UserError
from moejax.layer import hosts_along_experts
from moejax.placement.arrays import Placement
from moejax.placement.controller import LEAST_TOKENS, Controller, Rebalance, stacked
from moejax.placement.counting import Counts, read_counters
from moejax.placement.fetch import fetch_traffic
from moejax.placement.pictures import draw_placement
from moejax.placement.plan_file import write_slots
from moejax.training.config import TrainConfig
from moejax.training.rundir import RunDir
from moejax.training.state import Blueprint, TrainState
from sharding.traffic_formulas import fetch_collectives

__all__ = ["Placing"]


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
        self._last: tuple[np.ndarray, Any] | None = None
        if config.placement == "home":
            return
        model, devices = config.model, blueprint.shape.expert
        layers = sum(layer.moe is not None for layer in model.layers())
        if devices == 1:
            raise UserError(
                "placement=auto on a mesh of expert=1: there is one place for all experts; take "
                "more devices along expert or leave it out"
            )
        if jax.process_count() > 1:
            raise UserError(
                f"placement=auto with {jax.process_count()} processes: each would plan for itself; "
                "leave it out"
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
        self._looks: list[tuple[int, np.ndarray, np.ndarray]] = []  # step, slots until it, load
        self._first_LP = self._controller.slots_LP
        self._take()

    def is_due(self, step: int) -> bool:
        """Whether to look after this step; not after the last, since nobody would use it."""
        return self._every > 0 and step % self._every == 0 and step < self._steps

    def look(self, step: int, state: TrainState) -> None:
        """Plans from what was counted, and takes the plan for the steps to come."""
        assert state.counts is not None
        statistics = read_counters(state.counts, self._mesh)
        slots_LP = self._controller.slots_LP
        told = self._controller.look(statistics)
        self._looks.append((step, slots_LP, statistics.load_LE))
        self._last = statistics.pairs_LEE, jax.device_get(state.counts)
        if told.kind in ("plan", "moves"):
            self._take()
        row = {"step": step, **dataclasses.asdict(told), **self.metrics}
        self._run.append_placement(row)
        print(f"step {step}: placement: {_in_words(told)}", flush=True)

    def finish(self) -> None:
        """Writes the placement and draws what it did, if it ever looked."""
        if self._last is None or not self._run.writable:
            return
        controller, (pairs_LEE, counts) = self._controller, self._last
        slots_path = self._run.placement_path.with_suffix(".npz")
        write_slots(slots_path, controller.slots_LP, controller.topology.devices)
        devices = controller.topology.devices
        layer = int(pairs_LEE.sum((1, 2)).argmax())
        orders = [
            (f"chosen together, layer {layer}: at home", self._first_LP[layer]),
            ("as placed", controller.slots_LP[layer]),
        ]
        draw_placement(
            self._run.placement_path,
            pairs_LEE[layer],
            [(title, slots_P.reshape(devices, -1)) for title, slots_P in orders],
            np.stack([_device_loads(load, slots, devices) for _, slots, load in self._looks]),
            [step for step, _, _ in self._looks],
            [
                (f"assignments a token, {name}", _links(counts, slots_LP, devices))
                for name, slots_LP in (("at home", self._first_LP), ("placed", controller.slots_LP))
            ],
        )

    def _take(self) -> None:
        controller = self._controller
        self.arrays = stacked(controller.slots_LP, self._experts, controller.max_replicas)
        topology = controller.topology
        waves = [fetch_traffic(slots_P, topology.devices).waves for slots_P in controller.slots_LP]
        crossings = fetch_collectives(self._config, self._shape, topology.slots, waves)
        self.metrics = {"expert_fetch_bytes": round(sum(c.sent for c in crossings))}


def _in_words(told: Rebalance) -> str:
    if told.kind == "waits":
        return (
            f"{told.tokens:.0f} tokens counted, {LEAST_TOKENS:.0f} are needed; raise "
            "--rebalance-every or --placement-stats-window if it stays so"
        )
    return (
        f"{told.moved} experts moved, {told.replicas} copies; not counting copies: pairs apart "
        f" {told.cut[0]:.3f} → {told.cut[1]:.3f}, load {told.load[0]:.2f} → "
        f"{told.load[1]:.2f} times the mean; {told.seconds:.2f} s"
    )


def _shares(slots_LP: np.ndarray, devices: int, experts: int) -> np.ndarray:
    """[L, E, G]: the part of an expert's assignments on each device, copies taken to be even."""
    has_LEG = np.zeros((len(slots_LP), experts, devices))
    for layer, slots_GS in enumerate(slots_LP.reshape(len(slots_LP), devices, -1)):
        for device, slots_S in enumerate(slots_GS):
            has_LEG[layer, slots_S[slots_S >= 0], device] = 1
    return has_LEG / has_LEG.sum(2, keepdims=True)


def _device_loads(load_LE: np.ndarray, slots_LP: np.ndarray, devices: int) -> np.ndarray:
    """[G], mean over layers; 1 is the mean device."""
    shares_LEG = _shares(slots_LP, devices, load_LE.shape[1])
    load_LG = np.einsum("le,leg->lg", load_LE, shares_LEG)
    return (load_LG / np.maximum(load_LG.mean(1, keepdims=True), 1e-30)).mean(0)


def _links(counts: Counts, slots_LP: np.ndarray, devices: int) -> np.ndarray:
    """[G, G] assignments from a device to another, a token of the source, mean over layers.

    The mesh's tokens lie over `data` × `expert`; sources with the same place along `expert` are
    added up. A copy on the source itself takes all of its assignments.
    """
    load_DLE, tokens_DL = np.asarray(counts.load_LE), np.asarray(counts.tokens_L)
    load_GLE = load_DLE.reshape(-1, devices, *load_DLE.shape[1:]).sum(0)
    tokens_G = tokens_DL.reshape(-1, devices, tokens_DL.shape[1]).sum((0, 2))
    shares_LEG = _shares(slots_LP, devices, load_DLE.shape[2])
    links_GG = np.zeros((devices, devices))
    for source, load_LE in enumerate(load_GLE):
        here_LE1 = shares_LEG[:, :, source, None] > 0
        itself_G = np.arange(devices) == source
        goes_LEG = np.where(here_LE1, itself_G, shares_LEG)
        per_token = load_LE / max(float(tokens_G[source]), 1e-30)
        links_GG[source] = np.einsum("le,leg->g", per_token, goes_LEG)
    return links_GG
