"""Expert weights of 8 bits in a whole model, for inference."""

from __future__ import annotations

import copy
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.layer import MoELayer
from moejax.quantized_bank import QuantizedWeight, WeightDtype
from moejax.routing.bias import RouterBias
from moejax.training.state import Blueprint
from sharding.specs import shardings_of

__all__ = ["quantize_model"]

_DTYPES: dict[str, WeightDtype] = {"int8": "int8", "fp8": "float8_e4m3fn"}


def quantize_model(
    blueprint: Blueprint, params: Any, biases: Any, weights: str
) -> tuple[Blueprint, Any, Any]:
    """Replaces the experts' weights by 8-bit ones, a layer after the other.

    Args:
        blueprint: model and mesh.
        params, biases: as from `load_weights`; the experts' arrays are given up.
        weights: `int8`, or `fp8`, which is e4m3.

    Returns:
        A blueprint of the changed model, which only infers; its params, among them what the
        experts are now; its biases.

    Raises:
        UserError: the model has no experts, or they cannot be quantized.
    """
    if not any(group.layer.moe for group in blueprint.groups):
        raise UserError(f"--expert-weights {weights}: the model has no experts; leave it out")
    model: Any = blueprint.merge(params, biases)
    for group in blueprint.groups:
        if group.layer.moe is not None:
            layer = model.layers[group.name]
            model.layers[group.name] = _quantized(layer, blueprint, weights, group.scanned)
    quantized = copy.copy(blueprint)
    kinds = (nnx.Param, QuantizedWeight)
    quantized.graph, params, biases = nnx.split(model, kinds, RouterBias)  # type: ignore[misc]
    quantized.params, quantized.biases = jax.eval_shape(lambda: (params, biases))
    return quantized, params, biases


def _quantized(layer: nnx.Module, blueprint: Blueprint, weights: str, scanned: bool) -> nnx.Module:
    """A layer, or several stacked ones, with other experts."""
    before, state = nnx.split(layer)
    after: Any = None

    def change(state: nnx.State) -> nnx.State:
        nonlocal after
        changed = nnx.merge(before, state)
        for _, module in nnx.iter_modules(changed):
            if isinstance(module, MoELayer):
                module.quantize_experts(_DTYPES[weights], tensor=blueprint.shape.tensor)
                break
        after, state = nnx.split(changed)
        return state

    def lead(variable: nnx.Variable) -> nnx.Variable:
        spec: Any = variable.get_metadata().get("spec")
        return variable.replace(spec=P(None, *spec))

    def run(state: nnx.State) -> nnx.State:
        if not scanned:
            return change(state)
        found = nnx.to_flat_state(jax.vmap(change)(state))
        # The other variables know already that they are stacked.
        return nnx.from_flat_state(
            [(path, lead(v) if isinstance(v, QuantizedWeight) else v) for path, v in found]
        )

    like = jax.eval_shape(run, state)
    made = jax.jit(run, out_shardings=shardings_of(like, blueprint.mesh))(state)
    return nnx.merge(after, made)
