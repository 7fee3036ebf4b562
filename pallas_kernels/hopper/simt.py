"""Programs of single threads inside a Pallas kernel: warps that shuffle and reduce.

For work on indices, sums and small products, where a thread's own loads and stores are what
matters. A program is a function of a `Machine` and of references to 32-bit words; it has no
branches: loads and stores are predicated, and all threads run a loop equally often. `launch`
compiles it, with one thread for each value, or lets `emulate` run it in numpy, with all threads of
a block side by side, to test it without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.compat import COMPILER_PARAMS, interpret_mode, named_kernel
from pallas_kernels.hopper.simt_emit import LANES, Compiled, Word

__all__ = ["LANES", "Machine", "emulate", "launch"]

RUBBISH = -559038737  # what memory holds before it is written: 0xDEADBEEF


class Machine(Protocol):
    """What a thread knows and can do. Words are int32; comparisons give predicates.

    The operations that begin with `float` take a word's bits for a float32.

    thread, lane, warp: of the block; the lane within its warp.
    """

    thread: Any
    lane: Any
    warp: Any

    def load(self, ref: Any, index: Any, where: Any = None) -> Any:
        """ref[index]; 0 where the predicate is false."""

    def store(self, ref: Any, index: Any, value: Any, where: Any = None) -> None:
        """ref[index] = value where the predicate holds; at most one thread for each index."""

    def load_four(self, ref: Any, index: Any, where: Any) -> list[Any]:
        """ref[index : index + 4], 0 where the predicate is false; index a multiple of 4.

        Of an input, which lies in global memory and is never written.
        """

    def store_four(self, ref: Any, index: Any, words: Sequence[Any], where: Any) -> None:
        """ref[index : index + 4] = words where the predicate holds; index a multiple of 4."""

    def set_bits(self, ref: Any, index: Any, bits: Any, where: Any) -> None:
        """ref[index] |= bits where the predicate holds, at once; ref in shared memory."""

    def select(self, where: Any, a: Any, b: Any) -> Any:
        """A or b, words or constants."""

    def largest(self, word: Any) -> Any:
        """Of the warp, signed."""

    def smallest(self, word: Any) -> Any:
        """Of the warp, signed."""

    def shift_up(self, word: Any, distance: int) -> Any:
        """The word of the lane `distance` below; undefined in the first lanes."""

    def exchange(self, word: Any, distance: int) -> Any:
        """The word of the lane whose number differs in the bit `distance`."""

    def count_bits(self, word: Any) -> Any:
        """Ones of a word."""

    def unpack(self, word: Any) -> tuple[Any, Any]:
        """The two bfloat16 numbers in a word as float32, the lower half first."""

    def pack(self, low: Any, high: Any) -> Any:
        """Two float32 numbers, rounded to nearest bfloat16, as a word."""

    def float_add(self, a: Any, b: Any) -> Any:
        """A + b, rounded to nearest."""

    def float_sub(self, a: Any, b: Any) -> Any:
        """A − b, rounded to nearest."""

    def float_mul(self, a: Any, b: Any) -> Any:
        """A · b, rounded to nearest."""

    def float_div(self, a: Any, b: Any) -> Any:
        """A / b, rounded to nearest."""

    def float_rsqrt(self, a: Any) -> Any:
        """1 / √a to 2 units in the last place; a is a normal number above 0."""

    def float_exp(self, a: Any) -> Any:
        """eᵃ to 4 units in the last place, 0 where it is no normal number; a below 88."""

    def to_float(self, word: Any) -> Any:
        """An integer as float32, rounded to nearest."""

    def to_integer(self, a: Any) -> Any:
        """A float32 as an integer, rounded towards zero; anything where no int32 is that large."""

    def wait_for_block(self) -> None:
        """What the block's threads stored is seen by them."""

    def repeat(
        self, count: int, carried: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """Of words: for i in range(count): carried = body(i, carried)."""


class _Emulated:
    """All threads of one block side by side, [threads]."""

    def __init__(self, threads: int) -> None:
        self.thread = np.arange(threads, dtype=np.int32)
        self.lane, self.warp = self.thread % LANES, self.thread // LANES

    def _warps(self, word: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(word, np.int32), self.thread.shape).reshape(-1, LANES)

    def _mask(self, where: Any) -> np.ndarray:
        return np.broadcast_to(True if where is None else where, self.thread.shape)

    def load(self, ref: np.ndarray, index: Any, where: Any = None) -> np.ndarray:
        mask, index = self._mask(where), np.broadcast_to(index, self.thread.shape)
        assert ((index[mask] >= 0) & (index[mask] < ref.size)).all(), "read out of bounds"
        return np.where(mask, ref[np.where(mask, index, 0)], 0).astype(np.int32)

    def store(self, ref: np.ndarray, index: Any, value: Any, where: Any = None) -> None:
        mask = self._mask(where)
        at = np.broadcast_to(index, self.thread.shape)[mask]
        assert ((at >= 0) & (at < ref.size)).all(), "write out of bounds"
        assert np.unique(at).size == at.size, "two threads write the same word"
        ref[at] = np.broadcast_to(value, self.thread.shape)[mask]

    def load_four(self, ref: np.ndarray, index: Any, where: Any) -> list[np.ndarray]:
        assert not (np.where(where, index, 0) % 4).any(), "not aligned"
        return [self.load(ref, index + word, where) for word in range(4)]

    def store_four(self, ref: np.ndarray, index: Any, words: Sequence[Any], where: Any) -> None:
        assert not (np.where(where, index, 0) % 4).any(), "not aligned"
        for i, word in enumerate(words):
            self.store(ref, index + i, word, where)

    def set_bits(self, ref: np.ndarray, index: Any, bits: Any, where: Any) -> None:
        mask = self._mask(where)
        at = np.broadcast_to(index, self.thread.shape)[mask]
        assert ((at >= 0) & (at < ref.size)).all(), "write out of bounds"
        np.bitwise_or.at(ref, at, np.broadcast_to(bits, self.thread.shape)[mask])

    def select(self, where: Any, a: Any, b: Any) -> np.ndarray:
        return np.where(where, np.int32(a), np.int32(b))

    def largest(self, word: Any) -> np.ndarray:
        return np.repeat(self._warps(word).max(axis=1), LANES)

    def smallest(self, word: Any) -> np.ndarray:
        return np.repeat(self._warps(word).min(axis=1), LANES)

    def shift_up(self, word: Any, distance: int) -> np.ndarray:
        words = self._warps(word).copy()
        words[:, distance:] = words[:, :-distance]
        words[:, :distance] = -(2**30)
        return words.reshape(-1)

    def exchange(self, word: Any, distance: int) -> np.ndarray:
        return self._warps(word)[:, np.arange(LANES) ^ distance].reshape(-1)

    def count_bits(self, word: Any) -> np.ndarray:
        bits = np.unpackbits(self._warps(word).copy().view(np.uint8), axis=1)
        return bits.reshape(-1, LANES).sum(axis=1).astype(np.int32)

    def unpack(self, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return word << 16, word & -(2**16)

    def pack(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            halves = [word.view(np.float32).astype(jnp.bfloat16) for word in (low, high)]
        return np.stack(halves, axis=1).view(np.int32)[:, 0]

    def _floats(self, operation: Callable[..., np.ndarray], *words: Any) -> np.ndarray:
        with np.errstate(all="ignore"):
            return operation(*(word.view(np.float32) for word in words)).view(np.int32)

    def float_add(self, a: Any, b: Any) -> np.ndarray:
        return self._floats(np.add, a, b)

    def float_sub(self, a: Any, b: Any) -> np.ndarray:
        return self._floats(np.subtract, a, b)

    def float_mul(self, a: Any, b: Any) -> np.ndarray:
        return self._floats(np.multiply, a, b)

    def float_div(self, a: Any, b: Any) -> np.ndarray:
        return self._floats(np.divide, a, b)

    def float_rsqrt(self, a: Any) -> np.ndarray:
        return self._floats(lambda a: np.float32(1) / np.sqrt(a), a)

    def float_exp(self, a: Any) -> np.ndarray:
        return self._floats(np.exp, a)

    def to_float(self, word: Any) -> np.ndarray:
        return word.astype(np.float32).view(np.int32)

    def to_integer(self, a: Any) -> np.ndarray:
        return self._floats(lambda a: a.astype(np.int32), a)

    def wait_for_block(self) -> None:
        pass

    def repeat(
        self, count: int, carried: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]
    ) -> list[Any]:
        for i in range(count):
            carried = body(np.full_like(self.thread, i), list(carried))
        return list(carried)


def emulate(
    program: Callable[..., None],
    blocks: int,
    threads: int,
    inputs: Sequence[np.ndarray],
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[int] = (),
) -> list[np.ndarray]:
    """As `launch`, in numpy, one block after the other; outputs and scratch begin as rubbish.

    Raises:
        AssertionError: a thread reads or writes out of bounds, or two write the same word.
    """
    words = [np.array(array).view(np.int32) for array in inputs]
    sizes = [out.size * out.dtype.itemsize // 4 for out in out_type]
    outputs = [np.full(size, RUBBISH, np.int32) for size in sizes]
    for block in range(blocks):
        room = [np.full(size, RUBBISH, np.int32) for size in scratch]
        program(_Emulated(threads), *words, *outputs, *room, np.int32(block))
    return [words.view(out.dtype) for words, out in zip(outputs, out_type, strict=True)]


def launch(
    program: Callable[..., None],
    name: str,
    *,
    blocks: int,
    threads: int,
    inputs: Sequence[jax.Array],
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[int] = (),
    cluster: int = 1,
) -> list[jax.Array]:
    """Runs a program as a kernel; inside of `compat.interpreted` in numpy.

    Args:
        program: (machine, inputs, outputs, scratch, block), the block an int32 index.
        name: of the kernel, in profiles.
        blocks: that run side by side.
        threads: of a block, a multiple of 128.
        inputs: flat arrays; the program sees their bytes as 32-bit words.
        out_type: flat arrays, likewise.
        scratch: words of a block's shared memory, for each of its arrays.
        cluster: blocks that follow each other and reach one another's shared memory, which numpy
            cannot run.
    """
    if interpret_mode() is not None:
        assert cluster == 1

        def run(*inputs: Any) -> list[np.ndarray]:
            return emulate(program, blocks, threads, inputs, out_type, scratch)

        return jax.pure_callback(run, list(out_type), *inputs, vmap_method="sequential")

    def body(*refs: Any) -> None:
        *arrays, room = refs
        arrays = [*arrays, *room]
        types = [*[plgpu.RefType()] * len(arrays), plgpu.Layout.WG_SPLAT]

        @plgpu.inline_mgpu(arg_types=tuple(types))
        def emit(_, *operands):
            *arrays, block = operands
            program(Compiled(), *arrays, Word(block.registers.item()))

        block = lax.axis_index("block")
        if cluster > 1:
            block = block * cluster + lax.axis_index("member")
        emit(*arrays, block)

    members = {"cluster": (cluster,), "cluster_names": ("member",)} if cluster > 1 else {}
    kernel = named_kernel(
        body,
        name,
        out_type=list(out_type),
        scratch_types=[[plgpu.SMEM((size,), jnp.int32) for size in scratch]],
        grid=(blocks // cluster,),
        grid_names=("block",),
        **members,
        num_threads=threads // 128,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    return kernel(*inputs)
