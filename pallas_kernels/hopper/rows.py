"""Products of row tiles with their group's matrix: the persistent, warp-specialized kernel.

Three warpgroups a block: two multiply 64 rows each with wgmma, one loads tiles into a ring of
stages, by TMA or, for rows picked by index, by cp.async. A block takes tiles `sm`, `sm + SMs`, … of
a list that was made beforehand, so nothing depends on the number of groups.
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

from pallas_kernels.hopper.compat import COMPILER_PARAMS, interpret_mode, transposed
from pallas_kernels.hopper.config import RowsConfig
from pallas_kernels.hopper.gather import finish_gathers, start_gather
from pallas_kernels.hopper.tiles import (
    COMPUTE,
    FEW,
    HALF,
    ROWS,
    TileMap,
    place_in_bands,
    swizzled,
)

__all__ = ["COMPUTE_REGISTERS", "LOAD_REGISTERS", "Epilogue", "rows_kernel"]

LOAD_REGISTERS, COMPUTE_REGISTERS = 56, 224  # of a thread; 2 · 224 + 56 fit in an SM's 64 k


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the accumulators of a warpgroup's 64 rows.

    finish: (accumulators, warpgroup, first row, wanted rows or None for all, column tile, refs,
        scratch).
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
    gather_from: int,
    config: RowsConfig,
    out_type: Any,
    dtype: Any,
    short: bool = False,
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
        gather_from: rows of lhs when `index` picks them; 0: lhs lies in order, `index` is unread.
        config: sizes.
        out_type: of the outputs.
        dtype: of the operands.
        short: most tiles want few rows: others are not loaded and not stored.
    """
    part_n, tile_k, stages = config.tile_n // parts, config.tile_k, config.stages
    rhs_shape = (part_n, tile_k) if transpose_rhs else (tile_k, part_n)
    interpret = interpret_mode()
    interpreted = interpret is not None

    def body(tile_group, tile_rows, num_tiles, index, lhs, rhs, *refs_and_scratch):
        *refs, scratch = refs_and_scratch
        lhs_smem, rhs_smem, full, empty = (
            scratch[name] for name in ("lhs_smem", "rhs_smem", "full", "empty")
        )
        sm = lax.axis_index("sm")
        warpgroup = lax.axis_index("warpgroup")
        tiles_m = num_tiles[0]
        mine = lax.div(tiles_m * n_tiles - sm + (config.sms - 1), config.sms)
        steps = mine * k_steps

        def load_rows(m, wanted, along, target, barrier):
            def load_first(count):
                source = lhs.at[pl.ds(m * ROWS, count), along]
                plgpu.copy_gmem_to_smem(source, target.at[pl.ds(0, count)], barrier)

            if not short:
                load_first(ROWS)
                return
            pl.when(wanted <= FEW)(partial(load_first, FEW))
            pl.when((wanted > FEW) & (wanted <= HALF))(partial(load_first, HALF))
            pl.when(wanted > HALF)(partial(load_first, ROWS))

        def place(i):
            return place_in_bands(sm + i * config.sms, tiles_m, n_tiles, config.band)

        @pl.when(warpgroup == COMPUTE)
        def load():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

            def tile(i, _):
                m, n = place(i)
                group = tile_group[m]

                def step(k, _):
                    at = i * k_steps + k
                    slot = lax.rem(at, stages)

                    if gather_from:  # what was started before, while waiting for room

                        @pl.when(at >= config.lag)
                        def announce_earlier():
                            finish_gathers(config.lag - 1, interpret=interpreted)
                            plgpu.barrier_arrive(full.at[lax.rem(at - config.lag, stages)])

                    @pl.when(at >= stages)
                    def wait_for_room():
                        plgpu.barrier_wait(empty.at[slot])

                    for part in range(parts):
                        source = rhs_slice(rhs, group, part, n, k)
                        plgpu.copy_gmem_to_smem(source, rhs_smem.at[slot, part], full.at[slot])
                    if not gather_from:
                        along = pl.ds(k * tile_k, tile_k)
                        load_rows(m, tile_rows[m], along, lhs_smem.at[slot], full.at[slot])
                        return
                    start_gather(
                        lhs,
                        index,
                        m * ROWS,
                        k * tile_k,
                        lhs_smem.at[slot],
                        limit=gather_from,
                        interpret=interpreted,
                    )

                lax.fori_loop(0, k_steps, step, None)

            lax.fori_loop(0, mine, tile, None)

            if gather_from:
                finish_gathers(0, interpret=interpreted)

                def announce(at, _):
                    plgpu.barrier_arrive(full.at[lax.rem(at, stages)])

                lax.fori_loop(jnp.maximum(steps - config.lag, 0), steps, announce, None)

            def drain(at, _):  # every release is awaited before the block ends
                plgpu.barrier_wait(empty.at[lax.rem(at, stages)])

            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

            def tile(i, _):
                m, n = place(i)
                row = m * ROWS + warpgroup * HALF
                if epilogue.begin is not None:
                    epilogue.begin(warpgroup, row, n, refs, scratch)

                def products(*accumulators):
                    def multiply(k):
                        at = i * k_steps + k
                        slot = lax.rem(at, stages)
                        plgpu.barrier_wait(full.at[slot])
                        rows = lhs_smem.at[slot, pl.ds(warpgroup * HALF, HALF)]
                        for part, accumulator in enumerate(accumulators):
                            columns = rhs_smem.at[slot, part]
                            columns = transposed(columns) if transpose_rhs else columns
                            plgpu.wgmma(accumulator, rows, columns)
                        return at

                    def step(k, _):
                        at = multiply(k)
                        plgpu.wgmma_wait(parts)  # those of the step before are through
                        plgpu.barrier_arrive(empty.at[lax.rem(at + stages - 1, stages)])

                    multiply(0)  # a condition in the loop would cost a tenth
                    lax.fori_loop(1, k_steps, step, None)
                    plgpu.wgmma_wait(0)
                    last = i * k_steps + (k_steps - 1)
                    plgpu.barrier_arrive(empty.at[lax.rem(last, stages)])
                    return tuple(accumulator[...] for accumulator in accumulators)

                accumulators = pl.run_scoped(
                    products, *(plgpu.ACC((HALF, part_n), jnp.float32) for _ in range(parts))
                )
                wanted = tile_rows[m] - warpgroup * HALF if short else None
                epilogue.finish(accumulators, warpgroup, row, wanted, n, refs, scratch)

            lax.fori_loop(0, mine, tile, None)
            plgpu.wait_smem_to_gmem(0)

    arrivals = parts + 1
    scratch_types = {
        "lhs_smem": plgpu.SMEM((stages, ROWS, tile_k), dtype, transforms=swizzled(dtype)),
        "rhs_smem": plgpu.SMEM((stages, parts, *rhs_shape), dtype, transforms=swizzled(dtype)),
        "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        **epilogue.scratch,
    }
    body.__name__ = name
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[scratch_types],
        grid=(config.sms,),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        **({} if interpret is None else {"interpret": interpret}),
    )

    def call(tiles: TileMap, *arrays: jax.Array) -> Any:
        return kernel(tiles.group, tiles.rows, tiles.count, *arrays)

    return call
