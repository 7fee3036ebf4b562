"""What a training step holds on a device: state by its layout, activations from the traced step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moejax.config import LayerConfig
from moejax.exchange.budget import Budget
from moejax.exchange.wire import row_bytes
from moejax.model.groups import layer_groups
from moejax.placement.arrays import num_slots
from moejax.training.config import TrainConfig
from sharding.compression.reduction import Reducer
from sharding.liveness import kept_for_backward, most_in_backward, recomputed_at_once
from sharding.mesh import AXES, MeshShape
from sharding.traffic_formulas import (
    item_size,
    layer_budget,
    local_elements,
    tokens_at_once,
    variables_of,
)

__all__ = ["Memory", "least_activations", "memory_of"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    masters: float32 weights, as stored (split over `data` too).
    moments: Adam's two, stored alike.
    weights: the gathered weights in their compute dtype, where they are not the masters.
    residuals: what compressed gradients keep from step to step.
    gradients: whole local gradients, the float32 sums under accumulation, reduced pieces, and what
        the largest of the compressed ones needs on its way. A gradient that no other device has a
        part of is cast as the optimizer reads it, where `balance` may be negative.
    kept: activations kept from forward to backward under the remat policy, and the matrices that
        were made for experts that share parameters.
    working: the same of the one piece that is being recomputed for its backward.
    exchange: buckets of one MoE layer: dispatched and combined rows, sent and received.
    logits: of the tokens whose loss is computed at once, and their gradient; float32. And the sum
        of the head's gradient over them, where weights are not float32.
    balance: what the fullest moment of the backward needs, less the sum of gradients, kept, working
        and logits. Negative where some of these are never there at the same time: where no loop
        runs layers and no device has a part of them, what is kept for one is free when its
        gradients are made. Positive where what is on the way from one to the other needs more.
    """

    masters: int
    moments: int
    residuals: int
    weights: int
    gradients: int
    kept: int
    working: int
    exchange: int
    logits: int
    balance: int = 0

    @property
    def total(self) -> int:
        """The sum: exact for masters, moments and residuals, an estimate for the rest."""
        return sum(vars(self).values())

    def at_least(self, activations: float) -> float:
        """The least that the total of a step is, of which this is known without a trace.

        Args:
            activations: that `kept` and `working` have at least.
        """
        without = self.total - self.gradients - self.logits - self.balance
        together = self.gradients + self.logits + activations + self.balance
        return without + max(self.gradients, together)


