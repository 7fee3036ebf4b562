"""Loading rows by index into shared memory: cp.async by all threads of the loading warpgroup.

Hopper's TMA has no gather. 16 bytes a thread and instruction, written where a TMA copy with a
128-byte swizzle would have put them; rows whose index is out of range become zeros (a source size
of 0). Facts: PTX ISA, `cp.async` and "shared memory matrix layout".
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.compat import interpret_mode
from pallas_kernels.hopper.tiles import swizzled

__all__ = ["finish_gathers", "optional_index", "start_gather"]

THREADS = 128
CHUNK = 16  # bytes of a copy


def optional_index(index: jax.Array | None) -> jax.Array:
    """The operand for an index that may be missing: kernels have a fixed number of operands."""
    return jnp.zeros((1,), jnp.int32) if index is None else index


def start_gather(
    source: Any, index: Any, first: Any, column: Any, target: Any, copies: int = 1
) -> None:
    """Starts copying source[index[first + r] // copies, column : column + C] to target[r].

    What lies outside of the source becomes zero, rows and columns.

    Args:
        source: [N, D] bfloat16 in global memory.
        index: int32 in global memory.
        first: where the target's rows begin in `index`.
        column: a multiple of 8.
        target: [R, C] in shared memory, swizzled; C 64, 128, … up to 1024, R a multiple of
            1024 / C.
        copies: what the index counts for each row of the source.
    """
    rows, columns = target.shape
    limit, width = source.shape
    chunks = columns * 2 // CHUNK
    if chunks not in (8, 16, 32, 64, 128) or rows % (THREADS // chunks):
        raise ValueError(
            f"a gather of {rows} rows of {columns} columns does not fit {THREADS} threads"
        )
    if interpret_mode() is not None:  # by plain loads and stores
        at = lax.div(index[pl.ds(first, rows)], copies)[:, None]
        along = column + jnp.arange(columns, dtype=jnp.int32)[None, :]
        values = source[...][jnp.clip(at, 0, limit - 1), jnp.minimum(along, width - 1)]
        inside = (index[pl.ds(first, rows)] >= 0)[:, None] & (at < limit) & (along < width)
        target[...] = jnp.where(inside, values, jnp.zeros_like(values))
        return

    types = (
        plgpu.RefType(),
        plgpu.RefType(),
        plgpu.Layout.WG_SPLAT,
        plgpu.Layout.WG_SPLAT,
        plgpu.RefType(swizzled(source.dtype)),
    )

    @plgpu.inline_mgpu(arg_types=types)
    def copy(_, source, index, first, column, target):
        sizes = (rows, columns, limit, width, copies)
        _emit_copies(source, index, first, column, target, *sizes)

    copy(source, index, first, column, target)


def _emit_copies(source, index, first, column, target, rows, columns, limit, width, copies) -> None:
    """The instructions; a thread copies one chunk of every row that lies 128 / (C / 8) further."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)

    def c32(value: int):
        return utils.c(value, i32)

    def c64(value: int):
        return utils.c(value, i64)

    def as_i64(pointer):
        return llvm.ptrtoint(i64, pointer)

    def wide(value):
        return arith.extsi(i64, value)

    first, column = (value.registers.item() for value in (first, column))
    row_stride = ir.MemRefType(source.type).get_strides_and_offset()[0][0] * 2
    chunks = columns * 2 // CHUNK
    stride = THREADS // chunks  # rows between a thread's copies
    thread = utils.thread_idx()
    lane = arith.andi(thread, c32(THREADS - 1))
    chunk = arith.andi(lane, c32(chunks - 1))
    row = arith.divui(lane, c32(chunks))

    offset = arith.addi(arith.muli(column, c32(2)), arith.muli(chunk, c32(CHUNK)))
    source_base = arith.addi(as_i64(utils.memref_ptr(source)), wide(offset))
    index_base = arith.addi(
        as_i64(utils.memref_ptr(index)), wide(arith.muli(arith.addi(first, row), c32(4)))
    )
    target_base = llvm.ptrtoint(i32, utils.memref_ptr(target))
    across, within = arith.divui(chunk, c32(8)), arith.andi(chunk, c32(7))
    below: Any = arith.CmpIPredicate.ult
    last_column = arith.addi(column, arith.muli(chunk, c32(CHUNK // 2)))
    most = arith.select(arith.cmpi(below, last_column, c32(width)), c32(CHUNK), c32(0))
    steps = range(rows // stride)
    picked: list[Any] = [  # all indices first: their latencies overlap
        llvm.inline_asm(
            i32,
            [arith.addi(index_base, c64(step * stride * 4))],
            "ld.global.nc.b32 $0, [$1];",
            "=r,l",
        )
        for step in steps
    ]
    if copies > 1:  # negative ones stay beyond the end
        picked = [arith.divui(at, c32(copies)) for at in picked]
    for step, at in zip(steps, picked, strict=True):
        at_row = arith.addi(row, c32(step * stride))
        eighth, low = arith.divui(at_row, c32(8)), arith.andi(at_row, c32(7))
        block = arith.addi(arith.muli(eighth, c32(columns // 64)), across)
        place = arith.addi(arith.muli(block, c32(1024)), arith.muli(low, c32(128)))
        place = arith.addi(place, arith.muli(arith.xori(within, low), c32(CHUNK)))
        size = arith.select(arith.cmpi(below, at, c32(limit)), most, c32(0))
        safe = arith.minui(at, c32(limit - 1))
        address = arith.addi(source_base, arith.muli(arith.extui(i64, safe), c64(row_stride)))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [arith.addi(target_base, place), address, size],
            "cp.async.cg.shared.global [$0], [$1], 16, $2;",
            "r,l,r",
            has_side_effects=True,
        )
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [], "cp.async.commit_group;", "", has_side_effects=True
    )


def finish_gathers(pending: int) -> None:
    """Waits until at most `pending` gathers are under way; the others may then be multiplied."""
    if interpret_mode() is not None:
        return

    @plgpu.inline_mgpu()
    def wait(_):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [],
            f"cp.async.wait_group {pending};\nfence.proxy.async.shared::cta;",
            "",
            has_side_effects=True,
        )

    wait()
