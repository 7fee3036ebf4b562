"""Groups of any size: the tile list, storing part of a tile, zeroing part of a stage.

Shared memory is tiled by 8 rows, so TMA copies begin at multiples of 8. A group's first tile or
step begins at the multiple of 8 before the group, and so holds up to 7 rows of the group before;
its last one may hold rows of the group after. Loads take whatever is there. Products of rows do not
mix rows, so only storing must leave the neighbours' alone; sums over rows need them zeroed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.compat import interpret_mode
from pallas_kernels.hopper.tiles import EIGHT, HALF, ROWS, STRIP, swizzled

__all__ = [
    "RaggedTileMap",
    "padded_rows",
    "ragged_tile_map",
    "store_part_strips",
    "zero_outside",
]

THREADS = 128
CHUNK = 16  # bytes that a thread moves at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedTileMap:
    """What the tiles hold where groups have any size; as `TileMap` where they are whole tiles.

    group: int32 [tiles], −1 for a tile that is to be zero.
    rows: int32 [tiles, 3], a tile's first row in eights, for the compiler must know that it is a
        multiple, the first row of its group, and the row after the group's last.
    count: int32 [1], the number of tiles.
    """

    group: jax.Array
    rows: jax.Array
    count: jax.Array


def padded_rows(rows_MN: jax.Array) -> jax.Array:
    """The rows followed by zeros up to a multiple of 8, which TMA needs."""
    return jnp.pad(rows_MN, ((0, -rows_MN.shape[0] % EIGHT), (0, 0)))


def ragged_tile_map(spans_2G: jax.Array, rows: int) -> RaggedTileMap:
    """Makes the list of tiles of groups of any size, and of the rows that none of them has.

    Args:
        spans_2G: int32, the first row of each group and the row after its last; each begins where
            the one before ends.
        rows: M.
    """
    (begin_G, end_G), groups = spans_2G, spans_2G.shape[1]
    # Before the groups and after them there may be rows of other groups, or of none.
    begin = jnp.concatenate([jnp.zeros((1,), jnp.int32), begin_G, end_G[-1:]])
    end = jnp.concatenate([begin_G[:1], end_G, jnp.full((1,), rows, jnp.int32)])
    first = begin // EIGHT
    tiles = jnp.where(end > begin, -(-(end - first * EIGHT) // ROWS), 0)
    after = jnp.cumsum(tiles, dtype=jnp.int32)
    index = jnp.arange(most_tiles(rows, groups), dtype=jnp.int32)
    part = jnp.sum(index[:, None] >= after[None, :], axis=1, dtype=jnp.int32)
    part = jnp.minimum(part, groups + 1)
    row = first[part] + (index - (after - tiles)[part]) * (ROWS // EIGHT)
    group = jnp.where(part <= groups, part - 1, -1)
    return RaggedTileMap(group, jnp.stack([row, begin[part], end[part]], axis=1), after[-1:])


def most_tiles(rows: int, groups: int) -> int:
    """A bound on the number of tiles: a group has at most (size + 7 + 127) / 128."""
    parts = min(groups + 2, rows)
    return (rows + parts * (EIGHT - 1 + ROWS - 1)) // ROWS


def store_part_strips(
    values: Any,
    out: Any,
    out_smem: Any,
    warpgroup: Any,
    row: Any,
    column: Any,
    begin: Any,
    end: Any,
) -> None:
    """Writes those of a warpgroup's [64, C] values that belong to rows from `begin` to `end`.

    Where that is all 64, by TMA, otherwise by the threads, 16 bytes each.

    Args:
        values, out, out_smem, warpgroup, row, column: as in `store_strips`.
        begin, end: first row, and the row after the last, in `out`.
    """
    whole = (begin <= row) & (end >= row + HALF)
    some = jnp.logical_not(whole) & (begin < row + HALF) & (end > row)
    for strip in range(values.shape[1] // STRIP):
        buffer = out_smem.at[warpgroup, strip % 2]
        # The store before this one, of the other buffer, may go on; the call before may have left
        # out its last ones, so that none may be counted on to be the latest.
        plgpu.wait_smem_to_gmem(0 if strip == 0 else 1, wait_read_only=True)
        buffer[...] = values[:, strip * STRIP : (strip + 1) * STRIP]
        plgpu.commit_smem()
        first = column + strip * STRIP

        def store(buffer: Any = buffer, first: Any = first) -> None:
            plgpu.copy_smem_to_gmem(buffer, out.at[pl.ds(row, HALF), pl.ds(first, STRIP)])

        pl.when(whole)(store)
        pl.when(some)(partial(_copy_rows, buffer, out, row, first, begin, end))


def _copy_rows(source: Any, out: Any, row: Any, column: Any, begin: Any, end: Any) -> None:
    """out[row + r, column:] = source[r] where begin ≤ row + r < end; of 64 × 64, swizzled."""
    width = out.shape[1]
    if interpret_mode() is not None:  # no other rows: another block may write them meanwhile
        first, last = jnp.maximum(begin - row, 0), jnp.minimum(end - row, HALF)
        for count in (64, 32, 16, 8, 4, 2, 1):

            @pl.when(last - first >= count)
            def copy_some(first: Any = first, count: int = count) -> None:
                target = out.at[pl.ds(row + first, count), pl.ds(column, STRIP)]
                target[...] = source[pl.ds(first, count)]

            first = first + jnp.where(last - first >= count, count, 0)
        return

    types = (plgpu.RefType(swizzled(out.dtype)), plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 4)

    @plgpu.inline_mgpu(arg_types=types)
    def copy(_, source, out, row, column, begin, end):
        _emit_copy(source, out, row, column, begin, end, width)

    copy(source, out, *(jnp.int32(a) for a in (row, column, begin, end)))


def _lanes() -> tuple[Any, Any]:
    """Row and 16-byte chunk of a thread, where 8 threads take a row of 128 bytes."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32 = ir.IntegerType.get_signless(32)
    lane = arith.andi(utils.thread_idx(), utils.c(THREADS - 1, i32))
    return arith.shrui(lane, utils.c(3, i32)), arith.andi(lane, utils.c(7, i32))


