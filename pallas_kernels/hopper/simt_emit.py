"""The instructions of single threads' programs: the machine of `pallas_kernels.hopper.simt`."""

# ruff: noqa: D102 (what the methods do, the protocol says)

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

__all__ = ["LANES", "Compiled", "Word", "assembly"]

LANES = 32
ALL = 0xFFFFFFFF
SHARED = 3  # the address space

LOG2_E = 1.4426950408889634
LOG2_E_REST = 1.92596298909109e-08  # what float32 leaves of it
LN_2 = 0.6931471805599453
LEAST = -128.0  # its exponential is 0 in float32


class Word:
    """A thread's int32, or its predicate."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def _apply(self, operation: Callable[..., Any], other: Any, *, swap: bool = False) -> Word:
        pair = (self.value, _as_value(other, self.value.type))
        return Word(operation(*(pair[::-1] if swap else pair)))

    def __add__(self, other: Any) -> Word:
        return self._apply(_arith().addi, other)

    def __sub__(self, other: Any) -> Word:
        return self._apply(_arith().subi, other)

    def __rsub__(self, other: Any) -> Word:
        return self._apply(_arith().subi, other, swap=True)

    def __mul__(self, other: Any) -> Word:
        return self._apply(_arith().muli, other)

    def __floordiv__(self, other: Any) -> Word:
        """Of words that are not negative."""
        return self._apply(_arith().divui, other)

    def __mod__(self, other: Any) -> Word:
        """Of words that are not negative."""
        return self._apply(_arith().remui, other)

    def __rlshift__(self, other: int) -> Word:
        return self._apply(_arith().shli, other, swap=True)

    def __rshift__(self, other: Any) -> Word:
        """Of words that are not negative."""
        return self._apply(_arith().shrui, other)

    def __and__(self, other: Any) -> Word:
        return self._apply(_arith().andi, other)

    def __xor__(self, other: Any) -> Word:
        return self._apply(_arith().xori, other)

    def _compare(self, kind: str, other: Any) -> Word:
        predicate = getattr(_arith().CmpIPredicate, kind)
        return self._apply(lambda a, b: _arith().cmpi(predicate, a, b), other)

    def __lt__(self, other: Any) -> Word:
        return self._compare("slt", other)

    def __ge__(self, other: Any) -> Word:
        return self._compare("sge", other)

    def __eq__(self, other: Any) -> Any:
        return self._compare("eq", other)

    __hash__ = None  # type: ignore[assignment]


def _arith() -> Any:
    from jaxlib.mlir.dialects import arith

    return arith


def _i32() -> Any:
    from jaxlib.mlir import ir

    return ir.IntegerType.get_signless(32)


def _f32() -> Any:
    from jaxlib.mlir import ir

    return ir.F32Type.get()


def _as_value(word: Any, type_: Any = None) -> Any:
    from jax.experimental.mosaic.gpu import utils

    return word.value if isinstance(word, Word) else utils.c(int(word), type_ or _i32())


class Compiled:
    """Emits a thread's instructions."""

    def __init__(self) -> None:
        from jax.experimental.mosaic.gpu import utils

        self.thread = Word(utils.thread_idx())
        self.lane, self.warp = self.thread % LANES, self.thread // LANES

    def _address(self, ref: Any, index: Any) -> Any:
        from jax.experimental.mosaic.gpu import utils

        return utils.getelementptr(utils.memref_ptr(ref), [_as_value(index)], _i32())

    def load(self, ref: Any, index: Any, where: Any = None) -> Word:
        from jaxlib.mlir.dialects import llvm

        if where is not None:  # of what is not wanted the first word, which always exists
            index = self.select(where, index, 0)
        word = Word(llvm.load(_i32(), self._address(ref, index)))
        return word if where is None else self.select(where, word, 0)

    def store(self, ref: Any, index: Any, value: Any, where: Any = None) -> None:
        where = True if where is None else where
        self._when(where, partial(self._store_words, ref, index, _as_value(value)))

    def _when(self, where: Any, store: Callable[[], Any]) -> None:
        from jax.experimental.mosaic.gpu import utils

        if where is True:
            store()
            return
        with utils.when(where.value):
            store()

    def load_four(self, ref: Any, index: Any, where: Any) -> list[Word]:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        address = self.integer_address(ref, self.select(where, index, 0))
        loaded = assembly(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
            address,
        )
        words = [Word(llvm.extractvalue(_i32(), loaded, [i])) for i in range(4)]
        return [self.select(where, word, 0) for word in words]

    def store_four(self, ref: Any, index: Any, words: Sequence[Any], where: Any) -> None:
        def store() -> None:
            address = self.integer_address(ref, index)
            space, kind = ("shared", "r") if address.type == _i32() else ("global", "l")
            assembly(
                f"st.{space}.v4.b32 [$0], {{$1, $2, $3, $4}};",
                f"{kind},r,r,r,r",
                None,
                address,
                *(_as_value(word) for word in words),
            )

        self._when(where, store)

    def set_bits(self, ref: Any, index: Any, bits: Any, where: Any) -> None:
        def update() -> None:
            address = self.integer_address(ref, index)
            assembly("red.shared.or.b32 [$0], $1;", "r,r", None, address, _as_value(bits))

        self._when(where, update)

    def integer_address(self, ref: Any, index: Any) -> Any:
        """Of 32 bits in shared memory, of 64 in global memory."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        pointer = self._address(ref, index)
        shared = llvm.PointerType(pointer.type).address_space == SHARED
        return llvm.ptrtoint(_i32() if shared else ir.IntegerType.get_signless(64), pointer)

    def _store_words(self, ref: Any, index: Any, words: Any) -> None:
        from jaxlib.mlir.dialects import llvm

        llvm.store(words, self._address(ref, index))

    def select(self, where: Any, a: Any, b: Any) -> Word:
        return Word(_arith().select(where.value, _as_value(a), _as_value(b)))

    def _reduce(self, word: Any, kind: str) -> Word:
        from jaxlib.mlir.dialects import nvvm

        return Word(nvvm.redux_sync(word.value, getattr(nvvm.ReductionKind, kind), _as_value(ALL)))

    def largest(self, word: Any) -> Word:
        return self._reduce(word, "MAX")

    def smallest(self, word: Any) -> Word:
        return self._reduce(word, "MIN")

    def shift_up(self, word: Any, distance: int) -> Word:
        return self._shuffle(word, distance, "up", 0)

    def exchange(self, word: Any, distance: int) -> Word:
        return self._shuffle(word, distance, "bfly", LANES - 1)

    def _shuffle(self, word: Any, distance: int, kind: str, bound: int) -> Word:
        from jaxlib.mlir.dialects import nvvm

        operands = (_as_value(ALL), word.value, _as_value(distance), _as_value(bound))
        return Word(nvvm.shfl_sync(*operands, getattr(nvvm.ShflKind, kind)))

    def count_bits(self, word: Any) -> Word:
        from jaxlib.mlir.dialects import math

        return Word(math.ctpop(word.value))

    def unpack(self, word: Any) -> tuple[Word, Word]:
        return word * 2**16, word & -(2**16)

    def pack(self, low: Any, high: Any) -> Word:
        operands = [_arith().bitcast(_f32(), word.value) for word in (high, low)]
        return Word(assembly("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", _i32(), *operands))

    def _floats(self, operation: Callable[..., Any], *words: Any) -> Word:
        values = [_arith().bitcast(_f32(), _as_value(word)) for word in words]
        return Word(_arith().bitcast(_i32(), operation(*values)))

    def float_add(self, a: Any, b: Any) -> Word:
        return self._floats(_arith().addf, a, b)

    def float_sub(self, a: Any, b: Any) -> Word:
        return self._floats(_arith().subf, a, b)

    def float_mul(self, a: Any, b: Any) -> Word:
        return self._floats(_arith().mulf, a, b)

    def float_div(self, a: Any, b: Any) -> Word:
        return self._floats(_arith().divf, a, b)

    def float_rsqrt(self, a: Any) -> Word:
        approximate = partial(assembly, "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", _f32())
        return self._floats(approximate, a)

    def float_exp(self, a: Any) -> Word:
        return self._floats(_exp, a)

    def to_float(self, word: Any) -> Word:
        return Word(_arith().bitcast(_i32(), _arith().sitofp(_f32(), word.value)))

    def to_integer(self, a: Any) -> Word:
        return Word(_arith().fptosi(_i32(), _arith().bitcast(_f32(), a.value)))

    def wait_for_block(self) -> None:
        from jaxlib.mlir.dialects import nvvm

        nvvm.barrier()

    def repeat(
        self, count: int, carried: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]
    ) -> list[Any]:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import scf

        first, end, step = (_as_value(number) for number in (0, count, 1))
        make: Any = scf.ForOp  # which the stubs describe wrongly
        loop = make(first, end, step, [_as_value(word) for word in carried])
        with ir.InsertionPoint(loop.body):
            results = body(Word(loop.induction_variable), list(map(Word, loop.inner_iter_args)))
            scf.yield_([_as_value(word) for word in results])
        return [Word(value) for value in loop.results]


def _exp(x: Any) -> Any:
    """2 to the power of x·log₂e, corrected by what rounding the product lost."""
    from jax.experimental.mosaic.gpu import utils

    log2_e, log2_e_rest, ln_2, least = (
        utils.c(value, _f32()) for value in (LOG2_E, LOG2_E_REST, LN_2, LEAST)
    )
    multiply_add = partial(assembly, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", _f32())
    # Not -inf, whose rest would be NaN.
    x = assembly("max.NaN.f32 $0, $1, $2;", "=f,f,f", _f32(), x, least)
    product = _arith().mulf(x, log2_e)
    rest = multiply_add(x, log2_e, _arith().negf(product))
    rest = multiply_add(x, log2_e_rest, rest)
    power = assembly("ex2.approx.ftz.f32 $0, $1;", "=f,f", _f32(), product)
    return multiply_add(power, _arith().mulf(rest, ln_2), power)


def assembly(
    instruction: str, constraints: str, result: Any, *operands: Any, ordered: bool = False
) -> Any:
    """An instruction. It keeps its place among the ordered ones; without a result it is ordered."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    return llvm.inline_asm(
        ir.Type.parse("!llvm.void") if result is None else result,
        list(operands),
        instruction,
        constraints,
        has_side_effects=ordered or result is None,
    )
