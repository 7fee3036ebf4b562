"""Gradients of the groups' matrices: lhs[rows of g]ᵀ @ rhs[rows of g].

The groups lie along the contraction. The ring of stages is that of the row tiles. The number of
steps of a tile is its group's rows, so it is read from the offsets; an empty group's tile takes no
step and is written as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.compat import COMPILER_PARAMS, interpret_mode, transposed
from pallas_kernels.hopper.config import RowsConfig
from pallas_kernels.hopper.gather import finish_gathers, start_gather
from pallas_kernels.hopper.rows import COMPUTE_REGISTERS, LOAD_REGISTERS
from pallas_kernels.hopper.tiles import (
    COMPUTE,
    HALF,
    out_scratch,
    place_in_bands,
    store_strips,
    swizzled,
)

__all__ = ["weights_kernel"]


def weights_kernel(
    *,
    name: str,
    groups: int,
    tile_m: int,
    m_tiles: int,
    n_tiles: int,
    gather_lhs: int,
    gather_rhs: int,
    config: RowsConfig,
    out_type: Any,
    dtype: Any,
) -> Callable[..., Any]:
    """Builds a kernel `f(first_step, index, lhs, rhs) -> out`, out [G · M, N].

    Args:
        name: of the kernel, in profiles.
        groups: G.
        tile_m: rows of a tile, 128 or 256; with 256, `tile_n` is at most 128.
        m_tiles, n_tiles: tiles of a matrix, `tile_m` rows and `tile_n` columns each.
        gather_lhs, gather_rhs: rows of the operand that `index` picks, or 0; at most one.
        config: sizes; `tile_k` rows of a group are a step.
        out_type: [G, M, N].
        dtype: of the operands.

    The kernel's `first_step` is int32 [G + 1]: where each group begins, in steps.
    """
    tile_n, tile_k, stages = config.tile_n, config.tile_k, config.stages
    share = tile_m // COMPUTE  # rows of a warpgroup
    interpret = interpret_mode()
    interpreted = interpret is not None
    gather = gather_lhs or gather_rhs
    tiles = groups * m_tiles * n_tiles

    def body(first_step, index, lhs, rhs, out, scratch):
        lhs_smem, rhs_smem, out_smem, full, empty = (
            scratch[name] for name in ("lhs_smem", "rhs_smem", "out_smem", "full", "empty")
        )
        sm = lax.axis_index("sm")
        warpgroup = lax.axis_index("warpgroup")
        mine = lax.div(tiles - sm + (config.sms - 1), config.sms)

        def place(i):
            """Group, tile row and tile column of this block's i-th."""
            at = sm + i * config.sms
            group = lax.div(at, m_tiles * n_tiles)
            rest = at - group * (m_tiles * n_tiles)
            return group, *place_in_bands(rest, m_tiles, n_tiles, config.band)

        def fetch(ref, gathered, column, step, target, barrier):
            if gathered:
                start_gather(
                    ref,
                    index,
                    step * tile_k,
                    column,
                    target,
                    limit=gathered,
                    interpret=interpreted,
                )
                return
            source = ref.at[pl.ds(step * tile_k, tile_k), pl.ds(column, target.shape[1])]
            plgpu.copy_gmem_to_smem(source, target, barrier)

        @pl.when(warpgroup == COMPUTE)
        def load():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

            def tile(i, done):
                group, m, n = place(i)
                first = first_step[group]
                count = first_step[group + 1] - first

                def step(k, _):
                    at = done + k
                    slot = lax.rem(at, stages)
                    if gather:  # what was started before, while waiting for room

                        @pl.when(at >= config.lag)
                        def announce_earlier():
                            finish_gathers(config.lag - 1, interpret=interpreted)
                            plgpu.barrier_arrive(full.at[lax.rem(at - config.lag, stages)])

                    @pl.when(at >= stages)
                    def wait_for_room():
                        plgpu.barrier_wait(empty.at[slot])

                    bar = full.at[slot]
                    fetch(lhs, gather_lhs, m * tile_m, first + k, lhs_smem.at[slot], bar)
                    fetch(rhs, gather_rhs, n * tile_n, first + k, rhs_smem.at[slot], bar)

                lax.fori_loop(0, count, step, None)
                return done + count

            steps = lax.fori_loop(0, mine, tile, jnp.int32(0))
            if gather:
                finish_gathers(0, interpret=interpreted)

                def announce(at, _):
                    plgpu.barrier_arrive(full.at[lax.rem(at, stages)])

                lax.fori_loop(jnp.maximum(steps - config.lag, 0), steps, announce, None)

            def drain(at, _):
                plgpu.barrier_wait(empty.at[lax.rem(at, stages)])

            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

            def tile(i, done):
                group, m, n = place(i)
                count = first_step[group + 1] - first_step[group]

                def products(accumulator):
                    def multiply(k):
                        at = done + k
                        slot = lax.rem(at, stages)
                        plgpu.barrier_wait(full.at[slot])
                        columns = lhs_smem.at[slot, :, pl.ds(warpgroup * share, share)]
                        plgpu.wgmma(accumulator, transposed(columns), rhs_smem.at[slot])
                        return at

                    def step(k, _):
                        at = multiply(k)
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(empty.at[lax.rem(at + stages - 1, stages)])

                    @pl.when(count > 0)
                    def multiply_all():
                        multiply(0)
                        lax.fori_loop(1, count, step, None)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[lax.rem(done + count - 1, stages)])

                    return accumulator[...]

                values = pl.run_scoped(products, plgpu.ACC((share, tile_n), jnp.float32))
                values = values.astype(out.dtype)
                for half in range(share // HALF):
                    row = m * tile_m + warpgroup * share + half * HALF
                    rows = values[half * HALF : (half + 1) * HALF]
                    store_strips(rows, out.at[group], out_smem, warpgroup, row, n * tile_n)
                return done + count

            lax.fori_loop(0, mine, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    scratch_types = {
        "lhs_smem": plgpu.SMEM((stages, tile_k, tile_m), dtype, transforms=swizzled(dtype)),
        "rhs_smem": plgpu.SMEM((stages, tile_k, tile_n), dtype, transforms=swizzled(dtype)),
        "out_smem": out_scratch(out_type.dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    }
    body.__name__ = name
    return plgpu.kernel(
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
