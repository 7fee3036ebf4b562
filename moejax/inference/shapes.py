"""The shapes that compiled steps come in: few, so that all can be compiled before they are needed.

Letters: R rows of a device, S tokens of a row, N pages of a row's table.
"""

from __future__ import annotations

from dataclasses import dataclass

from moejax.inference.request import EngineSettings

__all__ = ["Shape", "Shapes", "bucket"]

_SMALLEST_CHUNK = 16
_CHUNK_STEP = 4
_SMALLEST_TABLE = 128


def bucket(length: int, smallest: int, largest: int) -> int:
    """The least power of two that is at least `length` and `smallest`; at most `largest`."""
    return min(max(1 << (length - 1).bit_length(), smallest), largest)


@dataclass(frozen=True)
class Shape:
    """The static sizes of a step.

    rows: R of each device.
    tokens: S of a prompt's piece; 0 for decoding, which runs one token a row.
    pages: N of a row's table.
    begins: all rows begin their texts, and so read no pages.
    """

    rows: int
    tokens: int
    pages: int
    begins: bool = False


class Shapes:
    """Chooses the shape of a step.

    Args:
        settings: the engine's.
        rows: most rows of a device.
        max_len: most tokens of a text.
    """

    def __init__(self, settings: EngineSettings, rows: int, max_len: int):
        chunk = settings.prefill_chunk
        self._page_len = settings.page_len
        self._fixed = settings.deterministic
        self.rows = rows
        self.pages = -(-max_len // self._page_len)
        self.expect(1, 1)
        sizes = [chunk]
        size = _SMALLEST_CHUNK
        while size < chunk and not self._fixed:
            sizes.insert(-1, size)
            size *= _CHUNK_STEP
        self.pieces = {size: min(max(chunk // size, 1), rows) for size in sizes}
        """Lengths S of a prompt's pieces, and how many of them a device may run in a step."""

    def _of_pages(self, pages: int, least: int) -> int:
        return self.pages if self._fixed else bucket(pages, least, self.pages)

    def expect(self, rows: int, tokens: int) -> None:
        """From now on no shape is smaller than so many rows of a device decoding texts so long."""
        self._least_rows = bucket(rows, 1, self.rows)
        self._least_pages = bucket(
            -(-max(tokens, _SMALLEST_TABLE) // self._page_len), 1, self.pages
        )

    def decode(self, rows: int, pages: int) -> Shape:
        """The least shape for so many rows of the fullest device and pages of the longest row."""
        rows = self.rows if self._fixed else bucket(rows, self._least_rows, self.rows)
        return Shape(rows, 0, self._of_pages(pages, self._least_pages))

    def prefill(self, rows: int, tokens: int, pages: int, *, begins: bool = False) -> Shape:
        """Likewise for pieces of prompts; S is one of `pieces`."""
        # Between one row and as many as there may be lies little: a shape less to compile.
        rows = self.pieces[tokens] if rows > 1 or self._fixed else 1
        if begins and not self._fixed:  # there a row's bits may not depend on the others
            return Shape(rows, tokens, min(-(-tokens // self._page_len), self.pages), begins=True)
        return Shape(rows, tokens, self._of_pages(pages, self._least_pages))

    def decode_rows(self) -> list[int]:
        """Every number of rows that a device may decode, in ascending order."""
        return sorted({self.decode(rows, 1).rows for rows in range(1, self.rows + 1)})

    def all(self) -> list[Shape]:
        """Every shape that may come."""
        tables = sorted({self._of_pages(n, self._least_pages) for n in range(1, self.pages + 1)})
        pieces = [(rows, size) for size, most in self.pieces.items() for rows in (1, most)]
        shapes = list(dict.fromkeys(self.prefill(*piece, 1, begins=True) for piece in pieces))
        for pages in tables:
            counts = range(1, self.rows + 1)
            shapes += dict.fromkeys(self.decode(rows, pages) for rows in counts)
            shapes += dict.fromkeys(self.prefill(*piece, pages) for piece in pieces)
        return list(dict.fromkeys(shapes))
