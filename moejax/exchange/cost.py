"""How long a layer takes: the links and the experts as two resources, chunk after chunk."""

from __future__ import annotations

from dataclasses import dataclass

from moejax.config import WireConfig
from moejax.exchange.budget import Budget
from moejax.exchange.wire import row_bytes
from sharding.machine import Machine, exchange_seconds

__all__ = ["Prediction", "Work", "pipeline_seconds", "predict"]

TILE = 128  # rows of an expert that the products compute together


@dataclass(frozen=True)
class Work:
    """What a layer computes.

    d_model: D.   hidden: H, of a device (split over `tensor`).   num_in: N input projections.
    dtype: of the rows and the weights.
    wire: the layer's, whose r and r' narrow the experts' products on one device, too, where the
        budget's is exact because nothing travels.
    """

    d_model: int
    hidden: int
    num_in: int
    dtype: str
    wire: WireConfig


@dataclass(frozen=True)
class Prediction:
    """Seconds of the forward of one layer.

    dispatch, experts, combine: of one chunk.
    total: of all chunks, one resource working while the other does, and of what is done once in a
        call: folding projections into the weights, narrowing and widening the tokens.
    """

    dispatch: float
    experts: float
    combine: float
    total: float


def pipeline_seconds(chunks: int, dispatch: float, experts: float, combine: float) -> float:
    """Seconds until the last chunk is home.

    The links carry dispatch 0, dispatch 1, combine 0, dispatch 2, combine 1, …, one at a time in
    this order; the experts compute a chunk when it is there and the one before is done.
    """
    links = arrived = dispatch
    device = 0.0
    for i in range(chunks):
        here = arrived
        if i + 1 < chunks:
            links += dispatch
            arrived = links
        device = max(device, here) + experts
        links = max(links, device) + combine
    return links


def _projection_flops(budget: Budget, work: Work) -> int:
    """FLOPs of a call that rows of fewer columns cost, 0 with rows in full.

    U [D, r] is folded into N·H columns of each slot and narrows T tokens, V [D, r'] is folded into
    H rows of each and widens T (`moejax.exchange.reduced`).
    """
    tokens = budget.tokens * budget.chunks
    inward, home = work.wire.dispatch_dim or 0, work.wire.combine_dim or 0
    folding = budget.slots * (inward * work.num_in + home) * work.hidden
    return 2 * work.d_model * (folding + tokens * (inward + home))


def predict(budget: Budget, work: Work, machine: Machine) -> Prediction:
    """The forward of a layer whose routing is even and needs one wave.

    An expert's rows fill tiles of 128, the last one half on average, and its weights are read from
    memory once for each chunk. In mode `remote` experts are those whose kernels send the rows.
    Elsewhere chunks overlap, in programs compiled with `sharding.schedule.compile_overlapped`; on
    Hopper GPUs, where NCCL's kernels and the experts' hold each other up, not (docs/exchange.md).

    Args:
        budget: static sizes.
        work: what the layer computes.
        machine: its figures.

    Raises:
        NotImplementedError: the exchange is one between hosts.
    """
    if budget.inside is not None:
        raise NotImplementedError("an exchange between hosts: the links between them are not known")
    columns_in, columns_out = work.wire.widths(work.d_model)
    matrices = (columns_in * work.num_in + columns_out) * work.hidden  # numbers of an expert
    tiles = budget.tokens * budget.top_k / budget.slots + TILE / 2  # rows of a slot
    flops = 2 * tiles * budget.slots * matrices
    weights = budget.slots * matrices * (2 if work.dtype == "bfloat16" else 4)
    experts = max(flops / machine.product_flops, weights / machine.memory_bytes)
    once = _projection_flops(budget, work) / machine.product_flops
    if budget.devices == 1:
        return Prediction(0.0, experts, 0.0, experts + once)
    out, home, *_ = row_bytes(work.d_model, work.dtype, budget.carried, budget.wire)
    dispatch, combine = (
        exchange_seconds(machine, budget.moved_rows * size) for size in (out, home)
    )
    if budget.mode == "remote":  # the first product hides the dispatch
        total = budget.chunks * (max(dispatch, experts) + combine)
    elif machine.hopper:
        total = budget.chunks * (dispatch + experts + combine)
    else:
        total = pipeline_seconds(budget.chunks, dispatch, experts, combine)
    return Prediction(dispatch, experts, combine, total + once)
