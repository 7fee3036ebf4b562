"""RMSNorm on NVIDIA GPUs: a row in the registers of a few warps, read once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.simt import launch
from pallas_kernels.hopper.simt_numbers import (
    float_word,
    load_eight,
    numbers_of,
    store_eight,
    words_of,
)
from pallas_kernels.norm.rows import COLUMNS, THREADS, WARPS, Rows, row_sum, rows_of

__all__ = ["add_and_normalize", "normalize_backward", "refusal"]

INT_MAX = 2**31 - 1


def refusal(count: int, width: int) -> str | None:
    """Why the kernels cannot serve rows of this shape, or None."""
    if count * width == 0:
        return "no rows or no columns"
    if width % COLUMNS:
        return f"{width} columns are no multiple of {COLUMNS}"
    if rows_of(count, width) is None:
        return f"{width} columns; the registers of {WARPS} warps hold no such row"
    if count * width > INT_MAX:
        return f"{count} x {width} numbers; positions are int32"
    return None


def _scales(m: Any, scale: Any, rows: Rows) -> list[list[Any]]:
    """A lane's numbers of scale, [read][column]."""
    return [load_eight(m, scale, at, there) for at, there in rows.at(m)]


def _total(m: Any, terms: Sequence[Any]) -> Any:
    """Of one lane, pairwise."""
    terms = list(terms)
    while len(terms) > 1:
        pairs = [m.float_add(*terms[i : i + 2]) for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]


