"""Numbers of a thread's program: constants, bfloat16 pairs to float32 words and back, sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["float_word", "lane_sum", "load_eight", "numbers_of", "store_eight", "words_of"]


def float_word(m: Any, value: float) -> Any:
    """A float32 constant, the same in every thread."""
    return m.lane * 0 + int(np.float32(value).view(np.int32))


def numbers_of(m: Any, words: Sequence[Any]) -> list[Any]:
    """The float32 numbers in words of two bfloat16 each."""
    return [number for word in words for number in m.unpack(word)]


def words_of(m: Any, numbers: Sequence[Any]) -> list[Any]:
    """The other way round, rounded to nearest."""
    return [m.pack(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


def load_eight(m: Any, ref: Any, index: Any, where: Any) -> list[Any]:
    """ref[index : index + 8]; as `Machine.load_four`."""
    return [*m.load_four(ref, index, where), *m.load_four(ref, index + 4, where)]


def store_eight(m: Any, ref: Any, index: Any, words: Sequence[Any], where: Any) -> None:
    """ref[index : index + 8] = words; as `Machine.store_four`."""
    m.store_four(ref, index, words[:4], where)
    m.store_four(ref, index + 4, words[4:], where)


def lane_sum(m: Any, word: Any, lanes: int) -> Any:
    """The float32 sum over neighbouring lanes, so many rounded up to a power of 2, in each."""
    distance = 1
    while distance < lanes:
        word = m.float_add(word, m.exchange(word, distance))
        distance *= 2
    return word
