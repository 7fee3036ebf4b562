"""Gradients of the groups' matrices: lhs[rows of g]ᵀ @ ct[rows of g].

The groups lie along the contraction, so the visits are the last dimension of the grid: those of a
group add up in one float32 sum, which is written with the group's last.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.precision import precision_of
from pallas_kernels.tpu.compat import interpret_mode, vmem_limit
from pallas_kernels.tpu.tiles import choose_weight_tiles, visits_of

__all__ = ["weights_product"]


def weights_product(
    lhs_MK: jax.Array,
    ct_PMN: jax.Array,
    spans_2G: jax.Array,
    *,
    name: str,
    dtype: Any,
) -> jax.Array:
    """Runs the kernel.

    Args:
        lhs_MK: rows sorted by group.
        ct_PMN: P planes of cotangents.
        spans_2G: int32, rows of each group, as for `visits_of`.
        name: of the kernel, in profiles.
        dtype: of the result.

    Returns:
        [G, P, K, N]; zero for empty groups, whatever rows there are of others or of none.
    """
    (rows, contraction), (planes, _, plane_n) = lhs_MK.shape, ct_PMN.shape
    groups = spans_2G.shape[1]
    tiles = choose_weight_tiles(
        rows, groups, contraction, planes * plane_n, lhs_MK.dtype, dtype, planes=planes
    )
    tile_m, tile_k, tile_n = tiles.rows, tiles.contraction, tiles.columns
    plane_tiles = plane_n // tile_n
    visits = visits_of(spans_2G, rows, tile_m, empty=True)

    def body(group, tile, bounds, lhs, ct, out, total):
        v = pl.program_id(2)
        first_row = tile[v] * tile_m
        start, end = bounds[group[v]], bounds[group[v] + 1]
        whole = (start <= first_row) & (first_row + tile_m <= end)

        def add(lhs, ct):
            total[...] += lax.dot_general(
                lhs,
                ct,
                (((0,), (0,)), ((), ())),
                precision=precision_of(lhs.dtype),
                preferred_element_type=jnp.float32,
            )

        def masked(values):
            """Both are: a zero times what another group has of inf or nan is nan."""
            row = first_row + lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values32 = values.astype(jnp.float32)
            return jnp.where((start <= row) & (row < end), values32, 0.0).astype(values.dtype)

        @pl.when(first_row <= start)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(whole)
        def _():
            add(lhs[...], ct[...])

        @pl.when(jnp.logical_not(whole) & (start < end))
        def _():
            add(masked(lhs[...]), masked(ct[...]))

        @pl.when(end <= first_row + tile_m)
        def _():
            out[...] = total[...].astype(out.dtype)

    def in_plane(n):
        return lax.div(n, plane_tiles), lax.rem(n, plane_tiles)

    def ct_index(k, n, v, group, tile, _):
        plane, column = in_plane(n)
        return plane, tile[v], column

    def out_index(k, n, v, group, tile, _):
        plane, column = in_plane(n)
        return group[v], plane, k, column

    kernel = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((groups, planes, contraction, plane_n), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(contraction // tile_k, planes * plane_tiles, visits.count),
            in_specs=[
                pl.BlockSpec((tile_m, tile_k), lambda k, n, v, group, tile, _: (tile[v], k)),
                pl.BlockSpec((None, tile_m, tile_n), ct_index),
            ],
            out_specs=pl.BlockSpec((None, None, tile_k, tile_n), out_index),
            scratch_shapes=[pltpu.VMEM((tile_k, tile_n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(),
        ),
        interpret=interpret_mode(),
        name=name,
    )
    return kernel(visits.group, visits.tile, visits.bounds, lhs_MK, ct_PMN)