def _forward(m: Any, *refs: Any, rows: Rows, eps: float, terms: int) -> None:
    """One block. refs: terms, scale; the sum if there are two, normal, inverse; room, block."""
    inputs, (scale, *outputs, inverses, room, block) = refs[:terms], refs[terms:]
    factors, places, group = _scales(m, scale, rows), rows.at(m), rows.group(m, block)

    def one_row(turn: Any, _: list[Any]) -> list[Any]:
        row = group * rows.each + turn
        first, there = row * (rows.width // 2), row < rows.count
        read = [
            [m.load_four(ref, first + at // 2, there & inside) for at, inside in places]
            for ref in inputs
        ]  # all loads first
        x = [numbers_of(m, words) for words in read[0]]
        if terms == 2:
            other = [numbers_of(m, words) for words in read[1]]
            added = [[m.float_add(a, b) for a, b in zip(*pair)] for pair in zip(x, other)]
            packed = [words_of(m, numbers) for numbers in added]
            for (at, inside), words in zip(places, packed, strict=True):
                m.store_four(outputs[0], first + at // 2, words, there & inside)
            x = [numbers_of(m, words) for words in packed]  # rounded
        squares = _total(m, [m.float_mul(a, a) for numbers in x for a in numbers])
        squares = row_sum(m, rows, room, turn, squares)
        mean = m.float_mul(squares, float_word(m, 1.0 / rows.width))
        inverse = m.float_rsqrt(m.float_add(mean, float_word(m, eps)))
        m.store(inverses, row, inverse, there & rows.leads(m))
        for (at, inside), numbers, by in zip(places, x, factors, strict=True):
            normal = [m.float_mul(m.float_mul(a, inverse), s) for a, s in zip(numbers, by)]
            m.store_four(outputs[-1], first + at // 2, words_of(m, normal), there & inside)
        return []

    m.repeat(rows.each, [], one_row)


def _backward(m: Any, x: Any, inverses: Any, scale: Any, *refs: Any, rows: Rows, cts: int) -> None:
    """One block. refs: cotangents of the result, maybe x's; x's, parts of scale's; room, block."""
    given, (x_ct, scale_ct, room, block) = refs[:-4], refs[-4:]
    factors, places, group = _scales(m, scale, rows), rows.at(m), rows.group(m, block)

    def one_row(turn: Any, sums: list[Any]) -> list[Any]:
        row = group * rows.each + turn
        first, there = row * (rows.width // 2), row < rows.count
        inverse = m.load(inverses, row, there)
        read = [
            [m.load_four(ref, first + at // 2, there & inside) for at, inside in places]
            for ref in (x, *given)
        ]  # all loads first
        units, *arrived = [[numbers_of(m, words) for words in array] for array in read]
        units = [[m.float_mul(a, inverse) for a in numbers] for numbers in units]
        passed = arrived.pop() if len(arrived) > cts else None
        ct = arrived[0]
        for more in arrived[1:]:
            ct = [[m.float_add(a, b) for a, b in zip(*pair)] for pair in zip(ct, more)]
        scaled = [[m.float_mul(a, s) for a, s in zip(*pair)] for pair in zip(ct, factors)]
        pairs = [pair for numbers in zip(units, scaled) for pair in zip(*numbers)]
        along = _total(m, [m.float_mul(a, b) for a, b in pairs])
        along = m.float_mul(row_sum(m, rows, room, turn, along), float_word(m, 1.0 / rows.width))
        left = iter(sums)
        found = []
        for i, (at, inside) in enumerate(places):
            results = []
            for j in range(COLUMNS):
                unit = units[i][j]
                result = m.float_sub(scaled[i][j], m.float_mul(unit, along))
                result = m.float_mul(inverse, result)
                if passed is not None:
                    result = m.float_add(result, passed[i][j])
                results.append(result)
                found.append(m.float_add(next(left), m.float_mul(ct[i][j], unit)))
            m.store_four(x_ct, first + at // 2, words_of(m, results), there & inside)
        return found

    sums = m.repeat(rows.each, [float_word(m, 0.0)] * (rows.reads * COLUMNS), one_row)
    for i, (at, inside) in enumerate(places):
        words = sums[i * COLUMNS : (i + 1) * COLUMNS]
        store_eight(m, scale_ct, group * rows.width + at, words, inside)


def add_and_normalize(
    x_D: jax.Array, other_D: jax.Array | None, scale_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `api.add_and_normalize`."""
    rows = _rows(x_D)
    terms = [x_D] if other_D is None else [x_D, other_D]
    made = launch(
        partial(_forward, rows=rows, eps=eps, terms=len(terms)),
        "rms_norm",
        blocks=rows.blocks,
        threads=THREADS,
        inputs=[array.reshape(-1) for array in (*terms, scale_D)],
        out_type=[
            *[jax.ShapeDtypeStruct((x_D.size,), x_D.dtype)] * len(terms),
            jax.ShapeDtypeStruct((rows.count,), jnp.float32),
        ],
        scratch=(2 * WARPS,),
    )
    total = x_D if other_D is None else made[0].reshape(x_D.shape)
    return total, made[-2].reshape(x_D.shape), made[-1].reshape(*x_D.shape[:-1], 1)


def normalize_backward(
    x_D: jax.Array,
    inverse_1: jax.Array,
    scale_D: jax.Array,
    ct_D: Sequence[jax.Array],
    passed_D: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As `api.normalize_backward`."""
    rows = _rows(x_D)
    given = [*ct_D] if passed_D is None else [*ct_D, passed_D]
    x_ct, parts = launch(
        partial(_backward, rows=rows, cts=len(ct_D)),
        "rms_norm_backward",
        blocks=rows.blocks,
        threads=THREADS,
        inputs=[array.reshape(-1) for array in (x_D, inverse_1, scale_D, *given)],
        out_type=[
            jax.ShapeDtypeStruct((x_D.size,), x_D.dtype),
            jax.ShapeDtypeStruct((rows.groups * rows.width,), jnp.float32),
        ],
        scratch=(2 * WARPS,),
    )
    return x_ct.reshape(x_D.shape), parts.reshape(rows.groups, rows.width).sum(axis=0)


def _rows(x_D: jax.Array) -> Rows:
    rows = rows_of(math.prod(x_D.shape[:-1]), x_D.shape[-1])
    assert rows is not None
    return rows
