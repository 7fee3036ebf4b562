"""What programs of single threads multiply matrices with: reads of several words, and `mma`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.hopper.simt_emit import LANES, Compiled, Word, assembly

__all__ = ["load_words", "multiply_add"]

ROWS, DEPTH, COLUMNS = 16, 16, 8  # of one `mma`


def load_words(m: Any, ref: Any, index: Any, count: int) -> list[Any]:
    """ref[index : index + count] of an input, in the program's order.

    Args:
        m: the machine.
        ref: lies in global memory and is never written.
        index: a multiple of `count`.
        count: 1, 2 or 4.
    """
    if not isinstance(m, Compiled):
        assert not (index % count).any(), "not aligned"
        return [m.load(ref, index + i) for i in range(count)]
    names = ", ".join(f"${i}" for i in range(count))
    vector, names = ("", names) if count == 1 else (f".v{count}", f"{{{names}}}")
    return _words(
        f"ld.global.nc{vector}.b32 {names}, [${count}];",
        count,
        "l",
        m.integer_address(ref, index),
        ordered=True,  # before anything waits
    )


def multiply_add(m: Any, a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
    """A @ b + c of a warp, in the fragments of `mma.m16n8k16` (PTX ISA).

    Args:
        m: the machine.
        a: 4 words of bfloat16 pairs, [16, 16].
        b: 2 words of bfloat16 pairs, [16, 8].
        c: 4 words of float32, [16, 8].

    Returns:
        As c. The matrix unit adds with fewer bits than float32 has.
    """
    if isinstance(m, Compiled):
        return _words(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            4,
            ",".join("r" * 10),
            *(word.value for word in (*a, *b, *c)),
        )
    warps = m.thread.size // LANES
    group, quad = np.arange(LANES) // 4, np.arange(LANES) % 4
    left, right = np.zeros((warps, ROWS, DEPTH)), np.zeros((warps, DEPTH, COLUMNS))
    for half in range(2):
        for i, words in enumerate(a):
            depth = quad * 2 + i // 2 * 8 + half
            left[:, group + i % 2 * 8, depth] = _half(words, half)
        for i, words in enumerate(b):
            right[:, quad * 2 + i * 8 + half, group] = _half(words, half)
    out = []
    with np.errstate(all="ignore"):
        product = left @ right
        for i, words in enumerate(c):
            own = product[:, group + i // 2 * 8, quad * 2 + i % 2].reshape(-1)
            out.append((words.view(np.float32) + own).astype(np.float32).view(np.int32))
    return out


def _half(words: np.ndarray, half: int) -> np.ndarray:
    """The lower or the upper bfloat16 numbers as float64 [warps, lanes]."""
    bits = words & -(2**16) if half else words << 16
    return bits.view(np.float32).astype(np.float64).reshape(-1, LANES)


def _words(
    instruction: str, count: int, constraints: str, *operands: Any, ordered: bool = False
) -> list[Word]:
    """The words that an instruction writes to its first operands."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    struct = ", ".join(["i32"] * count)
    result = ir.Type.parse("i32" if count == 1 else f"!llvm.struct<({struct})>")
    constraints = ",".join(["=r"] * count + [constraints])
    loaded = assembly(instruction, constraints, result, *operands, ordered=ordered)
    if count == 1:
        return [Word(loaded)]
    i32 = ir.IntegerType.get_signless(32)
    return [Word(llvm.extractvalue(i32, loaded, [i])) for i in range(count)]
