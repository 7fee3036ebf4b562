"""Rows of numbers to bytes and back on Hopper: one pass over memory, a word of values a lane.

The lanes and words of a block agree on its largest magnitude by shuffles.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.simt import LANES, launch
from pallas_kernels.hopper.simt_multiply import load_words
from pallas_kernels.quantize.format import Format
from pallas_kernels.quantize.spans import FOUR, THREADS, Place, Spans, places_of
from pallas_kernels.quantize.warp_values import Rounding, scale_of, values_of

__all__ = ["add_up", "add_up_and_encode", "decode", "encode", "refusal"]

MOST_BLOCK = 1024
MOST_RANKS = 64  # whose reads are written out one by one


def _load_numbers(m: Any, x: Any, index: Any, narrow: bool) -> list[Any]:
    """Four float32 words, from numbers of bfloat16 where they are `narrow`."""
    if not narrow:
        return load_words(m, x, index, FOUR)
    low, high = load_words(m, x, index // 2, FOUR // 2)
    return [*m.unpack(low), *m.unpack(high)]


def _encode(
    m: Any,
    x: Any,
    *rest: Any,
    spans: Spans,
    narrow: bool,
    chance: bool,
    residual: bool,
) -> None:
    """The program of `encode`: x, the key, the payload and perhaps the residual, block."""
    key, rest = (rest[0], rest[1:]) if chance else (None, rest)
    places = places_of(m, spans, rest[-1])
    numbers = [
        [_load_numbers(m, x, place.row * spans.width + at, narrow) for at in place.numbers]
        for place in places
    ]
    _put_bytes(m, spans, places, numbers, key, rest[0], rest[1] if residual else None)


def _put_bytes(
    m: Any,
    spans: Spans,
    places: list[Place],
    numbers: list[list[list[Any]]],
    key: Any,
    out: Any,
    left: Any,
) -> None:
    """Rounds a lane's numbers [pass][four][number] and stores bytes, and what is lost."""
    rounding = Rounding(m, spans.form, key)
    scales = scale_of(m, spans.form, numbers, spans.block_words)
    for place, scale, fours in zip(places, scales, numbers, strict=True):
        positions = [place.row * spans.width + at for at in place.numbers]
        word, lost = rounding.apply(fours, scale, positions, left is not None)
        m.store(out, place.row * spans.row_words + place.word, word, place.there)
        for at, words in zip(positions, lost):
            m.store_four(left, at, words, place.there)
    _put_scales(m, spans, places, [scale.bits for scale in scales], out)


