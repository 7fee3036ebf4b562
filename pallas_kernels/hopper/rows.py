"""Products of row tiles with their group's matrix: the persistent, warp-specialized kernel.

Three warpgroups a block: two multiply 64 rows each with wgmma, one loads tiles into a ring of
stages, by TMA or, for rows picked by index, by cp.async. A block, or a cluster of two, takes every
n-th tile of a list that was made beforehand, so nothing depends on the number of groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.arrivals import Arrivals
from pallas_kernels.hopper.compat import transposed
from pallas_kernels.hopper.config import RowsConfig
from pallas_kernels.hopper.gather import optional_index, start_gather
from pallas_kernels.hopper.ragged import RaggedTileMap
from pallas_kernels.hopper.ring import CLUSTER, Ring, ring_barriers, ring_kernel
from pallas_kernels.hopper.tiles import (
    COMPUTE,
    EIGHT,
    HALF,
    ROWS,
    TileMap,
    enough_of,
    place_in_bands,
    swizzled,
)

__all__ = ["Epilogue", "rows_kernel"]


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the accumulators of a warpgroup's 64 rows.

    finish: (accumulators, warpgroup, first row, wanted rows or None for all, column tile, refs,
        scratch). Wanted rows: with `short` how many, the first ones; with `ragged` a pair, the
        first row of the group and the row after its last.
    scratch: shared memory and barriers by name.
    begin: (warpgroup, first row, column tile, refs, scratch), before the products; starts loads.
    """

    finish: Callable[..., None]
    scratch: dict[str, Any]
    begin: Callable[..., None] | None = None


