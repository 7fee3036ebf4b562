"""What a training step would cost on a mesh, found without allocating the model.

The step is traced on an abstract mesh, so the mesh may be larger than this machine. Bytes moved are
counted in the traced program (`sharding.traffic`) and beside it by closed formulas
(`sharding.traffic_formulas`); `Plan.formulas_agree` compares the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
from jax import numpy as jnp

from moejax.errors import UserError
from moejax.exchange.budget import Budget
from moejax.model.attention import choose_attention
from moejax.training.anomaly import history_shapes
from moejax.training.config import TrainConfig
from moejax.training.optimizer import init_moments
from moejax.training.residuals import make_reducer
from moejax.training.state import Blueprint, TrainState
from moejax.training.step import make_train_step
from pallas_kernels.backends import planned_for
from sharding.costs import Flops, Parameters, count_parameters, flops_per_token
from sharding.local_weights import Weights, weights_of
from sharding.memory import Memory, memory_of
from sharding.mesh import AXES, MeshShape, abstract_mesh
from sharding.plan_text import format_plan
from sharding.traffic import Crossing, collectives_of, live_jaxpr
from sharding.traffic_formulas import expected_collectives, layer_budget, tokens_at_once

__all__ = ["Plan", "after_warmup", "format_plan", "plan", "trace_step"]


@dataclass(frozen=True)
class Plan:
    """What a run costs on a mesh.

    config: the run.
    mesh: sizes of the axes.
    tokens: T, on a device in one microbatch.
    parameters, flops: of the model; FLOPs are those of one token.
    memory: bytes of a device.
    device_memory: bytes that a device of this machine has for arrays; None where unknown.
    collectives: what a device sends a step, counted in the traced program.
    formulas: the same by closed formulas.
    exchanges: runs of consecutive MoE layers with equal exchanges: number of layers, budget.
    weights: numbers of parameters on a device.
    uncompressed: which gradients their method does not serve, and why; empty if it serves all.
    """

    config: TrainConfig
    mesh: MeshShape
    tokens: int
    parameters: Parameters
    flops: Flops
    memory: Memory
    device_memory: int | None
    collectives: tuple[Crossing, ...]
    formulas: tuple[Crossing, ...]
    exchanges: tuple[tuple[int, Budget], ...]
    weights: Weights
    uncompressed: str = ""

    @property
    def formulas_agree(self) -> bool:
        """Whether both ways of counting give the same bytes for every collective."""
        counted, expected = ({c.key: c.sent for c in w} for w in (self.collectives, self.formulas))
        return counted.keys() == expected.keys() and all(
            math.isclose(sent, expected[key]) for key, sent in counted.items()
        )

    def sent(self, name: str | None = None, axis: str | None = None) -> float:
        """Bytes a device sends a step, further waves left out.

        Args:
            name: only collectives of this name.
            axis: only those that run over this axis (and perhaps others).
        """
        return sum(
            c.sent
            for c in self.collectives
            if not c.extra and name in (None, c.name) and (axis is None or axis in c.axes)
        )


def plan(
    config: TrainConfig, mesh_shape: MeshShape, *, platform: str = "cpu", kernels: str = ""
) -> Plan:
    """Plans a run.

    Args:
        config: the run.
        mesh_shape: the mesh, of any size; `config.mesh` is not read.
        platform: of the devices, as JAX names it. Where attention is fused there its scores are not
            counted as memory.
        kernels: the backend of `pallas_kernels.fused_experts` that serves there, where it serves
            the layers; empty: what serves here. Others keep more for the backward.

    Raises:
        UserError: the model or the batch does not fit the mesh.
    """
    devices = mesh_shape.data * mesh_shape.expert
    examples = config.data.batch_size // config.accumulate
    if examples % devices:
        raise UserError(
            f"batch_size={config.data.batch_size} with accumulate={config.accumulate} on mesh "
            f"{mesh_shape}: examples are split over data × expert = {devices} devices; make it a "
            f"multiple of {devices * config.accumulate}"
        )
    config = after_warmup(config)
    blueprint = Blueprint(config.model, abstract_mesh(mesh_shape))
    reducer = make_reducer(blueprint, config)
    params, storage = blueprint.params, blueprint.storage
    with planned_for(kernels):
        jaxpr = live_jaxpr(trace_step(blueprint, config).jaxpr)
    attention = choose_attention(platform, config.model, deterministic=config.deterministic)
    fused = attention == "cudnn"
    tokens = tokens_at_once(config, mesh_shape)
    budgets = (
        layer_budget(layer, tokens, mesh_shape.expert)
        for layer in config.model.layers()
        if layer.moe is not None
    )
    return Plan(
        config=config,
        mesh=mesh_shape,
        tokens=tokens,
        parameters=count_parameters(config.model),
        flops=flops_per_token(config.model, config.data.seq_len),
        memory=memory_of(
            config, mesh_shape, params, storage, jaxpr, reducer, fused_attention=fused
        ),
        device_memory=_device_memory(),
        collectives=tuple(collectives_of(jaxpr, dict(zip(AXES, mesh_shape.sizes)))),
        formulas=tuple(expected_collectives(config, mesh_shape, params, storage, reducer)),
        exchanges=_runs(budgets),
        weights=weights_of(config, mesh_shape, params, storage),
        uncompressed=reducer.explain(),
    )


def after_warmup(config: TrainConfig) -> TrainConfig:
    """The run without the first steps of its gradients' compression, which send more."""
    compression = dataclasses.replace(config.grad_compression, warmup_steps=0)
    return dataclasses.replace(config, grad_compression=compression)


def trace_step(blueprint: Blueprint, config: TrainConfig) -> Any:
    """The training step traced for a blueprint, abstract or not: a `jax.stages.Traced`."""

    def state(params: Any, biases: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, init_moments(params), biases)

    shapes = jax.eval_shape(state, blueprint.params, blueprint.biases)
    history = history_shapes(config.anomaly) if config.anomaly.active else None
    residuals = make_reducer(blueprint, config).shapes
    shapes = dataclasses.replace(shapes, residuals=residuals, history=history)
    examples = config.data.batch_size // config.accumulate
    batch = (config.accumulate, examples, config.data.seq_len + 1)
    step: Any = make_train_step(blueprint, config)
    return step.trace(
        shapes,
        jax.ShapeDtypeStruct(batch, jnp.int32),
        None,
    )


def _runs(budgets: Iterable[Budget]) -> tuple[tuple[int, Budget], ...]:
    return tuple((len(list(run)), budget) for budget, run in groupby(budgets))


def _device_memory() -> int | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")
