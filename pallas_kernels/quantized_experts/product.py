"""A finished wgmma product of e4m3 operands that overwrites its accumulator.

Pallas's own `wgmma` always adds, so that its accumulator must be set to zero first, 64 moves a
thread for each block of 128 of the contraction. Facts: PTX ISA, `wgmma.mma_async` (`scale-d`,
register fragments) and "matrix descriptor format".
"""

from __future__ import annotations

from typing import Any

from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.tiles import HALF, swizzled

__all__ = ["SINGLES", "fresh_product", "in_pairs"]

COLUMNS = 128
DEPTH = 128  # of the contraction: as many bytes as a swizzled row has
STEP = 32  # of the contraction, an instruction
SUMS = HALF * COLUMNS // 128  # of a thread
SINGLES: Any = plgpu.Layout._WGMMA_ACC_32BIT
"""The layout WGMMA with each value in a register of its own.

There neighbours are a pair to LLVM, of 64 bits: packed and unpacked at each use, they cost moves
and, where registers are few, spills.
"""


def _instructions() -> str:
    """The products of a block; operands: the sums, then the descriptors of rows and columns."""
    sums = "{" + ", ".join(f"${i}" for i in range(SUMS)) + "}"
    shape = f"m64n{COLUMNS}k{STEP}.f32.e4m3.e4m3"
    lines = [
        "{",
        ".reg .pred add;",
        ".reg .b64 rows, columns;",
        f"mov.b64 rows, ${SUMS};",
        f"mov.b64 columns, ${SUMS + 1};",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(DEPTH // STEP):
        if step:  # the start address counts 16 bytes
            lines += [f"add.s64 {name}, {name}, {STEP // 16};" for name in ("rows", "columns")]
        lines.append(f"setp.ne.b32 add, {int(step > 0)}, 0;")
        lines.append(f"wgmma.mma_async.sync.aligned.{shape} {sums}, rows, columns, add, 1, 1;")
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"]
    return "\n".join(lines)


def fresh_product(rows: Any, columns: Any, layout: Any = SINGLES) -> Any:
    """The product rows @ columnsᵀ as float32 [64, 128]; not interpreted.

    Args:
        rows: e4m3 [64, 128] in shared memory, swizzled.
        columns: e4m3 [128, 128], the contraction last, likewise.
        layout: of the result, `SINGLES` or WGMMA.
    """
    operand = plgpu.RefType(swizzled(jnp.float8_e4m3fn))
    result = plgpu.ShapeDtypeStruct((HALF, COLUMNS), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(operand, operand), return_type=result)
    def product(_, rows, columns):
        return _emit(rows, columns, layout.to_mgpu())

    return product(rows, columns)


def in_pairs(values: Any) -> Any:
    """The same values, from `SINGLES` to WGMMA."""
    wanted = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(values.shape, values.dtype, layout=wanted)

    @plgpu.inline_mgpu(arg_types=(SINGLES,), return_type=result)
    def convert(_, array):
        return array.to_layout(wanted.to_mgpu())

    return convert(values)


def _emit(rows: Any, columns: Any, layout: Any) -> Any:
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    f32, i32, i64 = ir.F32Type.get(), *(ir.IntegerType.get_signless(n) for n in (32, 64))
    # 128-byte swizzle, 1024 bytes between groups of 8 rows; the start address goes below.
    fields = 1 << 62 | (1024 >> 4) << 32 | 1 << 16

    def descriptor(ref):
        address = llvm.ptrtoint(i64, utils.memref_ptr(ref))
        start = arith.shrui(arith.andi(address, utils.c(0x3FFFF, i64)), utils.c(4, i64))
        return arith.ori(start, utils.c(fields, i64))

    sums: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * SUMS),
        [descriptor(rows), descriptor(columns)],
        _instructions(),
        ",".join(["=f"] * SUMS + ["l", "l"]),
        has_side_effects=True,
    )
    width = layout.vector_length
    vector = ir.VectorType.get((width,), f32)
    registers = []
    for first in range(0, SUMS, width):
        value = llvm.mlir_undef(vector)
        for lane in range(width):
            part = llvm.extractvalue(f32, sums, [first + lane])
            value = llvm.insertelement(value, part, utils.c(lane, i32))
        registers.append(value)
    shape = layout.registers_shape((HALF, COLUMNS))
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape), _layout=layout, _is_signed=None
    )
