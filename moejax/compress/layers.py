"""A stored model layer by layer: a layer's weights, and running texts through it.

One layer of a folder is on the host at a time, so that models larger than the memory can be
compressed; a run's checkpoint is restored whole. A layer runs in float32 on one device.

Shape letters: W windows of text, S tokens of a window, D model width, T = W · S.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32, Int

from moejax.compress.experts import LayerExperts, LayerRouter, Sample
from moejax.config import ExchangeConfig, LayerConfig, LocalityConfig, ModelConfig
from moejax.inference.source import ModelSource
from moejax.model.block import Block
from moejax.training.state import Blueprint
from moejax.training.streaming import LazyWeight, WeightStream
from sharding.mesh import MeshShape, make_mesh

__all__ = [
    "LayerRunner",
    "Passed",
    "StoredLayers",
    "bank_of",
    "experts_of",
    "replaced",
    "router_of",
    "table_of",
    "whole_name",
]

_BANK = "params/moe.bank."
_ROUTER = "params/moe.router."
_SELECTION = "bias/moe.router.selection_bias_E"
_TABLE = "bias/moe.router.table_R"
_TOGETHER = 4096  # tokens that run at once

Weights = Mapping[str, np.ndarray]
"""A layer's by name: `params/attention.w_q`, `bias/moe.router.selection_bias_E`."""


class StoredLayers:
    """The weights of a stored model, in float32, read when they are asked for.

    Args:
        source: the model.

    Attributes:
        config: the model, its layers not scanned.
        names: of all weights, in logical order, such as `params/layers.3.attention.w_q`.
    """

    def __init__(self, source: ModelSource) -> None:
        self.config = dataclasses.replace(source.config, scan_layers=False, compute_dtype="float32")
        self._stream = WeightStream(source, Blueprint(self.config, make_mesh(MeshShape())))
        self.names = list(self._stream.targets)

    def read(self, name: str) -> np.ndarray:
        """One weight."""
        return np.asarray(self._stream.read(name))

    def weight(self, name: str) -> LazyWeight:
        """One weight that is read when it is needed."""
        return LazyWeight(self._stream, name)

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """The weights of a layer, by their names in it."""
        found = {}
        for name in self.names:
            part, _, rest = name.partition("/")
            head = f"layers.{index}."
            if rest.startswith(head):
                found[f"{part}/{rest.removeprefix(head)}"] = self.read(name)
        return found


def experts_of(weights: Weights, layer: LayerConfig) -> LayerExperts:
    """The routed experts of a layer."""
    assert layer.moe is not None
    w_in, w_out, b_in, b_out = (
        weights.get(_BANK + name) for name in ("w_in", "w_out", "b_in", "b_out")
    )
    assert w_in is not None and w_out is not None
    return LayerExperts(w_in, w_out, b_in, b_out, layer.moe.experts.activation)


def router_of(weights: Weights) -> LayerRouter:
    """The router of a layer."""
    return LayerRouter(
        weights[_ROUTER + "w_DE"], weights.get(_ROUTER + "b_E"), weights.get(_SELECTION)
    )


def table_of(weights: Weights) -> Int[np.ndarray, " R"] | None:
    """The expert that each output of a layer's router became; None where nothing is merged."""
    return weights.get(_TABLE)


def whole_name(name: str, layer: int) -> str:
    """The name in the model of a layer's weight."""
    part, _, rest = name.partition("/")
    return f"{part}/layers.{layer}.{rest}"


