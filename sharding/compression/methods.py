"""The ways in which one parameter's gradient can be summed, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

from sharding.compression import hosts, quantized
from sharding.compression.blocks import Blocks
from sharding.compression.config import GradCompression
from sharding.compression.interface import RESIDUAL, Method, Sent, State
from sharding.compression.low_rank import LowRank
from sharding.compression.top_k import TopK

__all__ = ["WEIGHT_BLOCKS", "make_method"]

WEIGHT_BLOCKS = Blocks(8, 256)
"""How weights are gathered in 8 bits."""


@dataclass(frozen=True)
class Quantized:
    """`quantized.reduce` in a format, rounded by chance or with error feedback.

    hosts: where it is not 0, `hosts.reduce` over so many.
    """

    blocks: Blocks
    feedback: bool
    hosts: int = 0

    def init(self, shape: tuple[int, ...], key: jax.Array) -> State:
        """The residual where there is error feedback."""
        del key
        return {RESIDUAL: quantized.init(shape)} if self.feedback else {}

    def reduce(
        self,
        grad: jax.Array,
        state: State,
        axes: tuple[str, ...],
        dim: int | None,
        *,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, State]:
        """See `quantized.reduce`."""
        del step
        held = state.get(RESIDUAL)
        chance = None if self.feedback or self.blocks.bits == 16 else key
        if self.hosts:
            piece, residual = hosts.reduce(
                grad, held, axes, dim, key=chance, blocks=self.blocks, hosts=self.hosts
            )
        else:
            piece, residual = quantized.reduce(
                grad, held, axes, dim, key=chance, blocks=self.blocks
            )
        return piece, {} if residual is None else {RESIDUAL: residual}

    def crossings(
        self, shape: tuple[int, ...], sizes: Mapping[str, int], dim: int | None
    ) -> Sequence[Sent]:
        """See `quantized.crossings` and `hosts.crossings`."""
        if self.hosts:
            return hosts.crossings(shape, sizes, dim, self.blocks, self.hosts)
        return quantized.crossings(shape, sizes, dim, self.blocks)


def make_method(config: GradCompression, stacked: int = 0, momentum: float = 0.0) -> Method:
    """The method that is asked for, which is not `none`.

    Args:
        config: what is asked for.
        stacked: leading dimensions of the parameter that number layers and experts.
        momentum: Adam's b1, which `top_k` applies before it chooses.
    """
    if config.method == "bf16":
        return Quantized(Blocks(16, 1), feedback=False, hosts=config.hosts)
    if config.method == "low_rank":
        return LowRank(config.rank, stacked, config.warmup_steps)
    if config.method == "top_k":
        return TopK(config.density, momentum, config.warmup_steps)
    bits = {"int8": 8, "int4": 4}[config.method]
    blocks = Blocks(bits, config.block_size, config.rotate)
    return Quantized(blocks, config.rounding == "error_feedback", config.hosts)
