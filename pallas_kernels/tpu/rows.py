"""Rows sorted by group times their group's matrix, with an epilogue on the float32 sums.

The grid is [tiles of columns, visits, steps of the contraction], the last one fastest; the
pipeline that Pallas makes of the block specs loads the next step's blocks while one is computed
on, and loads none whose place did not change. A visit is a pair of a group and a tile of rows, as
in megablox (arXiv 2211.15841 has the idea of tiles that know their group).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.precision import precision_of
from pallas_kernels.tpu.compat import interpret_mode, vmem_limit
from pallas_kernels.tpu.tiles import Tiles, choose_tiles, visits_of

__all__ = ["Store", "block", "plain_product", "planes_block", "rows_product", "scores_block"]

Store = Callable[..., None]
"""`store(ref, index, values, axis=0)`: ref[index] = values, for the visit's rows along an axis.

Other rows of the tile are kept if an earlier visit had them, and else zero.
"""


def block(tiles: Tiles) -> pl.BlockSpec:
    """Of an array [M, N]: the tile's rows and columns."""
    return pl.BlockSpec((tiles.rows, tiles.columns), lambda n, v, k, group, tile, _: (tile[v], n))


def planes_block(tiles: Tiles, planes: int) -> pl.BlockSpec:
    """Of an array [P, M, N]: the tile's rows and columns of every plane."""
    shape = (planes, tiles.rows, tiles.columns)
    return pl.BlockSpec(shape, lambda n, v, k, group, tile, _: (0, tile[v], n))


def scores_block(tiles: Tiles, *, of_columns: bool = False) -> pl.BlockSpec:
    """Of an array [1, 1, M], or with `of_columns` [tiles of columns, 1, M]: the tile's rows."""
    return pl.BlockSpec(
        (None, 1, tiles.rows),
        lambda n, v, k, group, tile, _: (n if of_columns else 0, 0, tile[v]),
    )


def rows_product(
    finish: Callable[[list[jax.Array], Sequence[Any], Sequence[Any], Store], None],
    lhs_PMK: jax.Array,
    rhs_GPKN: jax.Array,
    spans_2G: jax.Array,
    *,
    name: str,
    tiles: Tiles,
    transpose_rhs: bool = False,
    inputs: Sequence[tuple[jax.Array, pl.BlockSpec]] = (),
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
) -> list[jax.Array]:
    """Runs the kernel.

    Args:
        finish: the epilogue, (float32 sums of each part, input refs, output refs, store).
        lhs_PMK: rows in P planes, whose products with the matrices' planes are summed; or in one,
            and there is a sum for each of the matrices' planes: the parts.
        rhs_GPKN: P matrices for each group; [G, P, N, K] with `transpose_rhs`.
        spans_2G: int32, rows of each group, as for `visits_of`.
        name: of the kernel, in profiles.
        tiles: sizes.
        transpose_rhs: see `rhs_GPKN`.
        inputs: what the epilogue reads.
        outputs: what it writes; tiles that no group has stay unwritten.
    """
    planes, rows, plane_k = lhs_PMK.shape
    parts = rhs_GPKN.shape[1] if planes == 1 else 1
    tile_m, tile_k, tile_n = tiles.rows, tiles.contraction, tiles.columns
    plane_steps = plane_k // tile_k
    n_tiles = rhs_GPKN.shape[2 if transpose_rhs else 3] // tile_n
    k_steps = planes * plane_steps
    visits = visits_of(spans_2G, rows, tile_m)
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))

    def body(group, tile, bounds, lhs, *refs):
        rhs_refs, refs = refs[:parts], refs[parts:]
        in_refs, refs = refs[: len(inputs)], refs[len(inputs) :]
        out_refs, sums = refs[: len(outputs)], refs[len(outputs) :]
        v, k = pl.program_id(1), pl.program_id(2)
        first_row = tile[v] * tile_m
        start, end = bounds[group[v]], bounds[group[v] + 1]
        whole = (start <= first_row) & (first_row + tile_m <= end)
        fresh = start <= jnp.maximum(first_row, bounds[0])  # no earlier group has rows of the tile

        def store(ref, index, values, axis=0):
            @pl.when(whole)
            def _():
                ref[index] = values.astype(ref.dtype)

            @pl.when(jnp.logical_not(whole))
            def _():
                row = first_row + lax.broadcasted_iota(jnp.int32, values.shape, axis)
                old = jnp.where(fresh, 0.0, ref[index].astype(jnp.float32))
                mixed = jnp.where((start <= row) & (row < end), values, old)
                ref[index] = mixed.astype(ref.dtype)

        products = [
            lax.dot_general(
                lhs[...],
                part[...],
                contract,
                precision=precision_of(lhs.dtype),
                preferred_element_type=jnp.float32,
            )
            for part in rhs_refs
        ]
        if k_steps == 1:
            finish(products, in_refs, out_refs, store)
            return

        @pl.when(k == 0)
        def _():
            for total, product in zip(sums, products, strict=True):
                total[...] = product

        @pl.when(k > 0)
        def _():
            for total, product in zip(sums, products, strict=True):
                total[...] += product

        @pl.when(k == k_steps - 1)
        def _():
            finish([total[...] for total in sums], in_refs, out_refs, store)

    def lhs_index(n, v, k, group, tile, _):
        return lax.div(k, plane_steps), tile[v], lax.rem(k, plane_steps)

    def rhs_spec(part: int) -> pl.BlockSpec:
        def index(n, v, k, group, tile, _):
            plane, k = lax.div(k, plane_steps) + part, lax.rem(k, plane_steps)
            return (group[v], plane, *((n, k) if transpose_rhs else (k, n)))

        shape = (tile_n, tile_k) if transpose_rhs else (tile_k, tile_n)
        return pl.BlockSpec((None, None, *shape), index)

    kernel = pl.pallas_call(
        body,
        out_shape=[shape for shape, _ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(n_tiles, visits.count, k_steps),
            in_specs=[
                pl.BlockSpec((None, tile_m, tile_k), lhs_index),
                *(rhs_spec(part) for part in range(parts)),
                *(spec for _, spec in inputs),
            ],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)]
            * (parts if k_steps > 1 else 0),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit(),
        ),
        interpret=interpret_mode(),
        name=name,
    )
    return list(
        kernel(
            visits.group,
            visits.tile,
            visits.bounds,
            lhs_PMK,
            *[rhs_GPKN] * parts,
            *(array for array, _ in inputs),
        )
    )


def plain_product(
    lhs_PMK: jax.Array,
    rhs_GPKN: jax.Array,
    spans_2G: jax.Array,
    *,
    name: str,
    transpose_rhs: bool = False,
) -> jax.Array:
    """The products of all planes, summed, [M, N] in lhs's dtype; the rest as `rows_product`."""
    planes, rows, plane_k = lhs_PMK.shape
    columns = rhs_GPKN.shape[2 if transpose_rhs else 3]
    groups, dtype = spans_2G.shape[1], lhs_PMK.dtype
    tiles = choose_tiles(rows, groups, planes * plane_k, columns, dtype, planes=planes)

    def finish(sums, _, outputs, store):
        store(outputs[0], ..., sums[0])

    return rows_product(
        finish,
        lhs_PMK,
        rhs_GPKN,
        spans_2G,
        name=name,
        tiles=tiles,
        transpose_rhs=transpose_rhs,
        outputs=[(jax.ShapeDtypeStruct((rows, columns), dtype), block(tiles))],
    )[0]
