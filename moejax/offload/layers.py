"""Layers of a model whose experts lie on the host: what each has, and which are alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from moejax.offload.experts import OffloadedExperts
from moejax.offload.halves import Kind, Weights
from moejax.offload.parts import Structure, same_but_layer
from moejax.offload.probes import LinearProbe, RouterProbe

__all__ = ["HostedLayer", "split_layers"]


@dataclass(frozen=True)
class HostedLayer:
    """A layer of the model.

    name: of its pages.
    at: its number among layers with experts; None without.
    weights: all but the experts'.
    probe: weights of what guesses the next layer's choice; None where nothing does.
    kind: which programs it has.
    """

    name: str
    at: int | None
    weights: Weights
    probe: Any
    kind: int


def split_layers(
    model: Any, groups: Sequence[Any], experts: OffloadedExperts, here: NamedSharding
) -> tuple[list[HostedLayer], list[Kind]]:
    """The layers of a model, and the kinds that there are.

    Args:
        model: without banks.
        groups: its layers, each a group of its own.
        experts: what was in the banks.
        here: where fitted probes are put.
    """
    numbers = {index: number for number, index in enumerate(experts.layers)}
    seen: dict[Hashable, int] = {}
    layers: list[HostedLayer] = []
    kinds: list[Kind] = []
    for group in groups:
        block, weights = Structure.of(model.layers[group.name])
        at = numbers.get(group.start)
        bank, slots, probe, probe_weights = None, 0, None, None
        if at is not None:
            bank, slots = experts.store.banks[group.start], experts.room.slots_L[at]
            probe, probe_weights = _probe(model, experts, at, here)
        same = (block, None if bank is None else same_but_layer(bank), slots, probe)
        if same not in seen:
            seen[same] = len(kinds)
            top_k = 0 if group.layer.moe is None else group.layer.moe.router.top_k
            kinds.append(Kind(block, bank, slots, experts.room.wave, probe, top_k))
        layers.append(HostedLayer(group.name, at, weights, probe_weights, seen[same]))
    return layers, kinds


def _probe(model: Any, experts: OffloadedExperts, at: int, here: NamedSharding) -> tuple[Any, Any]:
    """What guesses the choice of the layer after the one numbered so, and its weights."""
    config, layers = experts.config, experts.layers
    if at + 1 == len(layers):
        return None, None
    if config.predictor == "routers":
        return RouterProbe.of(model.layers[str(layers[at + 1])])
    if config.predictor == "linear":
        assert config.fits is not None
        found = config.fits.linear(at, 1)
        if found is not None:
            return LinearProbe(experts.experts_L[at + 1]), jax.device_put(found, here)
    return None, None
