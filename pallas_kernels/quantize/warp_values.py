"""Numbers of a warp's lanes to words of values and back, in registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.hopper.simt import LANES
from pallas_kernels.hopper.simt_multiply import load_words
from pallas_kernels.hopper.simt_numbers import float_word
from pallas_kernels.quantize.format import (
    FRACTION,
    HASH,
    INFINITY,
    INVERSE,
    LEAST,
    NAN_SCALE,
    ONE_SCALE,
    Format,
)
from pallas_kernels.quantize.spans import FOUR

__all__ = ["Rounding", "Scale", "scale_of", "values_of"]

SIGN, TOP = -(2**31), -(2**FRACTION)  # of a word: the sign, the upper byte
NIBBLES, EIGHTS = 0x0F0F0F0F, 0x88888888 - 2**32


def _larger(m: Any, a: Any, b: Any) -> Any:
    return m.select(a >= b, a, b)


@dataclass
class Scale:
    """Of a lane's block.

    bits: of the scale as bfloat16.
    finite: whether all numbers are.
    power, inverse: float32; their product is 2 to the `FRACTION` over the scale.
    """

    bits: Any
    finite: Any
    power: Any
    inverse: Any


def scale_of(
    m: Any, form: Format, numbers: Sequence[Sequence[Sequence[Any]]], block_words: int
) -> list[Scale]:
    """The scale of each pass's block.

    Args:
        m: the machine.
        form: the format.
        numbers: [pass][four][number].
        block_words: words of a block's values, in neighbouring lanes and then passes.
    """
    found: list[Scale] = []
    together = max(1, block_words // LANES)
    for first in range(0, len(numbers), together):
        most = None
        for fours in numbers[first : first + together]:
            for word in (word for four in fours for word in four):
                magnitude = word & 0x7FFFFFFF
                most = magnitude if most is None else _larger(m, most, magnitude)
        if block_words >= LANES:
            most = m.largest(most)
        else:
            distance = 1
            while distance < block_words:
                most = _larger(m, most, m.exchange(most, distance))
                distance *= 2
        found += [_scale(m, form, most)] * together
    return found


def _scale(m: Any, form: Format, most: Any) -> Scale:
    """As the reference has it, from the bits of the largest magnitude."""
    finite = most < INFINITY
    most = m.select(finite, most, 0)
    scale = m.float_mul(most, float_word(m, 1.0 / form.largest))
    up = m.select(most < LEAST, ONE_SCALE, (scale + 0xFFFF) >> 16)
    digits = (up & 127) + 128
    inverse = (digits // 2 + 2**INVERSE) // digits * 2
    power = (254 - (up >> 7)) * 2**23
    return Scale(m.select(finite, up, NAN_SCALE), finite, power, m.to_float(inverse))


class Rounding:
    """How numbers become words of values.

    Args:
        m: the machine.
        form: the format.
        key: words of global memory, for rounding by chance; None rounds to the nearest.
    """

    def __init__(self, m: Any, form: Format, key: Any) -> None:
        self._m, self._form, self._key = m, form, None
        if key is not None:
            self._key = [load_words(m, key, m.lane * 0 + i, 1)[0] for i in range(2)]

    def apply(
        self, fours: Sequence[Sequence[Any]], scale: Scale, positions: Sequence[Any], lost: bool
    ) -> tuple[Any, list[list[Any]]]:
        """One word's numbers.

        Args:
            fours: float32 words [four][number].
            scale: of their block.
            positions: of each four's first number, in all rows; what the chance depends on.
            lost: whether to return what is lost.

        Returns:
            The word; what is lost, like `fours`, or nothing.
        """
        m, packed, left = self._m, [], []
        factor = m.float_mul(scale.bits * 2**16, float_word(m, 2.0**-FRACTION))
        for four, position in zip(fours, positions, strict=True):
            raised = [
                m.select(scale.finite, word, 0) & TOP
                for word in self._raised(four, scale, position)
            ]
            if lost:
                sent = [m.float_mul(m.to_float(word), factor) for word in raised]
                left.append([m.float_sub(x, y) for x, y in zip(four, sent, strict=True)])
            a, b, c, d = raised
            low = ((a >> 24) & 0xFF) + ((b >> 16) & 0xFF00)
            packed.append(low + ((c >> 8) & 0xFF0000) + d)
        if self._form.bits == 8:
            return packed[0], left
        low, high = (word & NIBBLES for word in packed)
        return (low + high * 16) ^ EIGHTS, left

    def _raised(self, four: Sequence[Any], scale: Scale, position: Any) -> list[Any]:
        """Integers whose upper byte is the value."""
        m, found = self._m, []
        most = self._form.largest << FRACTION
        if self._key is not None:
            hashed = [self._hash((position >> 1) + pair) for pair in range(FOUR // 2)]
        for i, number in enumerate(four):
            word = m.to_integer(m.float_mul(m.float_mul(number, scale.power), scale.inverse))
            word = m.select(word >= most, most, word)
            word = m.select(word < -most, -most, word)
            if self._key is None:
                odd = (word >> FRACTION) & 1
                found.append(word + odd + (2 ** (FRACTION - 1) - 1))
                continue
            half = hashed[i // 2] if i % 2 == 0 else hashed[i // 2] >> 16
            found.append(word + (half & 0xFFFF) * 256 + 128)
        return found

    def _hash(self, position: Any) -> Any:
        """As `reference.dither` has it; a shift of a negative word is masked."""
        assert self._key is not None
        return self._mix(self._mix(position ^ self._key[0]) + self._key[1])

    def _mix(self, h: Any) -> Any:
        first, second = (factor - 2**32 for factor in HASH)
        h = (h ^ ((h >> 16) & 0xFFFF)) * first
        h = (h ^ ((h >> 13) & 0x7FFFF)) * second
        return h ^ ((h >> 16) & 0xFFFF)


def values_of(m: Any, form: Format, word: Any, scale: Any) -> list[list[Any]]:
    """The float32 words [four][number] of a word of values.

    Args:
        m: the machine.
        form: the format.
        word: the values.
        scale: as float32.
    """
    below = 32 - form.bits  # an integer is taken from the upper bits of a word
    factor = m.float_mul(scale, float_word(m, 2.0**-below))
    found = []
    for four in range(8 // form.bits):
        numbers = []
        for i in range(FOUR):
            up = below - 8 * i - form.bits * four
            value = word * 2**up if up else word
            value = value & -(2**below)
            value = value ^ SIGN if form.bits == 4 else value
            numbers.append(m.float_mul(m.to_float(value), factor))
        found.append(numbers)
    return found