def memory_of(
    config: TrainConfig,
    mesh: MeshShape,
    params: Any,
    storage: Any,
    jaxpr: Any,
    reducer: Reducer,
    *,
    fused_attention: bool = False,
) -> Memory:
    """Bytes a training step holds on each device.

    Args:
        config: the run.
        mesh: sizes of the axes.
        params, storage: of the `Blueprint`.
        jaxpr: of the step, without dead code; None leaves out what only it tells, the activations,
            and counts nothing twice that they may take the place of: see `Memory.at_least`.
        reducer: of its gradients.
        fused_attention: a kernel computes attention that never stores the S × S scores, which the
            traced program has.
    """
    scores = config.data.seq_len if fused_attention else None
    # A loop makes room for all of its results at once, and copies. What crosses between devices
    # has buffers beside those that the trace tells: so much that less than the sum was too little.
    looped = any(group.scanned for group in layer_groups(config.model))
    apart = not looped and mesh.expert * mesh.tensor == 1
    masters = weights = local = pieces = sums = crossing = 0
    item = item_size(config.model)
    for (shape, stored), leaf in zip(variables_of(params, storage), reducer.leaves, strict=True):
        size = local_elements(shape, stored, mesh)
        piece = size // (1 if stored.dim is None else mesh.data)
        used = 4 if stored.dtype else item
        masters += 4 * piece
        same = stored.dim is None and used == 4
        weights += 0 if same else used * size
        local += used * size
        alone = math.prod(dict(zip(AXES, mesh.sizes))[axis] for axis in leaf.axes) == 1
        pieces += 0 if same or (alone and apart) else 4 * piece
        sums += 4 * size if config.accumulate > 1 else 0
        # What one compressed gradient sends, receives, and sums up.
        on_the_way = sum(2 * sent[2] for sent in reducer.crossings(leaf) or ())
        crossing = max(crossing, on_the_way and on_the_way + 4 * size)
    tokens = tokens_at_once(config, mesh)
    at_once = min(tokens, config.loss_chunk or tokens)
    logits = 2 * 4 * at_once * config.model.padded_vocab // mesh.tensor
    if item != 4:
        logits += 4 * config.model.d_model * config.model.padded_vocab // mesh.tensor
    traced = kept = working = most = 0
    if jaxpr is not None:
        traced = kept = kept_for_backward(jaxpr, scores)
        working = recomputed_at_once(jaxpr, scores)
        growth = (local + pieces) / max(local, 1) if apart else 1.0
        most = most_in_backward(jaxpr, scores, growth=growth)
    if config.model.remat == "local":
        kept += _kept_by_kernels(config, mesh)
    copies = _shared_copies(config, mesh)
    if config.model.remat == "none":
        kept += sum(copies)
    else:
        working += max(copies, default=0)
    whole = local + pieces
    balance = -whole if apart else 0
    if jaxpr is not None:
        # What is in no trace is alive all the time.
        most += kept - traced + (0 if config.model.remat == "none" else max(copies, default=0))
        most += 0 if apart or looped else pieces
        held = max(kept + logits + working, most, whole)
        balance = held - (whole + kept + working + logits)
        balance = balance if apart else max(balance, 0)
    return Memory(
        masters=masters,
        moments=2 * masters,
        residuals=reducer.state_bytes,
        weights=weights,
        gradients=whole + sums + crossing,
        kept=kept,
        working=working,
        exchange=_exchange_bytes(config, tokens, mesh.expert),
        logits=logits,
        balance=balance,
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


def _kept_by_kernels(config: TrainConfig, mesh: MeshShape) -> int:
    """What `remat="local"` keeps besides in mode `remote`, whose kernels the traced program lacks.

    The kernel that writes rows also multiplies them, so the experts' projections and the outputs
    are kept with the rows.
    """
    tokens, kept = tokens_at_once(config, mesh), 0
    for layer in config.model.layers():
        if layer.moe is not None and layer_budget(layer, tokens, mesh.expert).mode == "remote":
            experts = layer.moe.experts
            hidden = experts.num_in * experts.hidden // mesh.tensor
            projections = layer.moe.router.top_k * hidden * item_size(config.model)
            kept += tokens * (projections + 4 * layer.d_model)
    return kept


def _shared_copies(config: TrainConfig, mesh: MeshShape) -> list[int]:
    """Bytes of input projections that are there once and that kernels read for each slot, by layer.

    The traced program has them as a broadcast, which counts as its operand. What experts make of
    shared parameters in other ways it has as new values.
    """
    copies = []
    for layer in config.model.layers():
        if layer.moe is not None and layer.moe.experts.sharing.kind == "in":
            experts = layer.moe.experts
            slots = num_slots(layer.moe.router.num_experts, mesh.expert)
            one = layer.d_model * experts.num_in * experts.hidden // mesh.tensor
            copies.append(slots * one * item_size(config.model))
    return copies


def least_activations(config: TrainConfig, mesh: MeshShape, *, fused_attention: bool) -> int:
    """Bytes that `Memory.kept` and `Memory.working` have at least, by formula.

    What goes into each layer; and of all layers, or of the one that is recomputed, queries, keys,
    values, the experts' projections, and scores where attention is not fused.
    """
    model, item = config.model, item_size(config.model)
    tokens = tokens_at_once(config, mesh)
    inputs = inside = largest = 0
    for layer in model.layers():
        inputs += tokens * layer.d_model
        attention, latent = layer.attention, layer.attention.latent
        heads = attention.num_heads // mesh.tensor
        one = 0
        if latent is None:
            both = heads + 2 * (attention.num_kv_heads // mesh.tensor)
            one += tokens * both * attention.head_dim
            if not fused_attention and not attention.sinks:
                one += tokens * heads * config.data.seq_len
        if layer.moe is not None:
            experts = layer.moe.experts
            hidden = experts.num_in * experts.hidden // mesh.tensor
            one += tokens * layer.moe.router.top_k * hidden
        inside, largest = inside + one, max(largest, one)
    return item * (inputs + (inside if model.remat == "none" else largest))
