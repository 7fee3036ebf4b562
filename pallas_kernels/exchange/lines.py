"""The instructions of warpgroups that move rows: 16 bytes of a line of 2048 for each thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pallas_kernels.hopper.simt_emit import assembly

__all__ = ["LINE", "VECTOR", "address", "emit_load", "emit_rows", "emit_store", "line"]

THREADS = 128  # of a warpgroup
VECTOR = 16  # bytes of a thread's load or store
LINE = THREADS * VECTOR  # of a warpgroup's


def address(ref: Any) -> Any:
    """Of global memory, an integer of 64 bits."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))


def emit_rows(source: Any, targets: Sequence[Any], words: Sequence[Any], row_bytes: int) -> None:
    """A warpgroup's threads load all rows before they store them.

    Args:
        source: the rows.
        targets: the results that they go to.
        words: rows of the source, rows of the targets, whether they go.
        row_bytes: of a row.
    """
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    count = len(targets)
    from_rows, to_rows, goes = (words[n * count : (n + 1) * count] for n in range(3))
    moves = [(n, further) for n in range(count) for further in range(0, row_bytes, LINE)]
    loaded = [
        emit_load(line(source, from_rows[n], row_bytes, further), goes[n], further, row_bytes)
        for n, further in moves
    ]
    i32 = ir.IntegerType.get_signless(32)
    for (n, further), values in zip(moves, loaded, strict=True):
        parts = [llvm.extractvalue(i32, values, [part]) for part in range(4)]
        emit_store(
            line(targets[n], to_rows[n], row_bytes, further), parts, further, row_bytes, goes[n]
        )


def _lane_offset() -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32 = ir.IntegerType.get_signless(32)
    lane = arith.andi(utils.thread_idx(), utils.c(THREADS - 1, i32))
    return arith.muli(lane, utils.c(VECTOR, i32))


def line(ref: Any, row: Any, row_bytes: int, further: int) -> Any:
    """Address of a thread's 16 bytes, `further` bytes into a row, of the 2048 of a warpgroup."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    start = arith.muli(arith.extui(i64, row), utils.c(row_bytes, i64))
    within = arith.extui(i64, arith.addi(_lane_offset(), utils.c(further, i32)))
    return arith.addi(address(ref), arith.addi(start, within))


def _inside(go: Any, further: int, row_bytes: int) -> Any:
    """`go`, an int32, or 0 for threads beyond the row's end."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32 = ir.IntegerType.get_signless(32)
    if further + LINE <= row_bytes:
        return go
    left = utils.c(row_bytes - further, i32)
    return arith.andi(
        go, arith.extui(i32, arith.cmpi(arith.CmpIPredicate.ult, _lane_offset(), left))
    )


def emit_load(start: Any, go: Any, further: int, row_bytes: int) -> Any:
    """A thread's 16 bytes as a structure of four int32, zeros unless `go`; no other cached copy.

    Rows may have been written by this kernel, as long as that was waited for.
    """
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return assembly(
        "{.reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, $6; mov.b32 $1, $6;"
        " mov.b32 $2, $6; mov.b32 $3, $6;"
        " @p ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];}",
        "=&r,=&r,=&r,=&r,l,r,r",
        ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
        start,
        _inside(go, further, row_bytes),
        utils.c(0, ir.IntegerType.get_signless(32)),
        ordered=True,
    )


def emit_store(
    start: Any, words: Sequence[Any], further: int, row_bytes: int, go: Any = None
) -> None:
    """A thread's four int32 to its 16 bytes, if `go`, an int32; None: in any case."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    if go is None:
        go = utils.c(1, ir.IntegerType.get_signless(32))
    assembly(
        "{.reg .pred p; setp.ne.s32 p, $5, 0; @p st.global.v4.b32 [$0], {$1, $2, $3, $4};}",
        "l,r,r,r,r,r",
        None,
        start,
        *words,
        _inside(go, further, row_bytes),
    )
