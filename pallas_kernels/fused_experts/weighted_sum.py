"""The weighted sum of each row's places on NVIDIA GPUs: 16 bytes of a row for each thread.

A thread's reads of its row's places are under way side by side, so that few rows take the time of
one read and many take the memory's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.simt import Machine, launch

__all__ = ["program", "refusal", "sum_places"]

THREADS = 256
WORDS = 4  # of a thread, each with two columns
COLUMNS = 2 * WORDS
MAX_COPIES = 32  # whose words a thread's registers hold
INT_MAX = 2**31 - 1


def refusal(rows_AD: jax.Array, place_RJ: jax.Array, dtype: Any) -> str | None:
    """Why the kernel cannot serve this, or None."""
    width, copies = rows_AD.shape[1], place_RJ.shape[1]
    if rows_AD.dtype != jnp.bfloat16 or dtype != jnp.bfloat16:
        return f"rows are {rows_AD.dtype}, sums {jnp.dtype(dtype)}; the kernel takes bfloat16"
    if rows_AD.size * place_RJ.size == 0:
        return "no rows or no places"
    if width % COLUMNS:
        return f"{width} columns are no multiple of {COLUMNS}"
    if copies > MAX_COPIES:
        return f"{copies} places of a row; the kernel takes up to {MAX_COPIES}"
    if rows_AD.size // 2 > INT_MAX or place_RJ.shape[0] * width // 2 > INT_MAX:
        return f"{rows_AD.size} numbers; positions of pairs are int32"
    return None


def program(
    m: Machine, rows: Any, places: Any, *rest: Any, count: int, limit: int, copies: int, width: int
) -> None:
    """One block: a thread takes `WORDS` words of a sum.

    Args:
        m: the machine.
        rows: bfloat16 pairs [limit · width / 2].
        places: int32 [count · copies].
        rest: maybe float32 weights [count · copies]; sums, pairs [count · width / 2]; the block.
        count, limit, copies, width: R, A, J, D.
    """
    *weights, sums, block = rest
    parts = width // COLUMNS  # of a row
    item = m.thread + block * THREADS
    there = item < count * parts
    row, part = item // parts, item % parts
    at = [m.load(places, row * copies + j, there) for j in range(copies)]
    factors = [m.load(ref, row * copies + j, there) for ref in weights for j in range(copies)]
    taken = []  # all loads first
    for place in at:
        some = there & (place >= 0) & (place < limit)
        taken.append(m.load_four(rows, place * (width // 2) + part * WORDS, some))
    totals = [m.thread * 0] * COLUMNS  # 0.0
    for j, words in enumerate(taken):
        values = [value for word in words for value in m.unpack(word)]
        if factors:
            values = [m.float_mul(value, factors[j]) for value in values]
        totals = [m.float_add(total, value) for total, value in zip(totals, values, strict=True)]
    packed = [m.pack(*totals[2 * i : 2 * i + 2]) for i in range(WORDS)]
    m.store_four(sums, row * (width // 2) + part * WORDS, packed, there)


def sum_places(rows_AD: jax.Array, weights_RJ: jax.Array | None, place_RJ: jax.Array) -> jax.Array:
    """Σ_j weights[r, j] · rows[place[r, j]], added in float32 in the order of j, rounded once.

    Args:
        rows_AD: bfloat16.
        weights_RJ: float32; None: 1.
        place_RJ: int32; A for none, which adds 0.

    Returns:
        bfloat16 [R, D].
    """
    (limit, width), (count, copies) = rows_AD.shape, place_RJ.shape
    inputs = [rows_AD, place_RJ] + ([] if weights_RJ is None else [weights_RJ])
    (sums,) = launch(
        partial(program, count=count, limit=limit, copies=copies, width=width),
        "sum_places",
        blocks=-(-count * width // (COLUMNS * THREADS)),
        threads=THREADS,
        inputs=[array.reshape(-1) for array in inputs],
        out_type=[jax.ShapeDtypeStruct((count * width,), jnp.bfloat16)],
    )
    return sums.reshape(count, width)
