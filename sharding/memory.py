"""What a training step holds on a device: state by its layout, activations from the traced step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Literal

from moejax.config import LayerConfig
from moejax.exchange.budget import Budget
from moejax.exchange.wire import row_bytes
from moejax.training.config import TrainConfig
from sharding.mesh import MeshShape
from sharding.traffic import inner_jaxprs, where
from sharding.traffic_formulas import (
    item_size,
    layer_budget,
    local_elements,
    tokens_at_once,
    variables_of,
)

__all__ = ["Memory", "kept_for_backward", "memory_of", "recomputed_at_once"]

ALIASES = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "reshape",
    "squeeze",
    "transpose",
}
"""Primitives whose result a compiler need not store beside their operand."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    masters: float32 weights, as stored (split over `data` too).
    moments: Adam's two, stored alike.
    weights: the gathered weights in their compute dtype, where they are not the masters.
    gradients: whole local gradients, the float32 sums under accumulation, and reduced pieces.
    kept: activations kept from forward to backward under the remat policy.
    working: activations of the one piece that is being recomputed for its backward.
    exchange: buckets of one MoE layer: dispatched and combined rows, sent and received.
    logits: of the tokens whose loss is computed at once, and their gradient; float32.
    """

    masters: int
    moments: int
    weights: int
    gradients: int
    kept: int
    working: int
    exchange: int
    logits: int

    @property
    def total(self) -> int:
        """The sum: exact for masters and moments, an estimate for the rest.

        Some of it is never alive together, temporary values inside a layer are left out.
        """
        return sum(vars(self).values())


def memory_of(
    config: TrainConfig, mesh: MeshShape, params: Any, storage: Any, jaxpr: Any
) -> Memory:
    """Bytes a training step holds on each device.

    Args:
        config: the run.
        mesh: sizes of the axes.
        params, storage: of the `Blueprint`.
        jaxpr: of the step, without dead code.
    """
    masters = weights = gradients = 0
    item = item_size(config.model)
    for shape, stored in variables_of(params, storage):
        size = local_elements(shape, stored, mesh)
        piece = size // (1 if stored.dim is None else mesh.data)
        used = 4 if stored.dtype else item
        masters += 4 * piece
        same = stored.dim is None and used == 4
        weights += 0 if same else used * size
        gradients += used * size + (0 if same else 4 * piece)
        gradients += 4 * size if config.accumulate > 1 else 0
    tokens = tokens_at_once(config, mesh)
    at_once = min(tokens, config.loss_chunk or tokens)
    logits = 4 * at_once * config.model.padded_vocab // mesh.tensor
    kept = kept_for_backward(jaxpr) - (logits if at_once == tokens else 0)
    return Memory(
        masters=masters,
        moments=2 * masters,
        weights=weights,
        gradients=gradients,
        kept=max(kept, 0),
        working=recomputed_at_once(jaxpr),
        exchange=_exchange_bytes(config, tokens, mesh.expert),
        logits=2 * logits,
    )


def _exchange_bytes(config: TrainConfig, tokens: int, devices: int) -> int:
    largest = 0
    for layer in config.model.layers():
        if layer.moe is None or devices == 1:
            continue
        budget = layer_budget(layer, tokens, devices)
        both = _buckets(config, layer, budget)
        if budget.inside is not None:
            both += _buckets(config, layer, budget.inside)
        largest = max(largest, budget.chunks * both)
    return largest


def _buckets(config: TrainConfig, layer: LayerConfig, budget: Budget) -> int:
    """Bytes of what one chunk sends and receives, both ways."""
    sizes = row_bytes(layer.d_model, config.model.compute_dtype, budget.copies, budget.wire)
    sent = budget.tokens if budget.mode == "ring" else budget.received_rows
    received = budget.received_rows
    return (sent + received) * sizes[0] + 2 * received * sizes[1]


def kept_for_backward(jaxpr: Any) -> int:
    """Bytes computed in the forward of a step and read in its backward, weights left out.

    Counts the traced program, in which nothing is fused: what a compiler prefers to compute twice
    is counted as kept.
    """
    for level in _levels(jaxpr):
        if any("transpose(" in _stack(eqn) for eqn in level.eqns):
            return _crossing_bytes(level, lambda stack: "transpose(" not in stack)
    return 0


def recomputed_at_once(jaxpr: Any) -> int:
    """The same for the largest piece that the backward computes again: what that piece holds.

    Pieces are a rematerialised layer or chunk of the loss, and a further wave of an exchange.
    """
    found, outermost = [0], True
    for level in _levels(jaxpr):
        stacks = [_stack(eqn) for eqn in level.eqns]
        if any("rematted_computation" in stack for stack in stacks):
            found.append(_crossing_bytes(level, lambda stack: "rematted_computation" in stack))
        elif any("transpose(" in stack for stack in stacks):
            if not outermost:
                found.append(_crossing_bytes(level, lambda stack: "transpose(" not in stack))
            outermost = False
    return max(found)


def _stack(eqn: Any) -> str:
    return str(eqn.source_info.name_stack)


def _levels(jaxpr: Any) -> list[Any]:
    """A jaxpr and all it holds, outer ones first."""
    levels, next_ = [], [jaxpr]
    while next_:
        levels += next_
        next_ = [inner for level in next_ for eqn in level.eqns for inner in inner_jaxprs(eqn)]
    return levels


def _crossing_bytes(jaxpr: Any, early: Callable[[str], bool]) -> int:
    """Bytes of distinct values that early equations make and the others read."""
    root: dict[Any, Any] = {}  # where an alias chain starts; nothing for values from outside
    crossing: dict[Any, int] = {}
    for eqn in jaxpr.eqns:
        if not early(_stack(eqn)):
            for var in eqn.invars:
                if not isinstance(var, Literal) and var in root:
                    source = root[var]
                    size = min(_size(var), _size(source))
                    crossing[source] = max(crossing.get(source, 0), size)
            continue
        operand = eqn.invars[0] if eqn.primitive.name in ALIASES else None
        for var in [] if where(eqn) == "weight gather" else eqn.outvars:
            if operand is None:
                root[var] = var
            elif not isinstance(operand, Literal) and operand in root:
                root[var] = root[operand]
    return sum(crossing.values())


def _size(var: Any) -> int:
    # A mask is a comparison away from what it was made of, so it is made again.
    return 0 if var.aval.dtype == bool else var.aval.size * var.aval.dtype.itemsize
