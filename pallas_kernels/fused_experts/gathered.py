"""Rows laid out by place on NVIDIA GPUs: 16 bytes of several rows for each thread.

Places beyond the last tile, of which buffers for any routing have many, are neither read nor
written.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.simt import Machine, launch
from pallas_kernels.hopper.tiles import ROWS

__all__ = ["gather_places", "program", "refusal"]

THREADS = 256
SIDE_BY_SIDE = 8  # rows of a thread, whose reads are under way together
WORDS = 4  # of a thread and row, each with two columns
COLUMNS = 2 * WORDS
INT_MAX = 2**31 - 1


def refusal(x_RD: jax.Array, copy_A: jax.Array) -> str | None:
    """Why the kernel cannot serve this, or None."""
    width, places = x_RD.shape[1], copy_A.shape[0]
    if x_RD.dtype != jnp.bfloat16:
        return f"rows are {x_RD.dtype}; the kernel takes bfloat16"
    if x_RD.size * places == 0:
        return "no rows or no places"
    if width % COLUMNS or places % SIDE_BY_SIDE:
        return f"{width} columns and {places} places: must be multiples of {COLUMNS}"
    if max(x_RD.size, places * width) // 2 > INT_MAX:
        return f"{places} places of {width} columns; positions of pairs are int32"
    return None


def program(
    m: Machine,
    rows: Any,
    copy: Any,
    count: Any,
    out: Any,
    block: Any,
    *,
    limit: int,
    copies: int,
    width: int,
    places: int,
) -> None:
    """One block: a thread takes `WORDS` words of `SIDE_BY_SIDE` places.

    Args:
        m: the machine.
        rows: bfloat16 pairs [limit · width / 2].
        copy: int32 [places], the copy of a row at each place.
        count: int32 [1], tiles that are filled.
        out: bfloat16 pairs [places · width / 2].
        block: the block.
        limit, copies, width, places: R, copies of a row, D, A.
    """
    parts = width // COLUMNS
    item = m.thread + block * THREADS
    first, part = item // parts * SIDE_BY_SIDE, item % parts
    there = (first < places) & (first < m.load(count, m.thread * 0) * ROWS)
    at = [m.load(copy, first + i, there) // copies for i in range(SIDE_BY_SIDE)]
    taken = []  # all loads first
    for row in at:
        some = there & (row >= 0) & (row < limit)
        taken.append(m.load_four(rows, row * (width // 2) + part * WORDS, some))
    for i, words in enumerate(taken):
        m.store_four(out, (first + i) * (width // 2) + part * WORDS, words, there)


def gather_places(
    x_RD: jax.Array, copy_A: jax.Array, count: jax.Array, *, copies: int
) -> jax.Array:
    """x[copy // copies], zero where there is no such row.

    Args:
        x_RD: bfloat16.
        copy_A: int32, not negative.
        count: int32 [1], tiles of `ROWS` places that are filled, the first ones.
        copies: of a row.

    Returns:
        [A, D]; places of other tiles hold anything.
    """
    (limit, width), places = x_RD.shape, copy_A.shape[0]
    (out,) = launch(
        partial(program, limit=limit, copies=copies, width=width, places=places),
        "gather_places",
        blocks=-(-places * width // (COLUMNS * SIDE_BY_SIDE * THREADS)),
        threads=THREADS,
        inputs=[x_RD.reshape(-1), copy_A, count],
        out_type=[jax.ShapeDtypeStruct((places * width,), jnp.bfloat16)],
    )
    return out.reshape(places, width)