def rows_kernel(
    epilogue: Epilogue,
    *,
    name: str,
    n_tiles: int,
    k_steps: int,
    parts: int,
    rhs_slice: Callable[..., Any],
    transpose_rhs: bool,
    gather: bool,
    config: RowsConfig,
    out_type: Any,
    dtype: Any,
    short: bool = False,
    ragged: bool = False,
    copies: int = 1,
    arrivals: Arrivals | None = None,
) -> Callable[..., Any]:
    """Builds a kernel `f(tile_map, index, lhs, rhs, *extra) -> out`.

    Args:
        epilogue: what is done with a tile.
        name: of the kernel, in profiles.
        n_tiles: tiles along the columns.
        k_steps: steps of `tile_k` along the contraction.
        parts: accumulators; each has tile_n / parts columns and its own slice of rhs.
        rhs_slice: (rhs ref, group, part, column tile, step) -> the slice for a stage.
        transpose_rhs: the slice is [columns, contraction].
        gather: `index` // `copies` picks the rows of lhs; otherwise they lie in order and the index
            is None.
        config: sizes.
        out_type: of the outputs.
        dtype: of the operands.
        short: most tiles want few rows: others are not loaded and not stored.
        ragged: the kernel takes a `RaggedTileMap`.
        copies: what the index counts for each row.
        arrivals: lhs are this device's rows and `extra` begins with the list of where they go and
            the firsts of its groups; what is multiplied are the rows that arrive, the first output.
    """
    if arrivals is not None and (not gather or config.cluster > 1):
        raise ValueError("rows that arrive are picked by index, by blocks that wait for themselves")
    if arrivals is not None and config.sms <= arrivals.blocks:
        raise ValueError(f"{arrivals.blocks} blocks of {config.sms} write rows: none is left")
    if ragged and (gather or short):
        raise ValueError("rows of groups of any size lie in order, and all of them are wanted")
    if config.cluster > 1 and (ragged or short):
        raise ValueError("clusters share what tiles of many rows, in whole tiles, multiply with")
    part_n, tile_k, stages = config.tile_n // parts, config.tile_k, config.stages
    outputs = len(jax.tree.leaves(out_type))
    cluster = config.cluster
    rhs_shape = (part_n, tile_k) if transpose_rhs else (tile_k, part_n)

    def body(tile_group, tile_rows, num_tiles, index, lhs, rhs, *refs_and_scratch):
        *refs, scratch = refs_and_scratch
        lhs_smem, rhs_smem = scratch["lhs_smem"], scratch["rhs_smem"]
        ring = Ring(config, gather, scratch["full"], scratch["empty"])
        sm = lax.axis_index("sm")
        warpgroup = lax.axis_index("warpgroup")
        if arrivals is not None:
            entries, firsts, *refs = refs
            received = refs.pop(-outputs)
            arrived, own, lhs = arrivals.semaphores(), lhs, received

            @pl.when(sm < arrivals.blocks)
            def send():
                worker = sm * (COMPUTE + 1) + warpgroup
                arrivals.send(own, entries, firsts, received, arrived, worker)

        tiles_m = num_tiles[0]
        units = lax.div(tiles_m + (cluster - 1), cluster)  # of the rows of a cluster's tiles
        mine = lax.div(units * n_tiles - sm + (config.clusters - 1), config.clusters)
        if arrivals is not None:
            mine = arrivals.share(sm, units * n_tiles, config.clusters)

        def first_row(m):
            return tile_rows[m, 0] * EIGHT if ragged else m * ROWS

        def load_rows(m, wanted, k, target, barrier):
            def load_first(count):
                first = target.at[pl.ds(0, count)]
                if gather:
                    start_gather(lhs, index, m * ROWS, k * tile_k, first, copies)
                    return
                source = lhs.at[pl.ds(first_row(m), count), pl.ds(k * tile_k, tile_k)]
                plgpu.copy_gmem_to_smem(source, first, barrier)

            if short:
                enough_of(wanted, ROWS, load_first)
            else:
                load_first(ROWS)

        def place(i):
            """Row and column of this block's i-th tile; the last may be both blocks'."""
            height = max(1, config.band // cluster)
            at = sm + i * config.clusters
            if arrivals is not None:
                at = arrivals.tile(sm, i, config.clusters)
            unit, n = place_in_bands(at, units, n_tiles, height)
            if cluster == 1:
                return unit, n
            return jnp.minimum(unit * cluster + lax.axis_index(CLUSTER), tiles_m - 1), n

        def same_group(m):
            """Whether a cluster's blocks multiply with the same matrix."""
            first = m - lax.rem(m, cluster)
            return tile_group[first] == tile_group[jnp.minimum(first + 1, tiles_m - 1)]

        def load_columns(source, target, barrier, together):
            """A part of the matrix: each block for itself, or half of it for both."""
            if cluster == 1:
                plgpu.copy_gmem_to_smem(source, target, barrier)
                return
            pl.when(together)(
                partial(plgpu.copy_gmem_to_smem, source, target, barrier, collective_axes=CLUSTER)
            )
            pl.when(jnp.logical_not(together))(
                partial(plgpu.copy_gmem_to_smem, source, target, barrier)
            )

        def steps_of(group):
            """A tile of rows that no group has is zero without a step."""
            return jnp.where(group < 0, 0, k_steps) if ragged else k_steps

        @ring.load
        def load():
            def tile(i, done):
                m, n = place(i)
                group = tile_group[m]
                steps = steps_of(group)
                together = same_group(m) if cluster > 1 else None
                if arrivals is not None:
                    done = arrivals.wait(arrived, done, group)

                def step(k, _):
                    slot, full = ring.begin_loading((done if ragged else i * k_steps) + k)
                    for part in range(parts):
                        source = rhs_slice(rhs, group, part, n, k)
                        load_columns(source, rhs_smem.at[slot, part], full, together)
                    wanted = tile_rows[m] if short else None
                    load_rows(m, wanted, k, lhs_smem.at[slot], full)

                lax.fori_loop(0, steps, step, None)
                return done + steps if ragged else done

            carried = ragged or arrivals is not None
            done = lax.fori_loop(0, mine, tile, jnp.int32(0) if carried else None)
            if arrivals is not None:  # nobody writes here any more when the kernel ends
                pl.when(sm == 0)(partial(arrivals.wait_until, arrived, done, arrivals.groups))
            return done if ragged else mine * k_steps

        @ring.multiply
        def multiply():
            def tile(i, done):
                m, n = place(i)
                row = first_row(m) + warpgroup * HALF
                if epilogue.begin is not None:
                    epilogue.begin(warpgroup, row, n, refs, scratch)

                def products(*accumulators):
                    def multiply_stage(slot):
                        rows = lhs_smem.at[slot, pl.ds(warpgroup * HALF, HALF)]
                        for part, accumulator in enumerate(accumulators):
                            columns = rhs_smem.at[slot, part]
                            columns = transposed(columns) if transpose_rhs else columns
                            plgpu.wgmma(accumulator, rows, columns)

                    if ragged:
                        consume = partial(ring.consume, done, k_steps, multiply_stage, parts=parts)
                        pl.when(tile_group[m] >= 0)(consume)
                    else:
                        ring.consume(i * k_steps, k_steps, multiply_stage, parts=parts)
                    return tuple(accumulator[...] for accumulator in accumulators)

                accumulators = pl.run_scoped(
                    products, *(plgpu.ACC((HALF, part_n), jnp.float32) for _ in range(parts))
                )
                wanted = tile_rows[m] - warpgroup * HALF if short else None
                if ragged:
                    wanted = tile_rows[m, 1], tile_rows[m, 2]
                epilogue.finish(accumulators, warpgroup, row, wanted, n, refs, scratch)
                return done + steps_of(tile_group[m]) if ragged else None

            lax.fori_loop(0, mine, tile, jnp.int32(0) if ragged else None)

    scratch = {
        "lhs_smem": plgpu.SMEM((stages, ROWS, tile_k), dtype, transforms=swizzled(dtype)),
        "rhs_smem": plgpu.SMEM((stages, parts, *rhs_shape), dtype, transforms=swizzled(dtype)),
        **ring_barriers(config, arrivals=parts + 1),
        **epilogue.scratch,
    }
    kernel = ring_kernel(body, name, out_type=out_type, scratch=scratch, config=config)

    def call(tiles: TileMap | RaggedTileMap, index: jax.Array | None, *arrays: jax.Array) -> Any:
        return kernel(tiles.group, tiles.rows, tiles.count, optional_index(index), *arrays)

    return call