def _between(row: Any, begin: Any, end: Any) -> Any:
    from jaxlib.mlir.dialects import arith

    at_least, below = arith.CmpIPredicate.sge, arith.CmpIPredicate.slt
    return arith.andi(arith.cmpi(at_least, row, begin), arith.cmpi(below, row, end))


def _emit_copy(source, out, row, column, begin, end, width) -> None:
    """The instructions: 16 rows at a time."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    row, column, begin, end = (value.registers.item() for value in (row, column, begin, end))
    at, chunk = _lanes()
    # 16 rows further the lowest three bits of the row, which the chunk is exclusive-ored with, are
    # the same.
    low = arith.andi(at, utils.c(7, i32))
    place = arith.addi(
        arith.muli(at, utils.c(128, i32)), arith.muli(arith.xori(chunk, low), utils.c(CHUNK, i32))
    )
    source_base = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(source)), place)
    column = arith.addi(column, arith.muli(chunk, utils.c(CHUNK // 2, i32)))
    exists = arith.cmpi(arith.CmpIPredicate.slt, column, utils.c(width, i32))
    out_base = llvm.ptrtoint(i64, utils.memref_ptr(out))
    for step in range(HALF * 8 // THREADS):
        line = arith.addi(row, arith.addi(at, utils.c(step * 16, i32)))
        wanted = arith.andi(_between(line, begin, end), exists)
        element = arith.addi(
            arith.muli(arith.extsi(i64, line), utils.c(width, i64)), arith.extsi(i64, column)
        )
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [
                arith.addi(out_base, arith.muli(element, utils.c(2, i64))),
                arith.addi(source_base, utils.c(step * 16 * 128, i32)),
                arith.extui(i32, wanted),
            ],
            "{.reg .pred p; .reg .b32 a, b, c, d;\n"
            "setp.ne.s32 p, $2, 0;\n"
            "@p ld.shared.v4.b32 {a, b, c, d}, [$1];\n"
            "@p st.global.v4.b32 [$0], {a, b, c, d};}",
            "l,r,r,~{memory}",
            has_side_effects=True,
        )


def zero_outside(target: Any, begin: Any, end: Any) -> None:
    """target[r] = 0 unless begin ≤ r < end; `commit_smem` before it is multiplied.

    All multiplying warpgroups may do so at a time: where one writes, another reads its own zeros.

    Args:
        target: bfloat16 [64, C] in shared memory, swizzled.
        begin, end: first row that stays, and the row after the last; any numbers.
    """
    rows, columns = target.shape
    if interpret_mode() is not None:
        index = jnp.arange(rows, dtype=jnp.int32)
        inside = ((index >= begin) & (index < end))[:, None]
        values = target[...]
        target[...] = jnp.where(inside, values, jnp.zeros_like(values))
        return

    types = (plgpu.RefType(swizzled(target.dtype)), *[plgpu.Layout.WG_SPLAT] * 2)

    @plgpu.inline_mgpu(arg_types=types)
    def zero(_, target, begin, end):
        _emit_zeros(target, begin, end, rows, columns)

    zero(target, jnp.int32(begin), jnp.int32(end))


def _emit_zeros(target, begin, end, rows, columns) -> None:
    """The instructions: whole lines of 128 bytes, so that the swizzle does not matter."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i32 = ir.IntegerType.get_signless(32)
    begin, end = (value.registers.item() for value in (begin, end))
    at, chunk = _lanes()
    panels = columns * 2 // 128
    eighth = arith.shrui(at, utils.c(3, i32))
    place = arith.addi(
        arith.muli(eighth, utils.c(1024 * panels, i32)),
        arith.addi(
            arith.muli(arith.andi(at, utils.c(7, i32)), utils.c(128, i32)),
            arith.muli(chunk, utils.c(CHUNK, i32)),
        ),
    )
    base = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(target)), place)
    for step in range(rows * 8 // THREADS):
        line = arith.addi(at, utils.c(step * 16, i32))
        stays = arith.extui(i32, _between(line, begin, end))
        for panel in range(panels):
            offset = utils.c(step * 2 * 1024 * panels + panel * 1024, i32)
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [arith.addi(base, offset), stays, utils.c(0, i32)],
                "{.reg .pred p; setp.eq.s32 p, $1, 0;\n"
                "@p st.shared.v4.b32 [$0], {$2, $2, $2, $2};}",
                "r,r,r,~{memory}",
                has_side_effects=True,
            )
