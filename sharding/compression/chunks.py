"""A gradient cut into one chunk for each rank, and put together again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax import numpy as jnp

from sharding.mesh import DATA

__all__ = ["Chunks"]


@dataclass(frozen=True)
class Chunks:
    """Which part of a parameter's gradient which rank sums up.

    Ranks are counted along `data` first, then along the other axes. Where storage splits a
    dimension over `data`, the ranks of one data index share the piece that is stored there; else
    all ranks share the whole. A share is padded with zeros to equal chunks of whole blocks.

    shape: of the local gradient.
    sizes: devices along each axis that is summed over, by name.
    dim: the dimension that storage splits over `data`; None where it splits none.
    multiple: numbers of a block.
    """

    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    dim: int | None
    multiple: int

    @property
    def ranks(self) -> int:
        """N, ranks that sum up."""
        return math.prod(self.sizes.values())

    @property
    def pieces(self) -> int:
        """Pieces into which storage splits the gradient."""
        return 1 if self.dim is None else self.sizes[DATA]

    @property
    def sharers(self) -> tuple[str, ...]:
        """The axes over which the chunks of a piece are gathered again."""
        return tuple(a for a in self.sizes if self.dim is None or a != DATA)

    @property
    def width(self) -> int:
        """C, numbers of a chunk, padding included."""
        least = -(-math.prod(self.shape) // self.ranks)
        return -(-least // self.multiple) * self.multiple

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of a stored piece."""
        return _with(self.shape, self.dim, lambda size: size // self.pieces)

    def cut(self, grad: jax.Array) -> jax.Array:
        """[N, C]: row n is for rank n."""
        if self.dim is not None:
            before, after = self.shape[: self.dim], self.shape[self.dim + 1 :]
            each = self.shape[self.dim] // self.pieces
            grad = jnp.moveaxis(grad.reshape(*before, self.pieces, each, *after), self.dim, 0)
        rows = grad.reshape(self.pieces, -1)
        padding = self.ranks // self.pieces * self.width - rows.shape[1]
        return jnp.pad(rows, ((0, 0), (0, padding))).reshape(self.ranks, self.width)

    def join(self, rows_NC: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        pieces = rows_NC.reshape(self.pieces, -1)
        pieces = pieces[:, : math.prod(self.shape) // self.pieces]
        if self.dim is None:
            return pieces.reshape(self.shape)
        pieces = jnp.moveaxis(pieces.reshape(self.pieces, *self.piece_shape), 0, self.dim)
        return pieces.reshape(self.shape)

    def join_piece(self, rows_GC: jax.Array) -> jax.Array:
        """A stored piece of the chunks of those that share it, [ranks / pieces, C]."""
        flat = rows_GC.reshape(-1)[: math.prod(self.piece_shape)]
        return flat.reshape(self.piece_shape)


def _with(shape: Sequence[int], dim: int | None, change) -> tuple[int, ...]:
    return tuple(change(size) if d == dim else size for d, size in enumerate(shape))
