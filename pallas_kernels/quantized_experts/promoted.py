"""Products of e4m3 rows and matrices with scales by blocks of 128, promoted to float32.

wgmma sums e4m3 products with fewer bits than float32 has (arXiv 2412.19437 §3.3.2), and scales
change from block to block of the contraction. So each block of 128 is multiplied on its own, and
its sums go into float32 totals, times the scales of row and matrix: two warpgroups share the tensor
cores, one multiplies while the other promotes.

A tile has 128 rows and one or two blocks of 128 columns. A thread holds the totals of all blocks,
64 registers each, and the sums of one, 64 more: two blocks are as many as fit, and load a quarter
fewer bytes for each operation than one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.compat import (
    COMPILER_PARAMS,
    interpret_mode,
    load_rows,
    named_kernel,
    transposed,
)
from pallas_kernels.hopper.config import RowsConfig
from pallas_kernels.hopper.ring import Ring
from pallas_kernels.hopper.tiles import COMPUTE, HALF, ROWS, TileMap, place_in_bands, swizzled
from pallas_kernels.quantized_experts.format import BLOCK
from pallas_kernels.quantized_experts.product import SINGLES, fresh_product, in_pairs

__all__ = ["E4M3", "PromotedConfig", "promoted_kernel"]

E4M3 = jnp.float8_e4m3fn
PAIR = 2  # blocks of a cluster


@dataclass(frozen=True)
class PromotedConfig(RowsConfig):
    """Sizes as in `RowsConfig`; `tile_n` is 128 or 256, `tile_k` 128.

    share_rows: the two thread blocks of a cluster take neighbouring column tiles, and each loads
        half of their rows for both.
    zeroed: the accumulator is set to zero before a product, instead of overwritten by it.
    pairs: the totals are held in Pallas's own layout, as with `zeroed`, instead of `SINGLES`.
    """

    share_rows: bool = False
    zeroed: bool = False
    pairs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile_n not in (BLOCK, 2 * BLOCK) or self.tile_k != BLOCK:
            raise ValueError(
                f"tile_n={self.tile_n}, tile_k={self.tile_k}: 128 or 256, and 128, are supported"
            )

    @property
    def blocks(self) -> int:
        """Blocks of columns of a tile."""
        return self.tile_n // BLOCK

    @property
    def workers(self) -> int:
        """Thread blocks, or clusters of them, that take tiles in turn."""
        return self.sms // PAIR if self.share_rows else self.sms


def promoted_kernel(
    *,
    name: str,
    finish: Callable[..., None],
    scratch: dict[str, Any],
    n_tiles: int,
    k_steps: int,
    column_block: Callable[[Any, int], Any],
    config: PromotedConfig,
    out_type: Any,
) -> Callable[..., Any]:
    """Builds a kernel `f(tile_map, rows, row_scales, matrices, matrix_scales) -> out`.

    The operands are rows e4m3 [A, K], row_scales float32 [K/128, A], matrices e4m3 [S, N, K] and
    matrix_scales float32 [S, N/128, K/128].

    Args:
        name: of the kernel, in profiles.
        finish: (totals, one [64, 128] float32 for each block, warpgroup, first row, column tile,
            refs of the outputs, scratch): what becomes of a warpgroup's 64 rows.
        scratch: what `finish` needs.
        n_tiles: tiles along the columns.
        k_steps: blocks of 128 along the contraction.
        column_block: (column tile, block of the tile) -> block of the matrices' N.
        config: sizes.
        out_type: of the outputs.
    """
    blocks, stages, pair = config.blocks, config.stages, config.share_rows
    if pair and n_tiles % PAIR:
        raise ValueError(f"{n_tiles} column tiles cannot be shared by pairs of thread blocks")
    swept = n_tiles // PAIR if pair else n_tiles
    fresh = not config.zeroed and interpret_mode() is None
    singles = fresh and not config.pairs

    def body(tile_group, num_tiles, rows, row_scales, matrices, matrix_scales, *refs_and_scratch):
        *refs, scratch = refs_and_scratch
        rows_smem, matrices_smem = scratch["rows_smem"], scratch["matrices_smem"]
        scales_smem, full, empty = scratch["scales_smem"], scratch["full"], scratch["empty"]
        ring = Ring(config, False, full, empty)
        worker, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
        tiles_m = num_tiles[0]
        mine = lax.div(tiles_m * swept - worker + (config.workers - 1), config.workers)

        def place(i):
            index = worker + i * config.workers
            m, n = place_in_bands(index, tiles_m, swept, config.band)
            return m, n * PAIR + lax.axis_index("cluster") if pair else n

        @ring.load
        def load():
            def tile(i, _):
                m, n = place(i)
                group = tile_group[m]
                mine_m = pl.ds(m * ROWS, ROWS)

                def step(k, _):
                    slot, arrived = ring.begin_loading(i * k_steps + k)
                    along = pl.ds(k * BLOCK, BLOCK)
                    for block in range(blocks):
                        columns = pl.ds(column_block(n, block) * BLOCK, BLOCK)
                        source = matrices.at[group, columns, along]
                        plgpu.copy_gmem_to_smem(source, matrices_smem.at[slot, block], arrived)
                    plgpu.copy_gmem_to_smem(
                        rows.at[mine_m, along],
                        rows_smem.at[slot],
                        arrived,
                        collective_axes="cluster" if pair else None,
                    )
                    plgpu.copy_gmem_to_smem(row_scales.at[k, mine_m], scales_smem.at[slot], arrived)

                lax.fori_loop(0, k_steps, step, None)

            lax.fori_loop(0, mine, tile, None)
            return mine * k_steps

        @ring.multiply
        def multiply():
            reduced = plgpu.Layout.WGMMA.reduce(1)
            half = pl.ds(warpgroup * HALF, HALF)

            def tile(i, _):
                m, n = place(i)
                group = tile_group[m]

                def step(k, totals):
                    slot = lax.rem(i * k_steps + k, stages)
                    # Read long before they are needed: the products hide the latency.
                    scales = [
                        matrix_scales[group, column_block(n, block), k] for block in range(blocks)
                    ]
                    plgpu.barrier_wait(full.at[slot])
                    row_scale = load_rows(scales_smem.at[slot, half], reduced)
                    promoted = []
                    for block, total in enumerate(totals):
                        sums = product(rows_smem.at[slot, half], matrices_smem.at[slot, block])
                        if block == blocks - 1:
                            plgpu.barrier_arrive(empty.at[slot])
                        scale = lax.broadcast_in_dim(row_scale * scales[block], sums.shape, [0])
                        promoted.append(total + sums * scale)
                    return tuple(promoted)

                zeros = jnp.zeros((HALF, BLOCK), jnp.float32)
                zeros = plgpu.layout_cast(zeros, SINGLES if singles else plgpu.Layout.WGMMA)
                totals = lax.fori_loop(0, k_steps, step, (zeros,) * blocks)
                if singles:
                    totals = tuple(in_pairs(total) for total in totals)
                finish(totals, warpgroup, m * ROWS + warpgroup * HALF, n, refs, scratch)

            lax.fori_loop(0, mine, tile, None)

    def product(rows, columns):
        """[64, 128] @ [128, 128]ᵀ, finished."""
        if singles:
            return fresh_product(rows, columns)
        if fresh:
            return fresh_product(rows, columns, plgpu.Layout.WGMMA)

        def accumulate(accumulator):
            plgpu.wgmma(accumulator, rows, transposed(columns))
            return accumulator[...]

        return pl.run_scoped(accumulate, plgpu.ACC((HALF, BLOCK), jnp.float32))

    empty: Any = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)
    if pair:
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=COMPUTE, num_barriers=stages
        )
    shared = {
        "rows_smem": plgpu.SMEM((stages, ROWS, BLOCK), E4M3, transforms=swizzled(E4M3)),
        "matrices_smem": plgpu.SMEM(
            (stages, blocks, BLOCK, BLOCK), E4M3, transforms=swizzled(E4M3)
        ),
        "scales_smem": plgpu.SMEM((stages, ROWS), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=blocks + 2, num_barriers=stages),
        "empty": empty,
        **scratch,
    }
    cluster = {"cluster": (PAIR,), "cluster_names": ("cluster",)} if pair else {}
    kernel = named_kernel(
        body,
        name,
        out_type=out_type,
        scratch_types=[shared],
        grid=(config.workers,),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        **cluster,
    )

    def call(tiles: TileMap, *operands: jax.Array) -> Any:
        return kernel(tiles.group, tiles.count, *operands)

    return call
