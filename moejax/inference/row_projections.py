"""Principal components for a model that was trained without: its rows then travel narrower.

    moments = measure_rows(blueprint, params, biases, batches)
    flat = add_projections(flat, config, moments)

`config` is the model's with `WireConfig.dispatch_dim` or `combine_dim`; `flat` then holds what it
asks for, and can be trained on or written as a model folder. The texts should not be those that the
result is judged by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.exchange.reduced import RowMoments, principal_components
from moejax.training.state import Blueprint
from sharding.collectives import psum_statistics
from sharding.mesh import TOKEN_AXES
from sharding.specs import specs_of

__all__ = ["add_projections", "measure_rows"]


def measure_rows(
    blueprint: Blueprint, params: Any, biases: Any, batches: Iterable[np.ndarray]
) -> RowMoments:
    """Second moments of what travels, of every MoE layer.

    Args:
        blueprint: model and mesh; the model has MoE layers.
        params, biases: split by their use, as `load_weights` gives them.
        batches: int32 token ids [B, S] of one shape; B is a multiple of data · expert devices.

    Returns:
        float32 arrays [MoE layers, D, D], summed over all tokens.

    Raises:
        UserError: there is no batch.
    """

    def measure(params: Any, biases: Any, tokens_BS: jax.Array) -> RowMoments:
        model = blueprint.merge(params, biases)
        for block in model.layers.values():
            if block.moe is not None:
                block.moe.measure_rows = True
        aux = model(tokens_BS, inference=True).aux
        assert aux is not None and aux.moments is not None
        return psum_statistics(aux.moments, TOKEN_AXES)

    rows = P(TOKEN_AXES, None)
    step = jax.jit(
        jax.shard_map(
            measure,
            mesh=blueprint.mesh,
            in_specs=(specs_of(blueprint.params), blueprint.bias_specs, rows),
            out_specs=P(),
            check_vma=False,
        )
    )
    sharding, total = NamedSharding(blueprint.mesh, rows), None
    for tokens_BS in batches:
        new = step(params, biases, jax.device_put(tokens_BS, sharding))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        jax.block_until_ready(total)  # one program at a time, for fake devices' sake
    if total is None:
        raise UserError("measure_rows with no batch of tokens: give it some text")
    return total


def add_projections(
    flat: Mapping[str, Any], config: ModelConfig, moments: RowMoments
) -> dict[str, Any]:
    """The weights of a model with the principal components of its rows as projections.

    Args:
        flat: weights in logical order, as `ModelSource.weights` or `to_logical` give them.
        config: the model, with the widths that rows should have.
        moments: from `measure_rows`.

    Raises:
        UserError: a width is larger than the model's.
    """
    added = dict(flat)
    layers = [index for index, layer in enumerate(config.layers()) if layer.moe is not None]
    wire = config.moe.exchange.wire
    for name, columns, moment_LDD in (
        ("u_DR", wire.dispatch_dim, moments.inputs_DD),
        ("v_DR", wire.combine_dim, moments.outputs_DD),
    ):
        for index, moment_DD in zip(layers, moment_LDD, strict=True):
            if columns is not None:
                projection = principal_components(moment_DD, columns)
                added[f"params/layers.{index}.moe.projections.{name}"] = projection
    return added
