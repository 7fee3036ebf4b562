"""The instructions of single threads' programs: the machine of `pallas_kernels.hopper.simt`."""

# ruff: noqa: D102 (what the methods do, the protocol says)

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["Compiled", "Word"]

LANES = 32
ALL = 0xFFFFFFFF


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

    def fill(self, ref: Any, size: int, value: int, threads: int) -> None:
        from jaxlib.mlir import ir

        four = ir.VectorType.get((4,), _i32())
        word = ir.IntegerAttr.get(_i32(), value)
        values = _arith().constant(four, ir.DenseElementsAttr.get_splat(four, word))
        for first in range(0, size // 4, threads):
            at = self.thread + first
            where = True if first + threads <= size // 4 else at < size // 4
            self._when(where, partial(self._store_words, ref, at * 4, values))

    def _store_words(self, ref: Any, index: Any, words: Any) -> None:
        from jaxlib.mlir.dialects import llvm

        llvm.store(words, self._address(ref, index))

    def select(self, where: Any, a: Any, b: Any) -> Word:
        return Word(_arith().select(where.value, _as_value(a), _as_value(b)))

    def match(self, word: Any) -> Word:
        # Not nvvm.match_sync, whose kind is lost when the kernel is serialized (jax 0.11).
        from jaxlib.mlir.dialects import llvm

        together: dict[str, Any] = (
            {"convergent": True} if hasattr(llvm.InlineAsmOp, "convergent") else {}
        )
        mask = llvm.inline_asm(
            _i32(),
            [word.value],
            "match.any.sync.b32 $0, $1, 0xffffffff;",
            "=r,r",
            has_side_effects=True,
            **together,
        )
        return Word(mask)

    def _reduce(self, word: Any, kind: str) -> Word:
        from jaxlib.mlir.dialects import nvvm

        return Word(nvvm.redux_sync(word.value, getattr(nvvm.ReductionKind, kind), _as_value(ALL)))

    def largest(self, word: Any) -> Word:
        return self._reduce(word, "MAX")

    def smallest(self, word: Any) -> Word:
        return self._reduce(word, "MIN")

    def shift_up(self, word: Any, distance: int) -> Word:
        from jaxlib.mlir.dialects import nvvm

        operands = (_as_value(ALL), word.value, _as_value(distance), _as_value(0))
        return Word(nvvm.shfl_sync(*operands, nvvm.ShflKind.up))

    def count_bits(self, word: Any) -> Word:
        from jaxlib.mlir.dialects import math

        return Word(math.ctpop(word.value))

    def lanes_below(self) -> Word:
        shifted = _arith().shli(_as_value(1), self.lane.value)
        return Word(shifted) - 1

    def wait_for_warp(self) -> None:
        from jaxlib.mlir.dialects import nvvm

        nvvm.bar_warp_sync(_as_value(ALL))

    def wait_for_block(self) -> None:
        from jaxlib.mlir.dialects import nvvm

        nvvm.barrier()
