"""Programs of single threads inside a Pallas kernel: warps that shuffle, match and reduce.

For work on indices, where a thread's own loads and stores are what matters. A program is a function
of a `Machine` and of references to 32-bit words; it has no branches: loads and stores are
predicated. `launch` compiles it, with one thread for each value, or lets `emulate` run it in numpy,
with all threads of a block side by side, to test it without a GPU.
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

    thread, lane, warp: of the block; the lane within its warp.
    """

    thread: Any
    lane: Any
    warp: Any

    def load(self, ref: Any, index: Any, where: Any = None) -> Any:
        """ref[index]; 0 where the predicate is false."""

    def store(self, ref: Any, index: Any, value: Any, where: Any = None) -> None:
        """ref[index] = value where the predicate holds; at most one thread for each index."""

    def fill(self, ref: Any, size: int, value: int, threads: int) -> None:
        """The block's threads store a constant to ref[:size], a multiple of 4 words."""

    def select(self, where: Any, a: Any, b: Any) -> Any:
        """A or b, words or constants."""

    def match(self, word: Any) -> Any:
        """The mask of the warp's lanes that hold the same word."""

    def largest(self, word: Any) -> Any:
        """Of the warp, signed."""

    def smallest(self, word: Any) -> Any:
        """Of the warp, signed."""

    def shift_up(self, word: Any, distance: int) -> Any:
        """The word of the lane `distance` below; undefined in the first lanes."""

    def count_bits(self, word: Any) -> Any:
        """Ones of a word."""

    def lanes_below(self) -> Any:
        """The mask of this warp's lanes before this one."""

    def wait_for_warp(self) -> None:
        """What the warp's lanes stored is seen by them."""

    def wait_for_block(self) -> None:
        """What the block's threads stored is seen by them."""


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

    def fill(self, ref: np.ndarray, size: int, value: int, threads: int) -> None:
        assert size % 4 == 0 and size <= ref.size and threads == self.thread.size
        ref[:size] = value

    def select(self, where: Any, a: Any, b: Any) -> np.ndarray:
        return np.where(where, np.int32(a), np.int32(b))

    def match(self, word: Any) -> np.ndarray:
        words = self._warps(word)
        same = words[:, :, None] == words[:, None, :]
        masks = np.sum(same << np.arange(LANES, dtype=np.uint64), axis=2, dtype=np.uint64)
        return masks.astype(np.uint32).view(np.int32).reshape(-1)

    def largest(self, word: Any) -> np.ndarray:
        return np.repeat(self._warps(word).max(axis=1), LANES)

    def smallest(self, word: Any) -> np.ndarray:
        return np.repeat(self._warps(word).min(axis=1), LANES)

    def shift_up(self, word: Any, distance: int) -> np.ndarray:
        words = self._warps(word).copy()
        words[:, distance:] = words[:, :-distance]
        words[:, :distance] = -(2**30)
        return words.reshape(-1)

    def count_bits(self, word: Any) -> np.ndarray:
        bits = np.unpackbits(self._warps(word).copy().view(np.uint8), axis=1)
        return bits.reshape(-1, LANES).sum(axis=1).astype(np.int32)

    def lanes_below(self) -> np.ndarray:
        return ((np.uint64(1) << self.lane.astype(np.uint64)) - 1).astype(np.uint32).view(np.int32)

    def wait_for_warp(self) -> None:
        pass

    def wait_for_block(self) -> None:
        pass


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
    outputs = [np.full(out.shape, RUBBISH, np.int32) for out in out_type]
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
) -> list[jax.Array]:
    """Runs a program as a kernel; inside of `compat.interpreted` in numpy.

    Args:
        program: (machine, inputs, outputs, scratch, block), the block an int32 index.
        name: of the kernel, in profiles.
        blocks: that run side by side.
        threads: of a block, a multiple of 128.
        inputs: flat arrays of 32-bit words.
        out_type: flat arrays of 32-bit words.
        scratch: words of a block's shared memory, for each of its arrays.
    """
    if interpret_mode() is not None:

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

        emit(*arrays, lax.axis_index("block"))

    kernel = named_kernel(
        body,
        name,
        out_type=list(out_type),
        scratch_types=[[plgpu.SMEM((size,), jnp.int32) for size in scratch]],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=threads // 128,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    return kernel(*inputs)
