"""Weights of 8 bits with bfloat16 rows on Hopper: few rows, so the weights are what is read.

The operands are exchanged: a tile is 64 or 128 rows of the weights Wᵀ with `columns` token rows as
its columns, so that few tokens cost little. A multiplying warpgroup reads its 64 × 128 weights from
shared memory into registers, converts them to bfloat16 there and multiplies (wgmma takes the left
operand from registers); each block's float32 sum is scaled and added. Weights stream through rings
of many stages: what matters is how many bytes are under way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.compat import (
    COMPILER_PARAMS,
    interpret_mode,
    named_kernel,
    transposed,
)
from pallas_kernels.hopper.gather import finish_gathers, optional_index, start_gather
from pallas_kernels.hopper.tiles import HALF, place_in_bands, swizzled
from pallas_kernels.quantized_experts.chunks import Chunks
from pallas_kernels.quantized_experts.convert import to_bfloat16
from pallas_kernels.quantized_experts.decode_config import COLUMNS, DecodeConfig, Rings
from pallas_kernels.quantized_experts.format import BLOCK, QuantizedMatrices

__all__ = ["product"]

# Of a thread that loads and of one that multiplies, by warpgroups that multiply: no more together
# than a block begins with, which is 64 k over its threads, rounded down to a multiple of 8.
REGISTERS = {1: (56, 232), 2: (56, 224), 4: (40, 104)}


def product(
    rows: jax.Array,
    weights: QuantizedMatrices,
    chunks: Chunks,
    index: jax.Array | None,
    *,
    copies: int = 1,
    places: int,
    finish: Callable[[tuple[Any, ...]], Any],
    name: str,
    config: DecodeConfig,
) -> jax.Array:
    """out[a] = finish(rows[a] @ weights of its slot, part by part).

    Args:
        rows: bfloat16 [R, K] picked by `index` // `copies`, or with None [A, K] in order.
        weights: values [S, parts, N, K], scales [S, parts, N / 128, K / 128]; N and K multiples of
            128.
        chunks: of `config.columns` places.
        index: int32 [A], the copy of a row at each place; out of range is a row of zeros.
        copies: of a row.
        places: A.
        finish: from the parts' float32 values to one of the same shape.
        name: of the kernel, in profiles.
        config: sizes.

    Returns:
        bfloat16 [A, N]; places that no chunk wants may be left unwritten.
    """
    _, parts, n, k = weights.values.shape
    columns, row_parts, phases = config.columns, config.row_parts, config.phases
    n_tiles, k_steps = n // config.rows, k // BLOCK
    rings = Rings(config, k_steps)
    gather = index is not None
    interpreting = interpret_mode() is not None

    def body(
        chunk_slot, chunk_first, chunk_wanted, count, index, rows, values, scales, out, scratch
    ):
        w_smem, x_smem, full, empty = (scratch[key] for key in ("w", "x", "full", "empty"))
        sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
        chunks_here = count[0]
        mine = lax.div(chunks_here * n_tiles - sm + (config.sms - 1), config.sms)

        def place(i):
            return place_in_bands(sm + i * config.sms, chunks_here, n_tiles, config.band)

        def load_rows(first, wanted, along, target, barrier):
            def load(size):
                source = rows.at[pl.ds(first, size), along]
                plgpu.copy_gmem_to_smem(source, target.at[pl.ds(0, size)], barrier)

            sizes = [size for size in COLUMNS if size <= columns]
            for fewer, size in zip([0, *sizes], sizes, strict=False):
                pl.when((wanted > fewer) & (wanted <= size))(partial(load, size))

        def announce(step):
            tile = lax.div(step, k_steps)
            plgpu.barrier_arrive(full.at[rings.slot(*rings.turn(tile, step - tile * k_steps))])

        def load_tile(i, _):
            chunk, n_tile = place(i)
            slot_of_chunk, wanted = chunk_slot[chunk], chunk_wanted[chunk]
            first = chunk_first[chunk] * columns

            def load_step(k, _):
                step = i * k_steps + k
                phase, turn = rings.turn(i, k)
                slot = rings.slot(phase, turn)
                if gather:  # what was started before, while waiting for room

                    @pl.when(step >= config.lag)
                    def announce_earlier():
                        finish_gathers(config.lag - 1)
                        announce(step - config.lag)

                @pl.when(turn >= config.stages)
                def wait_for_room():
                    plgpu.barrier_wait(empty.at[slot])

                along = pl.ds(k * BLOCK, BLOCK)
                for part in range(parts):
                    source = values.at[
                        slot_of_chunk, part, pl.ds(n_tile * config.rows, config.rows), along
                    ]
                    plgpu.copy_gmem_to_smem(source, w_smem.at[slot, part], full.at[slot])
                if gather:
                    start_gather(rows, index, first, k * BLOCK, x_smem.at[slot], copies)
                else:
                    load_rows(first, wanted, along, x_smem.at[slot], full.at[slot])

            lax.fori_loop(0, k_steps, load_step, None)

        @pl.when(warpgroup == config.multiplying)
        def loading():
            plgpu.set_max_registers(REGISTERS[config.multiplying][0], action="decrease")
            lax.fori_loop(0, mine, load_tile, None)
            if gather:
                finish_gathers(0)
                steps = mine * k_steps
                late = jnp.maximum(steps - config.lag, 0)
                lax.fori_loop(late, steps, lambda step, _: announce(step), None)
            for phase in range(phases):  # every release is awaited before the block ends
                turns = mine * rings.count(phase)

                def drain(turn, _, phase=phase):
                    plgpu.barrier_wait(empty.at[rings.slot(phase, turn)])

                lax.fori_loop(jnp.maximum(turns - config.stages, 0), turns, drain, None)

        def multiply_tile(i, _):
            phase, row_part = lax.div(warpgroup, row_parts), lax.rem(warpgroup, row_parts)
            chunk, n_tile = place(i)
            slot_of_chunk, first = chunk_slot[chunk], chunk_first[chunk] * columns
            row = n_tile * config.rows + row_part * HALF
            block = lax.div(row, BLOCK)

            def step(turn_in_tile, totals):
                k = turn_in_tile * phases + phase
                slot = rings.slot(phase, i * rings.count(phase) + turn_in_tile)
                # Asked for before the wait, so that their latency is that of the weights.
                factors = [scales[slot_of_chunk, part, block, k] for part in range(parts)]
                plgpu.barrier_wait(full.at[slot])

                def products(*accumulators):
                    for part, accumulator in enumerate(accumulators):
                        left = to_bfloat16(w_smem.at[slot, part, pl.ds(row_part * HALF, HALF)])
                        if interpreting:  # which knows no operands in registers
                            scratch["left"][warpgroup] = left
                            left = scratch["left"].at[warpgroup]
                        plgpu.wgmma(accumulator, left, transposed(x_smem.at[slot]))
                    plgpu.wgmma_wait(0)
                    return tuple(accumulator[...] for accumulator in accumulators)

                sums = pl.run_scoped(
                    products, *(plgpu.ACC((HALF, columns), jnp.float32) for _ in range(parts))
                )
                plgpu.barrier_arrive(empty.at[slot])
                return tuple(t + s * f for t, s, f in zip(totals, sums, factors, strict=True))

            zeros = jnp.zeros((HALF, columns), jnp.float32)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            totals = lax.fori_loop(0, rings.count(phase), step, (zeros,) * parts)
            finish_tile(totals, i, phase, row_part, first, row)

        def finish_tile(totals, i, phase, row_part, first, row):
            def store(totals):
                values = finish(totals).astype(out.dtype)
                buffer = scratch["out"].at[row_part]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                transposed(buffer)[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                target = out.at[pl.ds(first, columns), pl.ds(row, HALF)]
                plgpu.copy_smem_to_gmem(buffer, target)

            if phases == 1:
                store(totals)
                return
            sums, ready, taken = scratch["sums"], scratch["ready"], scratch["taken"]

            @pl.when(phase == 1)
            def hand_over():
                @pl.when(i > 0)
                def wait_until_taken():
                    plgpu.barrier_wait(taken.at[row_part])

                for part, total in enumerate(totals):
                    sums[row_part, part] = total
                plgpu.barrier_arrive(ready.at[row_part])

            @pl.when(phase == 0)
            def add_up():
                plgpu.barrier_wait(ready.at[row_part])
                others = [sums[row_part, part] for part in range(parts)]
                plgpu.barrier_arrive(taken.at[row_part])
                store(tuple(t + o for t, o in zip(totals, others, strict=True)))

        @pl.when(warpgroup < config.multiplying)
        def multiplying():
            plgpu.set_max_registers(REGISTERS[config.multiplying][1], action="increase")
            lax.fori_loop(0, mine, multiply_tile, None)
            plgpu.wait_smem_to_gmem(0)

            @pl.when((warpgroup >= row_parts) & (mine > 0))
            def wait_for_the_last():
                if phases > 1:
                    plgpu.barrier_wait(scratch["taken"].at[lax.rem(warpgroup, row_parts)])

    bf16, total = rows.dtype, phases * config.stages
    value_type = weights.values.dtype
    scratch = {
        "w": plgpu.SMEM(
            (total, parts, config.rows, BLOCK), value_type, transforms=swizzled(value_type)
        ),
        "x": plgpu.SMEM((total, columns, BLOCK), bf16, transforms=swizzled(bf16)),
        "out": plgpu.SMEM((row_parts, columns, HALF), bf16, transforms=swizzled(bf16)),
        "full": plgpu.Barrier(num_arrivals=parts + 1, num_barriers=total),
        "empty": plgpu.Barrier(num_arrivals=row_parts, num_barriers=total),
    }
    if interpreting:
        scratch["left"] = plgpu.SMEM((config.multiplying, HALF, BLOCK), bf16)
    if phases > 1:
        scratch |= {
            "sums": plgpu.SMEM((row_parts, parts, HALF, columns), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=1, num_barriers=row_parts),
            "taken": plgpu.Barrier(num_arrivals=1, num_barriers=row_parts),
        }
    kernel = named_kernel(
        body,
        name,
        out_type=jax.ShapeDtypeStruct((places, n), bf16),
        scratch_types=[scratch],
        grid=(config.sms,),
        grid_names=("sm",),
        num_threads=config.multiplying + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    return kernel(
        chunks.slot,
        chunks.first,
        chunks.wanted,
        chunks.count,
        optional_index(index),
        rows,
        weights.values,
        weights.scales,
    )
