"""Runs of equal layers: which layers are scanned together, and how their parameters stack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import LayerConfig, ModelConfig

__all__ = ["LayerGroup", "change_blocks", "layer_groups", "lead_specs", "stack_states"]


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


def change_blocks(
    model: Any,
    groups: Iterable[LayerGroup],
    change: Callable[[Any], None],
    new: type[nnx.Variable] | None = None,
) -> None:
    """Changes the layers of some groups, stacked or not; of shapes alone, no value is computed.

    Args:
        model: with `layers` by the groups' names, of shapes.
        groups: which of them.
        change: of one layer, in place.
        new: kind of the variables that it makes anew; others know already that they are stacked.
    """
    for group in groups:
        before, state = nnx.split(model.layers[group.name])
        after: Any = None

        def changed(state: nnx.State, before: Any = before) -> nnx.State:
            nonlocal after
            block = nnx.merge(before, state)
            change(block)
            after, state = nnx.split(block)
            return state

        made = jax.eval_shape(jax.vmap(changed) if group.scanned else changed, state)
        if group.scanned and new is not None:
            made = lead_specs(made, new)
        model.layers[group.name] = nnx.merge(after, made)