def _put_scales(m: Any, spans: Spans, places: list[Place], scales: list[Any], out: Any) -> None:
    """Stores the scales of pairs of blocks; of one past the end, 0."""
    apart = spans.block_words
    # Words of a block are in neighbouring lanes, and in several passes where it is long.
    each = max(1, apart // LANES)
    for first in range(0, len(places), 2 * each if apart >= LANES else 1):
        place, scale = places[first], scales[first]
        if apart >= LANES:
            there, other = places[first + each].there, scales[first + each]
        else:
            other = m.exchange(scale, apart)
            there = m.exchange(m.select(place.there, 1, 0), apart) >= 1
        pair = scale + m.select(there, other, 0) * 2**16
        begins = m.lane % min(2 * apart, LANES) < 1
        index = place.row * spans.row_words + spans.words + place.block // 2
        m.store(out, index, pair, place.there & begins)


def _values(m: Any, payload: Any, spans: Spans, place: Place, row: Any) -> list[list[Any]]:
    """The float32 words [four][number] that a row of bytes has at a place."""
    begin = row * spans.row_words
    (word,) = load_words(m, payload, begin + place.word, 1)
    (pair,) = load_words(m, payload, begin + spans.words + place.block // 2, 1)
    scale = m.select(place.block % 2 < 1, pair * 2**16, pair & -(2**16))
    return values_of(m, spans.form, word, scale)


def _decode(m: Any, payload: Any, out: Any, block: Any, *, spans: Spans) -> None:
    """The program of `decode`."""
    places = places_of(m, spans, block)
    values = [_values(m, payload, spans, place, place.row) for place in places]
    for place, fours in zip(places, values, strict=True):
        for at, words in zip(place.numbers, fours, strict=True):
            m.store_four(out, place.row * spans.width + at, words, place.there)


def _add_up(
    m: Any,
    payload: Any,
    rows: Any,
    me: Any,
    *rest: Any,
    spans: Spans,
    ranks: int,
    narrow: bool,
    encoded: bool,
    chance: bool = False,
    residual: bool = False,
) -> None:
    """The program of `add_up` and `add_up_and_encode`: what is received, rows, me, the key, out."""
    key, rest = (rest[0], rest[1:]) if chance else (None, rest)
    places = places_of(m, spans, rest[-1])
    (mine,) = load_words(m, me, m.lane * 0, 1)
    own = [
        [_load_numbers(m, rows, mine * spans.width + at, narrow) for at in place.numbers]
        for place in places
    ]
    totals: list[Any] = [None] * len(places)
    for rank in range(ranks):
        is_mine = mine == rank
        # Instead of its own bytes, which it does not want, a rank reads ones that it reads anyway.
        source = m.select(is_mine, min(ranks - 1, 1) if rank == 0 else 0, rank)
        for i, place in enumerate(places):
            sent = _values(m, payload, spans, place, source)
            terms = jax.tree.map(partial(m.select, is_mine), own[i], sent)
            totals[i] = terms if totals[i] is None else jax.tree.map(m.float_add, totals[i], terms)
    if encoded:
        _put_bytes(m, spans, places, totals, key, rest[0], rest[1] if residual else None)
        return
    for place, fours in zip(places, totals, strict=True):
        for at, words in zip(place.numbers, fours, strict=True):
            m.store_four(rest[0], at, words, place.there)


def refusal(form: Format, rows: int, width: int) -> str | None:
    """Why the kernels cannot serve this, or None."""
    if form.block & (form.block - 1) or not 16 <= form.block <= MOST_BLOCK:
        return f"blocks of {form.block}; the kernels take powers of 2 from 16 to {MOST_BLOCK}"
    if not rows or not width:
        return "there are no numbers"
    if rows > MOST_RANKS:
        return f"{rows} rows; the kernels take up to {MOST_RANKS}"
    if rows * width >= 2**31:
        return f"{rows} × {width} numbers; the kernels count up to 2³¹"
    return None


def _outputs(spans: Spans, residual: bool) -> list[jax.ShapeDtypeStruct]:
    bytes_ = jax.ShapeDtypeStruct((spans.rows * spans.row_words * 4,), jnp.uint8)
    left = jax.ShapeDtypeStruct((spans.rows * spans.width,), jnp.float32)
    return [bytes_, left] if residual else [bytes_]


def _shaped(made: list[jax.Array], spans: Spans) -> tuple[jax.Array, jax.Array | None]:
    left = made[1].reshape(spans.rows, spans.width) if len(made) > 1 else None
    return made[0].reshape(spans.rows, -1), left


def encode(
    x_RN: jax.Array, form: Format, key: jax.Array | None, *, residual: bool
) -> tuple[jax.Array, jax.Array | None]:
    """See `api.encode`."""
    spans = Spans(form, *x_RN.shape)
    narrow, chance = x_RN.dtype == jnp.bfloat16, key is not None
    made = launch(
        partial(_encode, spans=spans, narrow=narrow, chance=chance, residual=residual),
        "quantize_encode",
        inputs=[x_RN.reshape(-1), *([] if key is None else [key])],
        out_type=_outputs(spans, residual),
        blocks=spans.grid,
        threads=THREADS,
    )
    return _shaped(made, spans)


def decode(payload_RN: jax.Array, form: Format, width: int) -> jax.Array:
    """See `api.decode`."""
    spans = Spans(form, len(payload_RN), width)
    (made,) = launch(
        partial(_decode, spans=spans),
        "quantize_decode",
        inputs=[payload_RN.reshape(-1)],
        out_type=[jax.ShapeDtypeStruct((spans.rows * width,), jnp.float32)],
        blocks=spans.grid,
        threads=THREADS,
    )
    return made.reshape(-1, width)


def add_up(payload_RN: jax.Array, rows_RN: jax.Array, me: jax.Array, form: Format) -> jax.Array:
    """See `api.add_up`."""
    ranks, width = rows_RN.shape
    spans = Spans(form, 1, width)
    narrow = rows_RN.dtype == jnp.bfloat16
    (made,) = launch(
        partial(_add_up, spans=spans, ranks=ranks, narrow=narrow, encoded=False),
        "quantize_add_up",
        inputs=[payload_RN.reshape(-1), rows_RN.reshape(-1), me.reshape(1)],
        out_type=[jax.ShapeDtypeStruct((width,), jnp.float32)],
        blocks=spans.grid,
        threads=THREADS,
    )
    return made


def add_up_and_encode(
    payload_RN: jax.Array,
    rows_RN: jax.Array,
    me: jax.Array,
    form: Format,
    key: jax.Array | None,
    *,
    residual: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """See `api.add_up_and_encode`."""
    ranks, width = rows_RN.shape
    spans = Spans(form, 1, width)
    made = launch(
        partial(
            _add_up,
            spans=spans,
            ranks=ranks,
            narrow=rows_RN.dtype == jnp.bfloat16,
            encoded=True,
            chance=key is not None,
            residual=residual,
        ),
        "quantize_add_up_and_encode",
        inputs=[
            *(payload_RN.reshape(-1), rows_RN.reshape(-1), me.reshape(1)),
            *([] if key is None else [key]),
        ],
        out_type=_outputs(spans, residual),
        blocks=spans.grid,
        threads=THREADS,
    )
    return _shaped(made, spans)
