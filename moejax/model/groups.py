"""Runs of equal layers: which layers are scanned together, and how their parameters stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import LayerConfig, ModelConfig

__all__ = ["LayerGroup", "layer_groups", "lead_specs", "stack_states"]


@dataclass(frozen=True)
class LayerGroup:
    """Layers `start` up to `stop`, all equal; more than one are scanned and so stacked."""

    start: int
    stop: int
    layer: LayerConfig

    @property
    def size(self) -> int:
        """Number of layers."""
        return self.stop - self.start

    @property
    def scanned(self) -> bool:
        """Whether the parameters carry a leading layer dimension."""
        return self.size > 1

    @property
    def name(self) -> str:
        """`"3"` for a single layer, `"3:7"` for the stacked layers 3 to 6."""
        return f"{self.start}:{self.stop}" if self.scanned else str(self.start)


def layer_groups(config: ModelConfig) -> tuple[LayerGroup, ...]:
    """The layers of a model in order, equal neighbours together if `config.scan_layers`."""
    layers = config.layers()
    if not config.scan_layers:
        return tuple(LayerGroup(i, i + 1, layer) for i, layer in enumerate(layers))
    groups, start = [], 0
    for layer, run in groupby(layers):
        stop = start + len(list(run))
        groups.append(LayerGroup(start, stop, layer))
        start = stop
    return tuple(groups)


def stack_states(states: Sequence[nnx.State]) -> nnx.State:
    """Stacks the variables of equal layers: values [L, ...], specs with a leading None."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return lead_specs(stacked)


def lead_specs(state: nnx.State, kind: type[nnx.Variable] = nnx.Variable) -> nnx.State:
    """The variables of stacked layers: specs get a leading None, those of `kind` alone."""

    def lead(variable: nnx.Variable) -> nnx.Variable:
        spec = variable.get_metadata().get("spec")
        if spec is None or not isinstance(variable, kind):
            return variable
        return variable.replace(spec=P(None, *spec))

    return nnx.from_flat_state([(path, lead(v)) for path, v in nnx.to_flat_state(state)])
