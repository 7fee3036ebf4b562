"""How grouped products are cut up on a TPU: sizes of tiles, and which tile belongs to which group.

A tile of rows may hold the end of one group and the beginning of the next, or many small groups. It
is then visited once for each, and a mask says which of its rows count. So groups may have any
size; where they are multiples of the tile's rows no tile is visited twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.tpu.compat import vmem_bytes

__all__ = ["LANES", "Tiles", "Visits", "choose_tiles", "choose_weight_tiles", "visits_of"]

LANES = 128  # columns of a register: the granularity of a block's columns
_ROWS = (512, 256, 128)  # of a tile; no fewer: a matrix unit has 128 or 256 rows itself
_BUFFERS = 2  # of each block: one is computed on while the other is under way
_STEP_BYTES = 256 * 1024  # what HBM moves while a grid step starts: about 0.3 µs


@dataclass(frozen=True)
class Tiles:
    """Sizes of a product's tiles [rows, contraction] @ [contraction, columns].

    For the gradients of matrices: `rows` of the groups are the step, tiles are
    [contraction, columns].
    """

    rows: int
    contraction: int
    columns: int


def _divisors(size: int) -> list[int]:
    """Multiples of `LANES` that divide a size."""
    return [d for d in range(LANES, size + 1, LANES) if size % d == 0]


def _rows(rows: int, groups: int) -> int:
    """Rows of a tile: at most an eighth of the mean group, since its last tile is part empty."""
    return next((t for t in _ROWS if 8 * t * groups <= rows), _ROWS[-1])


def _budget() -> int:
    """Bytes for blocks; the rest is left to the compiler, for what it spills from registers."""
    return vmem_bytes() // 2


def choose_tiles(
    rows: int,
    groups: int,
    contraction: int,
    columns: int,
    dtype: Any,
    *,
    planes: int = 1,
    parts: int = 1,
    blocks: int = 1,
) -> Tiles:
    """The cut of rows [M, K] times matrices [G, K, N] that moves the fewest bytes and fits.

    Matrices that span the contraction stay in VMEM from one tile of a group to the next. This is a
    model: bytes, plus a cost for each step of the grid. It was not measured on a TPU.

    Args:
        rows, groups, contraction, columns: M, G, K, N (of one part).
        dtype: of the operands.
        planes: equal pieces of the contraction that a tile may not straddle.
        parts: products side by side, with the same rows.
        blocks: [rows, columns] blocks that the epilogue reads and writes.
    """
    size, tile_m = jnp.dtype(dtype).itemsize, _rows(rows, groups)
    visits = -(-rows // tile_m) + groups

    def bytes_in_vmem(k: int, n: int) -> int:
        operands = tile_m * k + parts * k * n + blocks * tile_m * n
        return _BUFFERS * size * operands + 2 * 4 * parts * tile_m * n  # sums and last product

    def cost(k: int, n: int) -> int:
        loads = groups if k == contraction else visits  # of a whole matrix
        moved = rows * contraction * (columns // n) + loads * contraction * columns * parts
        steps = visits * (contraction // k) * (columns // n)
        return size * moved + _STEP_BYTES * steps

    fitting = [
        (cost(k, n), -k, -n)
        for k in _divisors(contraction // planes)
        for n in _divisors(columns)
        if bytes_in_vmem(k, n) <= _budget() or (k == n == LANES)
    ]
    _, k, n = min(fitting)
    return Tiles(tile_m, -k, -n)


def choose_weight_tiles(
    rows: int,
    groups: int,
    contraction: int,
    columns: int,
    dtype: Any,
    out_dtype: Any,
    *,
    planes: int = 1,
) -> Tiles:
    """The same for the matrices' gradients: rows [M, K]ᵀ times cotangents [M, N] of each group.

    Args:
        rows, groups, contraction, columns: M, G, K, N.
        dtype: of the operands.
        out_dtype: of the gradients.
        planes: equal pieces of the columns that a tile may not straddle.
    """
    size, out_size = (jnp.dtype(d).itemsize for d in (dtype, out_dtype))
    tile_m = _rows(rows, groups)
    visits = -(-rows // tile_m) + groups

    def bytes_in_vmem(k: int, n: int) -> int:
        return _BUFFERS * (size * tile_m * (k + n) + out_size * k * n) + 2 * 4 * k * n

    def cost(k: int, n: int) -> int:
        moved = size * rows * (contraction * (columns // n) + columns * (contraction // k))
        return moved + _STEP_BYTES * visits * (contraction // k) * (columns // n)

    fitting = [
        (cost(k, n), -k, -n)
        for k in _divisors(contraction)
        for n in _divisors(columns // planes)
        if bytes_in_vmem(k, n) <= _budget() or (k == n == LANES)
    ]
    _, k, n = min(fitting)
    return Tiles(tile_m, -k, -n)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visits:
    """Pairs of a group and a tile that has rows of it, in the order of the rows.

    group, tile: int32 [V]; entries from `count` on mean nothing.
    bounds: int32 [G + 1], where each group begins, and the last one ends.
    count: int32, the number of visits.
    """

    group: jax.Array
    tile: jax.Array
    bounds: jax.Array
    count: jax.Array


def visits_of(spans_2G: jax.Array, rows: int, tile_m: int, *, empty: bool = False) -> Visits:
    """Makes the list of visits.

    Args:
        spans_2G: int32, first row of each group and the row after its last, one group after the
            other, of any sizes.
        rows: M, at least the last group's end.
        tile_m: rows of a tile.
        empty: whether empty groups are visited too, once.
    """
    (starts_G, ends_G), groups = spans_2G, spans_2G.shape[1]
    tiles = -(-rows // tile_m)
    first_G = lax.div(starts_G, tile_m)
    after_G = lax.div(ends_G + (tile_m - 1), tile_m)
    least = jnp.int32(1 if empty else 0)
    count_G = jnp.where(ends_G > starts_G, after_G - first_G, least)
    done_G = jnp.cumsum(count_G, dtype=jnp.int32)  # visits up to a group's last
    index_V = jnp.arange(tiles + groups, dtype=jnp.int32)
    group_V = jnp.sum(index_V[:, None] >= done_G[None, :], axis=1, dtype=jnp.int32)
    group_V = jnp.minimum(group_V, groups - 1)
    tile_V = first_G[group_V] + index_V - (done_G - count_G)[group_V]
    tile_V = jnp.clip(tile_V, 0, max(tiles - 1, 0))
    bounds = jnp.concatenate([starts_G, ends_G[-1:]])
    # One at least: a grid of no steps is nothing to rely on. It has no rows, and writes zeros.
    return Visits(group_V, tile_V, bounds, jnp.maximum(done_G[-1], 1))
