"""8-bit values to bfloat16 in registers, as the left operand of wgmma."""

from __future__ import annotations

from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.compat import interpret_mode

__all__ = ["to_bfloat16"]

SPREAD = (0x1404, 0x3424)  # prmt: two of four bytes, each to the upper half of 16 bits
SIGN, REST = 0x80008000, 0x07F007F0
REBIAS = 0x7B807B80  # two bfloat16 of 2¹²⁰


def to_bfloat16(ref: Any) -> jax.Array:
    """Reads 8-bit values from shared memory as bfloat16, exactly; but NaN becomes ±480.

    A thread reads four bytes of a row at a time. They are converted where they lie, and then go to
    the threads that wgmma wants them in.
    """
    # Fixing the layout here keeps the loads 32 bits wide.
    values = plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA_UPCAST_2X)
    if interpret_mode() is not None:
        return values.astype(jnp.float32).astype(jnp.bfloat16)
    if values.dtype == jnp.int8:
        values = values.astype(jnp.bfloat16)
    else:
        values = _e4m3_to_bfloat16(values)
    return plgpu.layout_cast(values, plgpu.Layout.WGMMA)


def _e4m3_to_bfloat16(values: jax.Array) -> jax.Array:
    """Exponent and mantissa shifted to where bfloat16 has them, times 2¹²⁰ for the other bias.

    Subnormal values are so, too: they become subnormal bfloat16, which a multiplication does not
    flush. Hopper converts to float16 only, from where to bfloat16 it takes two steps more.
    """
    layout = plgpu.Layout.WGMMA_UPCAST_2X
    converted = plgpu.ShapeDtypeStruct(values.shape, jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=converted)
    def convert(_, array):
        import numpy as np
        from jax.experimental.mosaic.gpu import FragmentedArray
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm, vector

        i32, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        one, pair = ir.VectorType.get((1,), i32), ir.VectorType.get((2,), i32)
        steps = "".join(
            f"prmt.b32 spread, $2, 0, {spread:#x};\n"
            f"and.b32 sign, spread, {SIGN:#x};\n"
            "shr.b32 spread, spread, 4;\n"
            f"lop3.b32 spread, spread, {REST:#x}, sign, 0xea;\n"  # (spread & REST) | sign
            f"mul.bf16x2 ${half}, spread, rebias;\n"
            for half, spread in enumerate(SPREAD)
        )
        code = f"{{\n.reg .b32 spread, sign, rebias;\nmov.b32 rebias, {REBIAS:#x};\n{steps}}}"
        both = llvm.StructType.get_literal([i32, i32])
        out = np.empty_like(array.registers)
        for at, register in np.ndenumerate(array.registers):
            word = vector.extract(vector.bitcast(one, register), [], [0])
            halves: Any = llvm.inline_asm(both, [word], code, "=&r,=r,r")
            words = llvm.mlir_undef(pair)
            for half in range(2):
                position = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, half)).result
                words = llvm.insertelement(words, llvm.extractvalue(i32, halves, [half]), position)
            out[at] = vector.bitcast(ir.VectorType.get((4,), bf16), words)
        return FragmentedArray(_registers=out, _layout=array.layout, _is_signed=None)

    return convert(values)
