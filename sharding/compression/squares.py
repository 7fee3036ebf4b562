"""Squares of a summed gradient, estimated from squares of ranks' own ones, in few numbers.

Adam divides by the root of a mean of squares. Of a sparse sum these are no squares of the gradient:
what arrives once in a hundred steps is then divided by what the last arrivals left. Gradients of
different ranks differ mostly by chance, so that the square of their sum is on average the sum of
their squares; and a matrix of squares is about the product of its rows' and its columns' means
(Adafactor, arXiv 1804.04235 §3). So only n + m numbers of a matrix [n, m] travel.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax import lax
from jax import numpy as jnp

from sharding.collectives import axis_size
from sharding.compression.low_rank import Matrices, reciprocal
from sharding.mesh import DATA
from sharding.traffic import Kind

__all__ = ["crossings", "squares"]


LARGEST = 1e36
"""Of a mean of squares, and of an estimate: an infinite one would become NaN. A NaN stays one."""


def squares(
    grad: jax.Array, axes: tuple[str, ...], dim: int | None, stacked: int | None = None
) -> jax.Array:
    """Estimated squares of the sum over `axes`, inside the shard_map.

    They are right where ranks' gradients are independent with mean zero and the squares of each
    matrix are an outer product; their mean over a matrix needs only the first.

    Args:
        grad: float32, this rank's; two dimensions or more.
        axes: mesh axes to sum over.
        dim: the dimension that storage splits over `data`: those of the piece stored here. None:
            the whole.
        stacked: leading dimensions that number matrices, see `Matrices.of`.

    Returns:
        float32, like the reduced gradient, and equal in every bit wherever that is.

    Raises:
        UserError: the shape holds no matrix.
    """
    form = Matrices.of(grad.shape, stacked)
    square_Bnm = jnp.square(grad).reshape(form.count, form.n, form.m)
    means = jnp.concatenate([jnp.mean(square_Bnm, axis=2), jnp.mean(square_Bnm, axis=1)], axis=1)
    means = jnp.minimum(lax.psum(means, axes), LARGEST)
    rows_Bn, columns_Bm = jnp.split(means, [form.n], axis=1)
    whole_B1 = jnp.mean(rows_Bn, axis=1, keepdims=True)
    rows_Bn = rows_Bn * reciprocal(whole_B1)
    place = () if dim is None else (dim, axis_size(DATA), lax.axis_index(DATA))
    return jnp.minimum(form.product(rows_Bn[..., None], columns_Bm[..., None], *place), LARGEST)


def crossings(
    shape: tuple[int, ...], sizes: Mapping[str, int], stacked: int | None = None
) -> list[tuple[Kind, tuple[str, ...], int]]:
    """The collectives of `squares`: kind, axes, and bytes of what a rank puts in.

    Args:
        shape: of the local gradient.
        sizes: devices along each axis that is summed over.
        stacked: as for `squares`.
    """
    form = Matrices.of(shape, stacked)
    return [("all-reduce", tuple(sizes), 4 * form.count * (form.n + form.m))]
