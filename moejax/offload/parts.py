"""A model taken apart: its experts, which go to the host, and all else, which stays on the device.

A layer keeps everything but its bank of experts; what the bank was is remembered, so that a program
can put one of fewer slots in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from moejax.errors import UserError
from moejax.model.groups import change_blocks
from moejax.training.state import Blueprint

__all__ = ["BankLayout", "Structure", "TakenApart", "apart", "dense_bytes", "same_but_layer"]


@dataclass(frozen=True)
class Structure:
    """A module without its arrays.

    Programs that are called once for each layer are given bare arrays: to look for them in a state
    takes the host as long as to start a small program.
    """

    graph: Any
    tree: Any

    @staticmethod
    def of(module: Any) -> tuple[Structure, tuple[jax.Array, ...]]:
        """A module's structure, and its arrays."""
        graph, state = nnx.split(module)
        arrays, tree = jax.tree.flatten(state)
        return Structure(graph, tree), tuple(arrays)

    def around(self, arrays: Sequence[jax.Array]) -> Any:
        """The module."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, arrays))


@dataclass(frozen=True)
class BankLayout:
    """What the bank of a layer's experts consists of.

    layer: index in the model.
    graph: structure of the bank.
    leaves: path and variable of each array, of E experts; without values.
    names: of the arrays.
    experts: E.
    shapes: of one expert's part of each array, in the dtype of its use.
    """

    layer: int
    graph: Any
    leaves: tuple[tuple[tuple[Any, ...], nnx.Variable], ...]
    names: tuple[str, ...]
    experts: int
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def quantized(self) -> bool:
        """Whether experts have 8 bits."""
        return any(s.dtype.itemsize == 1 for s in self.shapes)

    @property
    def expert_bytes(self) -> int:
        """Size of one expert."""
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in self.shapes)

    def bank(self, arrays: Sequence[jax.Array]) -> Any:
        """The bank around arrays [S, …], whatever S is."""
        named = zip(self.leaves, arrays, strict=True)
        state = nnx.from_flat_state([(path, like.replace(array)) for (path, like), array in named])
        return nnx.merge(self.graph, state)


@dataclass(frozen=True)
class TakenApart:
    """A model whose layers have no banks.

    blueprint: of what is left.
    banks: by the layer's index, in order.
    """

    blueprint: Blueprint
    banks: dict[int, BankLayout]


def apart(blueprint: Blueprint) -> TakenApart:
    """Takes the experts out of a model; those that share parameters become independent first.

    Args:
        blueprint: on one device, its layers not scanned; of quantized experts or others.

    Raises:
        UserError: the model has no experts.
    """
    groups = [group for group in blueprint.groups if group.layer.moe is not None]
    if not groups:
        raise UserError("--offload: the model has no experts; leave it out")
    if (members := blueprint.config.moe.experts.together) > 1:
        raise UserError(
            f"--offload with together={members}: what comes and goes are single experts; name a "
            "model with together=1, or leave it out"
        )
    dtype = jnp.dtype(blueprint.config.compute_dtype)
    model: Any = blueprint.merge(blueprint.params, blueprint.biases)
    banks = {}
    for group in groups:
        taken: list[tuple[Any, nnx.State]] = []

        def take(block: Any, taken: list[tuple[Any, nnx.State]] = taken) -> None:
            block.moe.expand_experts()
            taken.append(nnx.split(block.moe.bank))
            block.moe.bank = nnx.data(None)

        change_blocks(model, [group], take)
        banks[group.start] = _layout(group.start, *taken[0], dtype)
    return TakenApart(blueprint.around(model), banks)


def _layout(layer: int, graph: Any, state: nnx.State, dtype: Any) -> BankLayout:
    leaves, names, shapes, experts = [], [], [], 0
    for path, variable in nnx.to_flat_state(state):
        array = variable.get_value()
        experts = array.shape[0]
        used = dtype
        if not isinstance(variable, nnx.Param) or variable.get_metadata().get("float32"):
            used = array.dtype
        shape = jax.ShapeDtypeStruct(array.shape[1:], used)
        leaves.append((path, variable.replace(shape)))
        names.append(".".join(map(str, path)))
        shapes.append(shape)
    return BankLayout(layer, graph, tuple(leaves), tuple(names), experts, tuple(shapes))


def dense_bytes(parts: TakenApart) -> int:
    """Size of all that stays on the device."""
    dtype = jnp.dtype(parts.blueprint.config.compute_dtype)
    total = 0
    for state in parts.blueprint.params, parts.blueprint.biases:
        for _, variable in nnx.to_flat_state(state):
            array = variable.get_value()
            plain = isinstance(variable, nnx.Param) and not variable.get_metadata().get("float32")
            width = dtype.itemsize if plain else array.dtype.itemsize
            total += math.prod(array.shape) * width
    return total


def same_but_layer(layout: BankLayout) -> tuple[Any, ...]:
    """What equal layers have in common, hashable: their programs are the same."""
    return (layout.graph, layout.names, layout.experts, layout.shapes)