def bank_of(experts: LayerExperts) -> dict[str, np.ndarray]:
    """The parameters of independent experts by their names in a bank."""
    arrays = {
        "w_in": experts.w_in_EDNH,
        "w_out": experts.w_out_EHD,
        "b_in": experts.b_in_ENH,
        "b_out": experts.b_out_ED,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def replaced(
    weights: Weights,
    bank: Mapping[str, np.ndarray],
    router: LayerRouter | None = None,
    table_R: Int[np.ndarray, " R"] | None = None,
) -> dict[str, np.ndarray]:
    """A layer's weights with another bank of experts.

    Args:
        weights: of the layer.
        bank: parameters by their names in it, instead of its own.
        router: instead of its own; None: its own.
        table_R: the expert that each of the router's outputs became; None: as it is.
    """
    router = router or router_of(weights)
    new: dict[str, Any] = {_BANK + name: array for name, array in bank.items()} | {
        _ROUTER + "w_DE": router.w_DE,
        _ROUTER + "b_E": router.b_E,
        _SELECTION: router.selection_bias_E,
    }
    if table_R is not None:
        new[_TABLE] = table_R.astype(np.int32)
    kept = {name: array for name, array in weights.items() if not name.startswith(_BANK)}
    return {n: a for n, a in {**kept, **new}.items() if a is not None}


@dataclass(frozen=True)
class Passed:
    """Windows of text that went through a layer.

    x_WSD: what the next layer is given.
    sample: what reached the experts; None for a layer without.
    y_TD: what the experts returned, shared ones included; None likewise.
    """

    x_WSD: Float32[np.ndarray, "W S D"]
    sample: Sample | None
    y_TD: Float32[np.ndarray, "T D"] | None


class LayerRunner:
    """Runs texts through one layer after the other; equal layers are compiled once.

    Args:
        config: the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._num_layers = config.num_layers
        self._mesh = make_mesh(MeshShape())
        self._run = jax.jit(self._sharded, static_argnums=0)

    def __call__(
        self, layer: LayerConfig, weights: Weights, x_WSD: Float32[np.ndarray, "W S D"]
    ) -> Passed:
        """Runs windows of text through a layer, a few at a time.

        Args:
            layer: the layer as its weights are.
            weights: of the layer.
            x_WSD: what the layer before returned.
        """
        graph, like = _block(_alone(layer), self._num_layers)
        state = nnx.from_flat_state(
            [
                (path, variable.replace(jnp.asarray(weights[_name(path, variable)])))
                for path, variable in nnx.to_flat_state(like)
            ]
        )
        windows = max(1, _TOGETHER // x_WSD.shape[1])
        # The last windows are filled up, so that one program serves all.
        windows = min(windows, len(x_WSD))
        parts = []
        for start in range(0, len(x_WSD), windows):
            part = x_WSD[start : start + windows]
            filled = np.pad(part, ((0, windows - len(part)), (0, 0), (0, 0)))
            new, *rest = jax.device_get(self._run(graph, state, filled))
            tokens = len(part) * part.shape[1]
            parts.append((new[: len(part)], *(a[:tokens] for a in rest)))
        new, *rest = (np.concatenate(arrays) for arrays in zip(*parts))
        if layer.moe is None:
            return Passed(new, None, None)
        h_TD, y_TD, experts_TK, scores_TK = rest
        return Passed(new, Sample(h_TD, experts_TK, scores_TK), y_TD)

    def _sharded(self, graph: Any, state: nnx.State, x_BSD: jax.Array) -> tuple[jax.Array, ...]:
        return jax.shard_map(
            partial(_pass, graph), mesh=self._mesh, in_specs=P(), out_specs=P(), check_vma=False
        )(state, x_BSD)


def _alone(layer: LayerConfig) -> LayerConfig:
    """The layer on one device: without capacities, and where all experts are near."""
    if layer.moe is None:
        return layer
    moe = dataclasses.replace(layer.moe, exchange=ExchangeConfig(), locality=LocalityConfig())
    return dataclasses.replace(layer, moe=moe)


@cache
def _block(layer: LayerConfig, num_layers: int) -> tuple[Any, nnx.State]:
    """Graph and shapes of a layer."""

    def make() -> Block:
        return Block(layer, num_layers=num_layers, expert_devices=1, rngs=nnx.Rngs(params=0))

    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, state


def _name(path: tuple[Any, ...], variable: nnx.Variable) -> str:
    part = "params" if isinstance(variable, nnx.Param) else "bias"
    return f"{part}/{'.'.join(map(str, path))}"


def _pass(graph: Any, state: nnx.State, x_BSD: jax.Array) -> tuple[jax.Array, ...]:
    block = nnx.merge(graph, state)
    positions_S = jnp.arange(x_BSD.shape[1], dtype=jnp.int32)
    positions_BS = jnp.broadcast_to(positions_S, x_BSD.shape[:2])
    x_BSD, h_TD, _ = block.attend(x_BSD, positions_BS)
    if block.moe is None:
        return (x_BSD + block.mlp(h_TD).reshape(x_BSD.shape),)
    routing = block.moe.router(h_TD)
    y_TD, _ = block.moe(h_TD)
    new = x_BSD + y_TD.reshape(x_BSD.shape)
    return new, h_TD, y_TD, routing.experts_TK, routing.scores_TK
