"""What all ways to sum one parameter's gradient have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax

from sharding.mesh import DATA
from sharding.traffic import Kind, Part, sent_bytes

__all__ = ["RESIDUAL", "Crossing", "Method", "Sent", "State", "bytes_sent", "exact_crossings"]

State = dict[str, jax.Array]
"""What a rank keeps of one parameter from step to step, by name."""

Crossing = tuple[Kind, tuple[str, ...], int]
"""A collective over whole axes: kind, axes, and bytes of what a rank puts in."""

Sent = Crossing | tuple[Kind, tuple[str, ...], int, Part, int]

RESIDUAL = "residual"
"""The name of what was not sent yet, shaped like the gradient. Ranks' residuals may be summed and
handed out anew; whatever else a state holds starts anew on another mesh."""


class Method(Protocol):
    """How one gradient is summed over ranks; all of it inside the shard_map."""

    def init(self, shape: tuple[int, ...], key: jax.Array) -> State:
        """A rank's state at the start; empty where nothing is kept.

        Args:
            shape: of the local gradient.
            key: the same on all ranks.
        """

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
        """The sum over `axes`, or where `dim` is given the stored piece of it; see `quantized`.

        Args:
            grad: this rank's, in any float dtype; sums and states are float32.
            state: of this rank.
            axes: mesh axes, `data` first.
            dim: the dimension that storage splits over `data`.
            key: of step, parameter and rank.
            step: steps taken, int32 [].
        """

    def crossings(
        self, shape: tuple[int, ...], sizes: Mapping[str, int], dim: int | None
    ) -> Sequence[Sent]:
        """The collectives of `reduce`: kind, axes, and bytes of what a rank puts in.

        Over a part of an axis besides: which part, and how many ranks take part together.
        """


def bytes_sent(crossings: Sequence[Crossing], sizes: Mapping[str, int]) -> float:
    """Bytes that a rank sends in collectives over whole axes.

    Args:
        crossings: kind, axes, and bytes of what a rank puts in.
        sizes: devices along each axis.
    """
    return sum(
        sent_bytes(kind, math.prod(sizes[a] for a in axes), operand)
        for kind, axes, operand in crossings
    )


def exact_crossings(
    shape: tuple[int, ...], sizes: Mapping[str, int], dim: int | None
) -> list[Crossing]:
    """The collectives of `sharding.zero.sum_to_piece`, in float32.

    Args:
        shape: of the local gradient.
        sizes: devices along each axis that is summed over, `data` first.
        dim: the dimension that storage splits over `data`; None: none.
    """
    everything = 4 * math.prod(shape)
    others = tuple(a for a in sizes if dim is None or a != DATA)
    if dim is None:
        return [("all-reduce", others, everything)]
    rest: Crossing = ("all-reduce", others, everything // sizes[DATA])
    return [("reduce-scatter", (DATA,), everything), rest]
