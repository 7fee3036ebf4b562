"""Predicted seconds of a training step, part by part.

What a device computes comes from `sharding.step_work`, what it sends from the plan. On GPUs nothing
overlaps: `train.py` leaves XLA's latency-hiding scheduler off, so that a collective is waited for
where it stands; the one exception is mode `remote`, whose first product hides the way out. On TPUs
a chunk travels while another is computed. Not in it: uneven routing and the further waves it
causes, gaps between kernels, rounding on the wire, the input pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from moejax.errors import UserError
from moejax.exchange.cost import pipeline_seconds
from moejax.training.config import TrainConfig
from sharding.costs import flops_per_token
from sharding.device_kinds import HOST_LINK_SECONDS, Hardware
from sharding.local_weights import Weights
from sharding.machine import Machine
from sharding.mesh import TENSOR, MeshShape, over_hosts
from sharding.step_work import Operation, operations, without_kernels
from sharding.traffic import Crossing
from sharding.traffic_formulas import layer_budget, tokens_at_once

if TYPE_CHECKING:
    from sharding.planner import Plan

__all__ = [
    "Prediction",
    "StepTime",
    "collective_seconds",
    "neighbours",
    "operation_seconds",
    "predict_plan",
    "predict_step",
]

EXCHANGE = ("dispatch", "combine", "number of waves", "capacity counts", "replica fetch")
COMBINED = 30 * 2**20
"""Bytes up to which XLA joins neighbouring collectives of one kind, outside of loops."""

RING = 16
"""Devices of a torus that lie in one ring; a longer axis takes a second dimension, with its links.
Of v5e's and v6e's 16 × 16; v5p's are of up to 24."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one device.

    experts: products of the routed experts.
    attention: scores and shares.
    products: other products of layers: attention's projections, router, shared and dense MLPs.
    head: logits and loss.
    activations: what layers read and write beside products.
    weights: casting, copying out of stacked layers, summing gradients up.
    optimizer: its update.
    exchange: rows to their experts and back.
    tensor: sums over `tensor`.
    reduction: gathering weights, reducing gradients, and statistics.
    hidden: of the exchange, what goes on beside the experts' products.
    """

    experts: float = 0.0
    attention: float = 0.0
    products: float = 0.0
    head: float = 0.0
    activations: float = 0.0
    weights: float = 0.0
    optimizer: float = 0.0
    exchange: float = 0.0
    tensor: float = 0.0
    reduction: float = 0.0
    hidden: float = 0.0

    @property
    def total(self) -> float:
        """All of it, one after the other, but for what is hidden."""
        return sum(v for name, v in vars(self).items() if name != "hidden") - self.hidden


@dataclass(frozen=True)
class Prediction:
    """What a run would do on some hardware.

    time: of a step.
    tokens: of a step, all devices together.
    utilisation: the FLOPs that the model needs over those at the devices' peak.
    slow: why XLA computes the experts, at a rate that is assumed; None where our kernels do.
    """

    time: StepTime
    tokens: int
    utilisation: float
    slow: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """All devices together."""
        return self.tokens / self.time.total


def operation_seconds(operation: Operation, machine: Machine) -> float:
    """Seconds of an operation, all times together: its products, or memory if that is slower."""
    computed = operation.flops / (machine.product_flops * operation.rate)
    waiting = operation.exposed / machine.memory_bytes
    moved = operation.moved / machine.memory_bytes
    return operation.times * max(computed + waiting, moved)


def collective_seconds(crossing: Crossing, mesh: MeshShape, hardware: Hardware) -> float:
    """Seconds of a collective, all times together.

    Inside a host it takes the links; a ring through hosts has the network of every member that a
    host has, if that is not more than the links; an all-to-all sends each device's rows for other
    hosts through its own network. On a torus rows pass a quarter of the ring on average, half of
    them each way round.

    Args:
        crossing: what a device sends a step.
        mesh: sizes of the axes.
        hardware: devices, links and network.
    """
    machine, kind = hardware.machine, crossing.kind
    members, near, hosts = neighbours(mesh, crossing.axes, hardware.host_devices)
    if crossing.part == "inside hosts":
        hosts = 1
    link, network = machine.link_bytes, hardware.host_link_bytes
    if hosts == 1:
        along = min(members, RING) if hardware.kind.torus and kind == "all-to-all" else 1
        detour = max(1.0, along / 4)
        rate = link / detour
    elif kind == "permute" or crossing.part == "between hosts":
        rate = network
    elif kind == "all-to-all":
        outside = (members - near) / (members - 1)
        rate = min(network / outside, link / max(1 - outside, 1e-9))
    else:
        rate = min(link, near * network)
    times: float = crossing.times
    if not crossing.phase and kind != "all-to-all":
        times = min(times, math.ceil(crossing.sent / COMBINED))
    delay = machine.link_seconds + HOST_LINK_SECONDS * math.ceil(math.log2(hosts))
    return times * delay + crossing.sent / rate


@lru_cache(maxsize=4096)
def neighbours(mesh: MeshShape, axes: tuple[str, ...], host_devices: int) -> tuple[int, int, int]:
    """Of the groups along these axes: members, fewest of one in a host, most hosts of one."""
    laid = over_hosts(mesh, range(mesh.size), lambda device: device // host_devices)
    hosts = laid.astype(np.int64) // host_devices
    kept = [i for i, axis in enumerate(("data", "expert", "tensor")) if axis not in axes]
    members = math.prod(getattr(mesh, axis) for axis in axes)
    groups = np.moveaxis(hosts, kept, list(range(len(kept)))).reshape(-1, members)
    patterns = np.unique(np.sort(groups, axis=1) - groups.min(axis=1, keepdims=True), axis=0)
    counts = [np.unique(row, return_counts=True)[1] for row in patterns]
    return members, min(int(c.min()) for c in counts), max(len(c) for c in counts)


def _part(crossing: Crossing) -> str:
    if crossing.name in EXCHANGE:
        return "exchange"
    return "tensor" if crossing.axes == (TENSOR,) else "reduction"


def predict_step(
    config: TrainConfig,
    mesh: MeshShape,
    weights: Weights,
    crossings: Iterable[Crossing],
    hardware: Hardware,
) -> Prediction:
    """What a step takes, with even routing that needs no further wave.

    Args:
        config: the run.
        mesh: sizes of the axes.
        weights: on a device.
        crossings: what a device sends a step; further waves are passed over.
        hardware: devices, links and network.

    Raises:
        UserError: rates are known for bfloat16 only, and of products of single experts.
    """
    model = config.model
    if (members := model.moe.experts.together) > 1 and model.expert_numbers:
        raise UserError(
            f"together={members}: no time is predicted of experts that are computed together; set "
            "--model.moe.experts.together 1"
        )
    if model.compute_dtype != "bfloat16":
        raise UserError(
            f"compute_dtype={model.compute_dtype}: rates of devices are known for bfloat16 alone; "
            "pass --model.compute-dtype bfloat16"
        )
    spent = dict.fromkeys((field.name for field in fields(StepTime)), 0.0)
    for operation in operations(config, mesh, weights, hardware.kind):
        spent[operation.part] += operation_seconds(operation, hardware.machine)
    ways: dict[tuple[str, str], float] = {}
    for crossing in crossings:
        if crossing.extra:
            continue
        seconds = collective_seconds(crossing, mesh, hardware)
        spent[_part(crossing)] += seconds
        key = crossing.name, crossing.phase
        ways[key] = ways.get(key, 0.0) + seconds
    time = StepTime(**spent)
    time = replace(time, hidden=_hidden(config, mesh, time, ways, hardware))
    tokens = config.data.batch_size * config.data.seq_len
    needed = tokens * flops_per_token(model, config.data.seq_len).step
    peak = mesh.size * hardware.kind.peak_flops
    moe = (layer for layer in set(model.layers()) if layer.moe is not None)
    reasons = (without_kernels(x, model.compute_dtype, mesh.tensor, hardware.kind) for x in moe)
    slow = next(filter(None, reasons), None)
    return Prediction(time, tokens, needed / (time.total * peak), slow)


def _hidden(
    config: TrainConfig,
    mesh: MeshShape,
    time: StepTime,
    ways: dict[tuple[str, str], float],
    hardware: Hardware,
) -> float:
    """Seconds of the exchange that pass while experts are computed."""
    moe = [layer for layer in config.model.layers() if layer.moe is not None]
    if mesh.expert == 1 or not moe:
        return 0.0
    budget = layer_budget(moe[0], tokens_at_once(config, mesh), mesh.expert)
    # Of six products' time two are the forward's; of the recomputation's, one and a bit.
    again = config.model.remat != "none"
    forward = time.experts / (3.0 + 2 / 3 * again)
    passes = {"forward": forward, "backward": 2 * forward, "recomputed": 2 / 3 * forward * again}
    hidden = 0.0
    for phase, experts in passes.items():
        out, home = (ways.get((name, phase), 0.0) for name in ("dispatch", "combine"))
        if phase == "backward":  # rows' gradients go the other way
            out, home = home, out
        if budget.mode == "remote" and hardware.machine.hopper and phase != "backward":
            hidden += min(out, experts)
        elif hardware.kind.torus and budget.chunks > 1:
            calls = len(moe) * config.accumulate * budget.chunks
            parts = (each / calls for each in (out, experts, home))
            together = pipeline_seconds(budget.chunks, *parts) * len(moe) * config.accumulate
            hidden += out + experts + home - together
    return hidden


def predict_plan(plan: Plan, hardware: Hardware) -> Prediction:
    """`predict_step` for a plan, with the collectives counted in the traced program."""
    return predict_step(plan.config, plan.mesh, plan.weights, plan.collectives, hardware)
