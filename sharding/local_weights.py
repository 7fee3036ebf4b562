"""How many numbers of a model's parameters a device has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import nnx

from moejax.model.groups import layer_groups
from moejax.training.config import TrainConfig
from sharding.mesh import MeshShape
from sharding.traffic_formulas import local_elements, variables_of

__all__ = ["Weights", "weights_of"]


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters on a device.

    used: whole, as products use them.
    stored: pieces of them that masters and moments are kept of.
    scanned: those used of layers that one loop runs.
    """

    used: int
    stored: int
    scanned: int


def weights_of(config: TrainConfig, mesh: MeshShape, params: nnx.State, storage: Any) -> Weights:
    """Counts a `Blueprint`'s parameters on a device of this mesh."""
    used = stored = 0
    for shape, how in variables_of(params, storage):
        size = local_elements(shape, how, mesh)
        used += size
        stored += size // (1 if how.dim is None else mesh.data)
    scanned = {group.name for group in layer_groups(config.model) if group.scanned}
    inside = 0
    if scanned:
        layers = params["layers"], storage["layers"]
        for name in scanned:
            variables = variables_of(*(part[name] for part in layers))
            inside += sum(local_elements(shape, how, mesh) for shape, how in variables)
    return Weights(used, stored, inside)
