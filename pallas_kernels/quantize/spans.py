"""How warps share out rows: which words of values a lane has, and which numbers these hold.

A warp takes a span of a row: P words of values for each lane, 32 apart, so that what a warp reads
or writes at once lies together. A word's numbers are one or two fours of a block. Blocks come in
pairs, because two scales fill a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pallas_kernels.hopper.simt import LANES
from pallas_kernels.quantize.format import Format

__all__ = ["FOUR", "THREADS", "Place", "Spans", "places_of"]

FOUR = 4  # numbers that lie together, and bytes of a word
WARPS = 8  # of a block of threads
THREADS = WARPS * LANES
NUMBERS = 16  # that a lane reads before it uses the first, unless blocks are long


@dataclass(frozen=True)
class Spans:
    """How rows are shared out.

    form: the format.
    rows, width: of the numbers.
    """

    form: Format
    rows: int
    width: int

    @property
    def fours(self) -> int:
        """Runs of four numbers in a word of values."""
        return 32 // self.form.bits // FOUR

    @property
    def words(self) -> int:
        """Words of a row's values."""
        return self.form.value_bytes(self.width) // 4

    @property
    def row_words(self) -> int:
        """Words of a row, with its scales."""
        return self.form.row_bytes(self.width) // 4

    @property
    def block_words(self) -> int:
        """Words of a block's values, a power of two."""
        return self.form.value_bytes(self.form.block) // 4

    @property
    def passes(self) -> int:
        """P, words of a lane."""
        return max(NUMBERS // FOUR // self.fours, 2 * self.block_words // LANES)

    @property
    def of_a_row(self) -> int:
        """Spans of a row."""
        return -(-self.words // (self.passes * LANES))

    @property
    def grid(self) -> int:
        """Blocks of `THREADS` threads."""
        return -(-self.rows * self.of_a_row // WARPS)


@dataclass
class Place:
    """What one lane does in one pass.

    there: whether the word exists; if not, the other fields are those of the first one.
    row, word: the row, and the word in it.
    block: of the row; block + 1 may be past the end.
    numbers: indices of the word's fours in the row.
    """

    there: Any
    row: Any
    word: Any
    block: Any
    numbers: list[Any]


def places_of(m: Any, spans: Spans, block: Any) -> list[Place]:
    """Those of a lane, pass by pass."""
    unit = block * WARPS + m.warp
    row, span = unit // spans.of_a_row, unit % spans.of_a_row
    found = []
    for turn in range(spans.passes):
        word = span * (spans.passes * LANES) + (m.lane + turn * LANES)
        there = (word < spans.words) & (row < spans.rows)
        safe_row, safe = m.select(there, row, 0), m.select(there, word, 0)
        own, first = safe // spans.block_words, safe % spans.block_words * FOUR
        start = own * spans.form.block + first
        apart = spans.form.block // spans.fours
        numbers = [start + four * apart for four in range(spans.fours)]
        found.append(Place(there, safe_row, safe, own, numbers))
    return found
