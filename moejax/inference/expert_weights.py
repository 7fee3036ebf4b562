"""Expert weights of 8 bits in a whole model: each matrix is quantized as soon as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding

from moejax.errors import UserError
from moejax.model.groups import change_blocks
from moejax.quantized_bank import QuantizedWeight, WeightDtype
from moejax.training.state import Blueprint, weight_targets
from pallas_kernels.quantized_experts.format import QuantizedMatrices, quantize

__all__ = ["MATRICES", "Quantizing", "in_8_bits", "quantized_blueprint", "quantizing"]

MATRICES = ("w_in", "w_out")
"""Of a bank, those that are stored in 8 bits."""

_DTYPES: dict[str, WeightDtype] = {"int8": "int8", "fp8": "float8_e4m3fn"}


def quantized_blueprint(blueprint: Blueprint, weights: str) -> Blueprint:
    """The model with experts of 8 bits, without its weights; it only infers.

    Args:
        blueprint: model and mesh.
        weights: `int8`, or `fp8`, which is e4m3.

    Raises:
        UserError: the model has no experts, or they cannot be quantized.
    """
    moe = [group for group in blueprint.groups if group.layer.moe is not None]
    if not moe:
        raise UserError(f"--expert-weights {weights}: the model has no experts; leave it out")
    wire = blueprint.config.moe.exchange.wire
    if wire.dispatch_dim or wire.combine_dim:
        raise UserError(
            f"--expert-weights {weights} with rows of dispatch_dim={wire.dispatch_dim}, "
            f"combine_dim={wire.combine_dim}: projections would have to be folded into the weights "
            "first (MoELayer.quantize_experts); leave it out"
        )
    sharing = blueprint.config.moe.experts.sharing
    if sharing.active:
        raise UserError(
            f"--expert-weights {weights} with experts that share parameters "
            f"(sharing kind={sharing.kind!r}): what is stored are no whole matrices; make them "
            "independent first (moejax.compress.sharing.expand_model), or leave it out"
        )
    if (together := blueprint.config.moe.experts.together) > 1:
        raise UserError(
            f"--expert-weights {weights} with together={together}: what is quantized are single "
            "experts; name a model with together=1, or leave it out"
        )
    model: Any = blueprint.merge(blueprint.params, blueprint.biases)
    dtype, tensor = _DTYPES[weights], blueprint.shape.tensor

    def quantize_experts(block: Any) -> None:
        block.moe.quantize_experts(dtype, tensor=tensor)

    change_blocks(model, moe, quantize_experts, new=QuantizedWeight)
    return blueprint.around(model)


def quantizing(quantized: Blueprint, weights: str) -> Quantizing:
    """Quantizes the experts' matrices as they are read, and keeps other weights as they are.

    Args:
        quantized: from `quantized_blueprint`.
        weights: as there.
    """
    targets = weight_targets(quantized, jnp.dtype(quantized.config.compute_dtype))
    return Quantizing({name: target.sharding for name, target in targets.items()}, _DTYPES[weights])


class Quantizing:
    """A `Keep` that quantizes: one compiled program for all layers with as many experts.

    Args:
        shardings: of all weights, quantized, by name; how experts are split is the same in all
            layers.
        dtype: of the values.
    """

    def __init__(self, shardings: Mapping[str, Any], dtype: str) -> None:
        self._shardings, self._dtype = shardings, jnp.dtype(dtype)
        self._programs: dict[tuple[str, int], Any] = {}

    def on(self, mesh: Mesh) -> Quantizing:
        """The same on other devices, as many."""
        moved = {name: NamedSharding(mesh, old.spec) for name, old in self._shardings.items()}
        return Quantizing(moved, self._dtype.name)

    def __call__(self, name: str, array: Any) -> Mapping[str, Any]:
        """An experts' matrix as its values and scales; other weights as they are."""
        part = name.rpartition(".moe.bank.")[2]
        if part not in MATRICES:
            return {name: array}
        names = f"{name}_values", f"{name}_scales"
        kind = part, len(array)
        if kind not in self._programs:
            shardings = QuantizedMatrices(*(self._shardings[n] for n in names))
            make = partial(in_8_bits, part, dtype=self._dtype)
            self._programs[kind] = jax.jit(make, out_shardings=shardings)
        # The weight itself is given up.
        made = jax.block_until_ready(self._programs[kind](array))
        return dict(zip(names, (made.values, made.scales), strict=True))


def in_8_bits(part: str, array: jax.Array, dtype: Any) -> QuantizedMatrices:
    """Experts' matrices, contracted over the last dimension but one: w_in [..., D, N, H], w_out."""
    return quantize(jnp.swapaxes(array, -3, -2) if part == "w_in" else array, dtype)
