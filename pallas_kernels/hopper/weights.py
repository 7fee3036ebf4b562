"""Gradients of the groups' matrices: lhs[rows of g]ᵀ @ rhs[rows of g].

The groups lie along the contraction. The ring of stages is that of the row tiles. The number of
steps of a tile is its group's rows, so it is read from the offsets; an empty group's tile takes no
step and is written as zeros.

Tiles of large groups take long, so they are dealt out largest first, to and fro (0 1 2 2 1 0 0 …).
In the groups' own order some blocks would get a large group's tiles and no small ones in return:
1.5 to 2.5 times the time of equal shares for the routing of a fresh router.
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

from pallas_kernels.hopper.compat import transposed
from pallas_kernels.hopper.config import RowsConfig
from pallas_kernels.hopper.gather import optional_index, start_gather
from pallas_kernels.hopper.ragged import zero_outside
from pallas_kernels.hopper.ring import CLUSTER, Ring, ring_barriers, ring_kernel
from pallas_kernels.hopper.tiles import (
    COMPUTE,
    EIGHT,
    HALF,
    out_scratch,
    place_in_bands,
    store_strips,
    swizzled,
)

__all__ = ["dealt", "largest_first", "nth_dealt", "weights_kernel"]


def weights_kernel(
    *,
    name: str,
    groups: int,
    tile_m: int,
    m_tiles: int,
    n_tiles: int,
    gather: str,
    config: RowsConfig,
    out_type: Any,
    dtype: Any,
    ragged: bool = False,
    copies: int = 1,
) -> Callable[..., Any]:
    """Builds a kernel `f(first_step, order, index, lhs, rhs) -> out`.

    Args:
        name: of the kernel, in profiles.
        groups: G.
        tile_m: rows of a tile, 128 or 256; with 256, `tile_n` is at most 128.
        m_tiles, n_tiles: tiles of a matrix, `tile_m` rows and `tile_n` columns each.
        gather: the operand whose rows `index` // `copies` picks, "lhs" or "rhs"; or neither, and
            the index is None.
        config: sizes; `tile_k` rows of a group are a step.
        out_type: [G, M, N].
        dtype: of the operands.
        ragged: groups of any size.
        copies: what the index counts for each row.

    The kernel's `first_step` is int32 [G + 1]: where each group begins, in steps. With `ragged` it
    is int32 [2, G], a group's first row and the row after its last. `order` is `largest_first` of
    the groups' sizes.
    """
    if ragged and gather:
        raise ValueError("rows of groups of any size lie in order")
    tile_n, tile_k, stages = config.tile_n, config.tile_k, config.stages
    share = tile_m // COMPUTE  # rows of a warpgroup
    # A cluster's blocks have tiles beside each other, and what these share comes by TMA.
    cluster, shared = config.cluster, "lhs" if gather == "rhs" else "rhs"
    m_units = m_tiles // (1 if shared == "lhs" else cluster)
    n_units = n_tiles // (cluster if shared == "lhs" else 1)
    units = groups * m_units * n_units
    if units * cluster != groups * m_tiles * n_tiles:
        raise ValueError(f"{m_tiles} × {n_tiles} tiles cannot be shared out to pairs of blocks")

    def body(first_step, order, index, lhs, rhs, out, scratch):
        lhs_smem, rhs_smem, out_smem = (
            scratch[name] for name in ("lhs_smem", "rhs_smem", "out_smem")
        )
        ring = Ring(config, bool(gather), scratch["full"], scratch["empty"])
        sm = lax.axis_index("sm")
        warpgroup = lax.axis_index("warpgroup")
        mine = dealt(units, sm, config.clusters)

        def place(i):
            """Group, tile row and tile column of this block's i-th."""
            at = nth_dealt(i, sm, config.clusters)
            position = lax.div(at, m_units * n_units)
            rest = at - position * (m_units * n_units)
            group = order[position]
            height = max(1, config.band * m_units // m_tiles)
            m, n = place_in_bands(rest, m_units, n_units, height)
            if cluster > 1:
                rank = lax.axis_index(CLUSTER)
                m, n = (m, n * cluster + rank) if shared == "lhs" else (m * cluster + rank, n)
            return group, m, n

        def span(group):
            """First row that is loaded, first row, row after the last, and steps of a group.

            There are two steps at least, so that the first and the last are always two.
            """
            begin, end = first_step[0, group], first_step[1, group]
            first = lax.div(begin, EIGHT) * EIGHT
            steps = jnp.maximum(lax.div(end - first + (tile_k - 1), tile_k), 2)
            return first, begin, end, jnp.where(begin < end, steps, 0)

        def fetch(operand, ref, column, step, target, barrier):
            if gather == operand:
                start_gather(ref, index, step * tile_k, column, target, copies)
                return
            rows = pl.ds(step if ragged else step * tile_k, tile_k)
            source = ref.at[rows, pl.ds(column, target.shape[1])]
            axes = CLUSTER if cluster > 1 and operand == shared else None
            plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=axes)

        @ring.load
        def load():
            def tile(i, done):
                group, m, n = place(i)
                if ragged:
                    first, _, _, count = span(group)
                else:
                    first = first_step[group]
                    count = first_step[group + 1] - first

                def at(k):
                    return first + (k * tile_k if ragged else k)

                def step(k, _):
                    slot, full = ring.begin_loading(done + k)
                    fetch("lhs", lhs, m * tile_m, at(k), lhs_smem.at[slot], full)
                    fetch("rhs", rhs, n * tile_n, at(k), rhs_smem.at[slot], full)

                lax.fori_loop(0, count, step, None)
                return done + count

            return lax.fori_loop(0, mine, tile, jnp.int32(0))

        @ring.multiply
        def multiply():
            def tile(i, done):
                group, m, n = place(i)
                prepare = None
                if ragged:
                    first, begin, end, count = span(group)

                    def prepare(slot, k):
                        """Zeroes the neighbours' rows, in both: zero times infinity is not zero."""
                        at = first + k * tile_k
                        zero_outside(lhs_smem.at[slot], begin - at, end - at)
                        zero_outside(rhs_smem.at[slot], begin - at, end - at)
                        plgpu.commit_smem()
                else:
                    count = first_step[group + 1] - first_step[group]

                def products(accumulator):
                    def multiply_stage(slot):
                        columns = lhs_smem.at[slot, :, pl.ds(warpgroup * share, share)]
                        plgpu.wgmma(accumulator, transposed(columns), rhs_smem.at[slot])

                    consume = partial(ring.consume, done, count, multiply_stage, prepare=prepare)
                    pl.when(count > 0)(consume)
                    return accumulator[...]

                values = pl.run_scoped(products, plgpu.ACC((share, tile_n), jnp.float32))
                values = values.astype(out.dtype)
                for half in range(share // HALF):
                    row = m * tile_m + warpgroup * share + half * HALF
                    rows = values[half * HALF : (half + 1) * HALF]
                    store_strips(rows, out.at[group], out_smem, warpgroup, row, n * tile_n)
                return done + count

            lax.fori_loop(0, mine, tile, jnp.int32(0))

    scratch = {
        "lhs_smem": plgpu.SMEM((stages, tile_k, tile_m), dtype, transforms=swizzled(dtype)),
        "rhs_smem": plgpu.SMEM((stages, tile_k, tile_n), dtype, transforms=swizzled(dtype)),
        "out_smem": out_scratch(out_type.dtype),
        **ring_barriers(config, arrivals=2),
    }
    kernel = ring_kernel(body, name, out_type=out_type, scratch=scratch, config=config)

    def call(
        first_step: jax.Array, order: jax.Array, index: jax.Array | None, *arrays: jax.Array
    ) -> Any:
        return kernel(first_step, order, optional_index(index), *arrays)

    return call


def dealt(units: int, block: Any, blocks: int) -> jax.Array:
    """How many units this block is dealt."""
    rounds, rest = divmod(units, blocks)
    position = (blocks - 1) - block if rounds % 2 else block
    return rounds + jnp.where(position < rest, jnp.int32(1), jnp.int32(0))


def nth_dealt(i: Any, block: Any, blocks: int) -> Any:
    """The unit that this block is dealt in round `i`; every other round goes backwards."""
    return i * blocks + jnp.where(lax.rem(i, jnp.int32(2)) == 0, block, (blocks - 1) - block)


def largest_first(sizes_G: jax.Array) -> jax.Array:
    """The groups by descending size, equal ones in order: int32 [G].

    Args:
        sizes_G: int32.
    """
    groups_G = jnp.arange(sizes_G.shape[0], dtype=jnp.int32)
    other, this = sizes_G[None, :], sizes_G[:, None]
    before_GG = (other > this) | ((other == this) & (groups_G[None, :] < groups_G[:, None]))
    rank_G = jnp.sum(before_GG, axis=1, dtype=jnp.int32)
    # Two small kernels on a GPU; a sort takes longer.
    found_GG = rank_G[None, :] == groups_G[:, None]
    return jnp.sum(jnp.where(found_GG, groups_G[None, :], 0), axis=1, dtype=jnp.int32)
