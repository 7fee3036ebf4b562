"""Expert weights of 8 bits in a whole model: each matrix is quantized as soon as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax import numpy as jnp

from moejax.errors import UserError
from moejax.inference.stored import Keep
from moejax.model.groups import change_blocks
from moejax.quantized_bank import QuantizedWeight, WeightDtype
from moejax.training.state import Blueprint, weight_targets
from pallas_kernels.quantized_experts.format import QuantizedMatrices, quantize

__all__ = ["quantized_blueprint", "quantizing"]

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
    model: Any = blueprint.merge(blueprint.params, blueprint.biases)
    dtype, tensor = _DTYPES[weights], blueprint.shape.tensor

    def quantize_experts(block: Any) -> None:
        block.moe.quantize_experts(dtype, tensor=tensor)

    change_blocks(model, moe, quantize_experts, new=QuantizedWeight)
    return blueprint.around(model)


def quantizing(quantized: Blueprint, weights: str) -> Keep:
    """Quantizes the experts' matrices as they are read, and keeps other weights as they are.

    Args:
        quantized: from `quantized_blueprint`.
        weights: as there.
    """
    targets = weight_targets(quantized, jnp.dtype(quantized.config.compute_dtype))
    dtype = jnp.dtype(_DTYPES[weights])

    def of_inputs(w_EDNH: jax.Array) -> QuantizedMatrices:
        return quantize(jnp.swapaxes(w_EDNH, 1, 2), dtype)

    def of_outputs(w_EHD: jax.Array) -> QuantizedMatrices:
        return quantize(w_EHD, dtype)

    functions = {".moe.bank.w_in": of_inputs, ".moe.bank.w_out": of_outputs}
    # One compiled program for all layers. The weight itself is given up.
    programs: dict[str, Any] = {}

    def keep(name: str, array: Any) -> Mapping[str, Any]:
        part = next((part for part in functions if name.endswith(part)), None)
        if part is None:
            return {name: array}
        names = f"{name}_values", f"{name}_scales"
        if part not in programs:
            shardings = QuantizedMatrices(*(targets[n].sharding for n in names))
            programs[part] = jax.jit(functions[part], out_shardings=shardings)
        made = jax.block_until_ready(programs[part](array))
        return dict(zip(names, (made.values, made.scales), strict=True))

    return keep
