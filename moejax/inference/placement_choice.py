"""What a user says of where experts live while a model is served, checked before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.layer import hosts_along_experts
from moejax.placement.arrays import host_arrays
from moejax.placement.background import BackgroundPlanner
from moejax.placement.plan_file import read_slots
from sharding.mesh import MeshShape

__all__ = ["PlacementChoice", "choose_placement"]


@dataclass(frozen=True)
class PlacementChoice:
    """Where experts go: to a plan's slots, or after their traffic.

    slots_LP: int32 [L, G·S], the expert in each slot; None to follow the traffic.
    planner: that follows it; None with slots.
    every: steps of the engine between two looks at the traffic.
    folder: for what is written about it; empty: nothing is.
    """

    slots_LP: np.ndarray | None = None
    planner: BackgroundPlanner | None = None
    every: int = 1000
    folder: str = ""

    def slots(self, devices: int) -> int:
        """S, of each of so many devices."""
        slots_LP = self.slots_LP
        if slots_LP is None:
            assert self.planner is not None
            slots_LP = self.planner.slots_LP
        return slots_LP.shape[1] // devices


def choose_placement(
    placement: str,
    config: ModelConfig,
    shape: MeshShape,
    *,
    replicas: int = 0,
    every: int = 1000,
    folder: str = "",
    deterministic: bool = False,
) -> PlacementChoice | None:
    """Reads `--placement`; None for `home`.

    Args:
        placement: `home`, `auto`, or a file of `python -m moejax.placement plan`.
        config: the model.
        shape: of the mesh.
        replicas: slots of each device for copies of experts, with `auto`.
        every, folder: see `PlacementChoice`.
        deterministic: a text's bits must not depend on other texts.

    Raises:
        UserError: it does not fit the model or the mesh.
    """
    if placement == "home":
        return None
    name, devices = f"--placement {placement}", shape.expert
    config.check_equal_experts(name)
    sharing = config.moe.experts.sharing
    if sharing.active:
        raise UserError(
            f"{name} with experts that share parameters (sharing kind={sharing.kind!r}): slots "
            "hold whole experts; make them independent first (moejax.compress.sharing."
            "expand_model), or leave it out"
        )
    layers = sum(layer.moe is not None for layer in config.layers())
    if not layers:
        raise UserError(f"{name}: the model has no layer with experts; leave it out")
    if devices == 1:
        raise UserError(
            f"{name} on a mesh of expert=1: there is one place for all experts; take more devices "
            "along expert or leave it out"
        )
    if placement != "auto":
        slots_LP = _of_file(placement, config, layers, devices)
        if deterministic and _copies(slots_LP, config):
            raise UserError(
                f"{name} with --deterministic: which copy of an expert serves a text depends on "
                "the texts beside it; take a plan without copies"
            )
        return PlacementChoice(slots_LP)
    if jax.process_count() > 1:
        raise UserError(
            f"{name} with {jax.process_count()} processes: each would plan for itself; leave it out"
        )
    planner = BackgroundPlanner(
        config.moe.router.num_experts,
        layers,
        devices,
        hosts=hosts_along_experts(config.moe, devices, None),
        replicas=replicas,
    )
    return PlacementChoice(planner=planner, every=every, folder=folder)


def _of_file(path: str, config: ModelConfig, layers: int, devices: int) -> np.ndarray:
    """int32 [L, G·S] of a plan that fits."""
    slots_LP, planned = read_slots(path)
    if (len(slots_LP), planned) != (layers, devices):
        raise UserError(
            f"--placement {path}: a plan of {len(slots_LP)} layers on {planned} devices, for "
            f"{layers} layers with experts on expert={devices}: plan for this model and mesh"
        )
    for slots_P in slots_LP:
        try:
            host_arrays(slots_P, config.moe.router.num_experts)
        except UserError as error:
            raise UserError(f"--placement {path}: {error}") from None
    return slots_LP


def _copies(slots_LP: np.ndarray, config: ModelConfig) -> int:
    return int((slots_LP >= 0).sum()) - config.moe.router.num_experts * len(slots_LP)
