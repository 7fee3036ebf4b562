"""Tensors that a checkpoint holds in few bits with scales, read as float32, each part when needed.

`fp8`: float8 numbers with a float32 scale for each block of 128 × 128 (arXiv 2412.19437 §3.3).
`mxfp4`: blocks of 32 numbers of 4 bits (e2m1) with a power of two each (OCP Microscaling Formats
v1.0 §5.3); two numbers a byte, the first in the low half.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from moejax.errors import UserError
from moejax.families.fields import short
from moejax.inference.folder_files import listed

__all__ = ["BlockScaled", "Mxfp4", "dequantized"]

_E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_BYTES = np.arange(256, dtype=np.uint8)
_PAIRS = np.stack([_E2M1[_BYTES & 15], _E2M1[_BYTES >> 4]], axis=-1).view(np.float64)[:, 0]
"""For each byte two float32 side by side, which are fetched as one number of 8 bytes."""
_FLOAT8 = {
    np.dtype(dtype): _BYTES.view(dtype).astype(np.float32)
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
}
"""For each byte its value."""
_METHODS = "'fp8' with weight_block_size, or 'mxfp4'"


class BlockScaled:
    """A matrix of float8 numbers with a scale for each block.

    shape, dtype: of the matrix [O, I] as it is read, float32.
    nbytes: in the files.
    """

    def __init__(self, name: str, weight: np.ndarray, scales: np.ndarray, block: tuple[int, int]):
        """Maps it; nothing is read.

        Args:
            name: for messages.
            weight: float8 [O, I].
            scales: floats [⌈O/b⌉, ⌈I/c⌉], which numbers of the block are multiplied by.
            block: rows b and columns c of a block.

        Raises:
            UserError: shapes or dtypes do not fit.
        """
        wanted = tuple(-(-n // b) for n, b in zip(weight.shape, block))
        if weight.ndim != 2 or weight.dtype not in _FLOAT8 or scales.shape != wanted:
            raise UserError(
                f"{name}: {weight.dtype} {weight.shape} with scales {scales.shape} in blocks of "
                f"{block}: a float8 matrix with a scale for each block is needed"
            )
        self.shape, self.dtype = weight.shape, np.dtype(np.float32)
        self.nbytes = weight.nbytes + scales.nbytes
        self._name, self._weight, self._scales, self._block = name, weight, scales, block

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """A part, float32."""
        rows, columns = (cut.indices(n)[:2] for cut, n in zip(index, self.shape))
        step, width = self._block
        scales = self._scales[rows[0] // step : -(-rows[1] // step)].astype(np.float32)
        scales = scales[:, np.arange(*columns) // width]
        if not np.isfinite(scales).all():
            raise UserError(f"{self._name}: a scale is not finite: take an undamaged checkpoint")
        numbers = np.take(_FLOAT8[self._weight.dtype], self._weight[index].view(np.uint8))
        for i, scale in enumerate(scales, rows[0] // step):
            numbers[max(i * step - rows[0], 0) : (i + 1) * step - rows[0]] *= scale
        return numbers


class Mxfp4:
    """Matrices of 4-bit numbers, a batch of them, transposed as transformers reads them.

    shape, dtype: [E, I, O] as it is read, float32.
    nbytes: in the files.
    """

    def __init__(self, name: str, blocks: np.ndarray, scales: np.ndarray):
        """Maps it; nothing is read.

        Args:
            name: for messages.
            blocks: uint8 [E, O, I / 32, 16].
            scales: uint8 [E, O, I / 32], exponents of 2 plus 127.

        Raises:
            UserError: shapes or dtypes do not fit.
        """
        fits = blocks.ndim == 4 and blocks.shape[3] == 16 and scales.shape == blocks.shape[:3]
        if not fits or blocks.dtype != np.uint8 or scales.dtype != np.uint8:
            raise UserError(
                f"{name}: blocks {blocks.dtype} {blocks.shape} with scales {scales.dtype} "
                f"{scales.shape}: uint8 [E, O, G, 16] with [E, O, G] are needed"
            )
        experts, outputs, groups, _ = blocks.shape
        self.shape, self.dtype = (experts, groups * 32, outputs), np.dtype(np.float32)
        self.nbytes = blocks.nbytes + scales.nbytes
        self._name, self._blocks, self._scales = name, blocks, scales

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        """A part, float32."""
        experts, inputs, outputs = index
        start, stop, _ = inputs.indices(self.shape[1])
        groups = slice(start // 32, -(-stop // 32))
        scales = self._scales[experts, outputs, groups]
        if (scales == 255).any():  # of the format "not a number"
            raise UserError(f"{self._name}: a scale is not finite: take an undamaged checkpoint")
        numbers = np.take(_PAIRS, self._blocks[experts, outputs, groups]).view(np.float32)
        numbers *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
        numbers = numbers.reshape(*scales.shape[:2], 32 * scales.shape[2])
        first = groups.start * 32
        return numbers[:, :, start - first : stop - first].transpose(0, 2, 1)


def dequantized(tensors: Mapping[str, np.ndarray], scheme: Any) -> dict[str, Any]:
    """The tensors, those in few bits under the names that they would have in full.

    Args:
        tensors: as they are stored, by name.
        scheme: `quantization_config` of the config.json, or None.

    Raises:
        UserError: the scheme is unknown, or tensors and scales do not fit; all are told.
    """
    found: dict[str, Any] = dict(tensors)
    problems: list[str] = []

    def replace(name: str, parts: tuple[str, ...], make: Any) -> None:
        missing = [part for part in parts if part not in tensors]
        problems.extend(f"{part} is missing" for part in missing)
        if missing:
            return
        try:
            array = make(name, *(found.pop(part) for part in parts))
        except UserError as error:
            problems.append(str(error))
        else:
            found[name] = array

    method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
    block = scheme.get("weight_block_size") if isinstance(scheme, dict) else None
    if method == "fp8" and block is not None and _is_block(block):
        make = partial(BlockScaled, block=(block[0], block[1]))
        for scales in [name for name in tensors if name.endswith("_scale_inv")]:
            name = scales.removesuffix("_scale_inv")
            replace(name, (name, scales), make)
    elif method == "mxfp4":
        ends = ("_blocks", "_scales")
        for name in {n[:-7] for n in tensors if n.endswith(ends)}:
            replace(name, (name + ends[0], name + ends[1]), Mxfp4)
    elif scheme is not None:
        said = f"quant_method={short(method)}, weight_block_size={short(block)}"
        problems.append(f"quantization_config with {said} (only {_METHODS})")
    if scheme is None or not problems:
        problems += [
            f"{name} is {array.dtype} without scales"
            for name, array in found.items()
            if array.dtype in _FLOAT8
        ]
    if problems:
        raise UserError(
            f"{listed(sorted(problems))}: these numbers cannot be read; take a checkpoint in "
            "bfloat16, or one with the scheme of its family"
        )
    return found


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and size >= 1 for size in block)
    )
