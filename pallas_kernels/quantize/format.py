"""What rows of numbers look like as bytes, and the integers that all backends round with.

A row is its values, then the scales of its blocks as bfloat16, then zeros up to a whole word. A
block's scale is its largest magnitude over the largest integer, rounded *up* to bfloat16, so that
nothing is clipped. Two integers of 4 bits lie in a byte: numbers i and i + block / 2 of a block.

Nothing here is divided but integers, and no inexact product is added to anything: XLA may join such
a product and the sum to one rounding, as the platform and the program around it are.
A number is multiplied with a power of two and an integer of 24 bits that are one over the scale,
and becomes an integer with `FRACTION` bits behind the point; the rest is arithmetic on integers.
So a row has the same bytes on every platform and from every kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "FRACTION",
    "HASH",
    "INFINITY",
    "INVERSE",
    "LEAST",
    "NAN_SCALE",
    "ONE_SCALE",
    "Format",
]

FRACTION = 24
"""Bits behind the point of what is rounded: 127 and a fraction fill an int32."""

INVERSE = 30
"""An inverse is 2 to this over a scale's 8 significant bits, rounded to the nearest integer."""

LEAST = (127 - 90) << 23
"""Bits of 2⁻⁹⁰: of a block of less magnitude nothing remains. Platforms differ in what becomes of
numbers below the normal ones; above this none occurs that matters."""

INFINITY = 0x7F800000
"""Bits of float32; without their sign those of a NaN are more."""

ONE_SCALE, NAN_SCALE = 0x3F80, 0x7FC0
"""Bits of bfloat16: of blocks of zeros, and of those with a number that is not finite."""

HASH = (0x85EBCA6B, 0xC2B2AE35)
"""Factors of MurmurHash3's finalizer."""


@dataclass(frozen=True)
class Format:
    """How numbers lie in bytes.

    bits: 4 or 8.
    block: numbers that share a scale, a multiple of 16; rows are made of whole blocks.
    """

    bits: int
    block: int

    @property
    def largest(self) -> int:
        """The largest integer; the smallest is its negative."""
        return 2 ** (self.bits - 1) - 1

    def value_bytes(self, width: int) -> int:
        """Bytes of the integers of a row of so many numbers."""
        return width * self.bits // 8

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of so many numbers, a multiple of 4."""
        return self.value_bytes(width) + -(-width // self.block // 2) * 4
