"""Copies of experts in 8 bits, which a miss sends instead of the experts themselves. Lossy.

Matrices are quantized as `--expert-weights int8` does, by blocks of 128 × 128 with a float32 scale
each (arXiv 2412.19437 §3.3); biases stay as they are. On the device a copy becomes what a slot
holds, so that programs know nothing of it.

Shape letters: D model width, N input matrices, H hidden width.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
from jax import numpy as jnp

from moejax.inference.expert_weights import MATRICES, in_8_bits
from moejax.offload.parts import BankLayout
from pallas_kernels.quantized_experts.format import QuantizedMatrices, dequantize

__all__ = ["LowExpert", "low_bytes", "lowered", "restored"]

LowExpert = tuple[QuantizedMatrices | jax.Array, ...]
"""One expert's matrices and biases, in the order of `BankLayout.names`."""


@partial(jax.jit, static_argnums=0)
def lowered(name: str, array: jax.Array) -> QuantizedMatrices | jax.Array:
    """One array of an expert in 8 bits: w_in [D, N, H] or w_out [H, D]; others as they are."""
    return in_8_bits(name, array, jnp.int8) if name in MATRICES else array


def restored(bank: BankLayout, low: LowExpert) -> tuple[jax.Array, ...]:
    """An expert in the dtype of its use, from its copy, where that is.

    Args:
        bank: of its layer.
        low: what `lowered` made of each of its arrays.
    """
    return _restored(low, bank.names, tuple(shape.dtype.name for shape in bank.shapes))


@partial(jax.jit, static_argnums=(1, 2))
def _restored(
    low: LowExpert, names: tuple[str, ...], dtypes: tuple[str, ...]
) -> tuple[jax.Array, ...]:
    return tuple(_matrix(*each) for each in zip(low, names, dtypes, strict=True))


def _matrix(low: Any, name: str, dtype: str) -> jax.Array:
    if not isinstance(low, QuantizedMatrices):
        return low
    matrix = dequantize(low, jnp.dtype(dtype))
    return jnp.swapaxes(matrix, 0, 1) if name == "w_in" else matrix


def low_bytes(bank: BankLayout) -> int:
    """Size of one expert's copy."""
    return _low_bytes(bank.names, bank.shapes)


@cache
def _low_bytes(names: tuple[str, ...], shapes: tuple[jax.ShapeDtypeStruct, ...]) -> int:
    copies = [jax.eval_shape(partial(lowered, name), like) for name, like in zip(names, shapes)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(copies))
