"""How a row's columns lie over the lanes of some warps, and the sum over a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pallas_kernels.hopper.compat import sm_count
from pallas_kernels.hopper.simt import LANES
from pallas_kernels.hopper.simt_numbers import lane_sum

__all__ = ["COLUMNS", "THREADS", "Rows", "row_sum", "rows_of"]

THREADS = 256
WARPS = THREADS // LANES
COLUMNS = 8  # bfloat16 numbers of a lane's read: 16 bytes
MOST_READS = 4  # of a lane, for each array and row
MOST_ROWS = 16  # one after the other
WARPS_AT_ONCE = 16  # of a multiprocessor, with the registers that a backward needs


@dataclass(frozen=True)
class Rows:
    """R rows of D columns over the warps of a grid.

    warps: that share a row, a power of 2 up to `WARPS`.
    reads: of a lane, each of `COLUMNS` columns, some of them past the row's end.
    each: rows that the warps have one after the other.
    """

    count: int
    width: int
    warps: int
    reads: int
    each: int

    @property
    def groups(self) -> int:
        """Of warps, that have rows."""
        return self.blocks * (WARPS // self.warps)

    @property
    def blocks(self) -> int:
        """Of `THREADS` threads."""
        return -(-self.count // (self.each * WARPS // self.warps))

    def group(self, m: Any, block: Any) -> Any:
        """Which of the groups a thread belongs to."""
        return block * (WARPS // self.warps) + m.warp // self.warps

    def leads(self, m: Any) -> Any:
        """Whether a thread is its row's first."""
        return (m.warp % self.warps * LANES + m.lane) < 1

    def at(self, m: Any) -> list[tuple[Any, Any]]:
        """Of each read: its first column, and whether the row has it."""
        lane = m.warp % self.warps * LANES + m.lane
        first = [(lane + read * self.warps * LANES) * COLUMNS for read in range(self.reads)]
        return [(column, column < self.width) for column in first]


def rows_of(count: int, width: int) -> Rows | None:
    """The share of `count` rows of `width` columns, a multiple of `COLUMNS`; None: too wide."""
    warps = 1
    while width > warps * LANES * COLUMNS * MOST_READS:
        warps *= 2
    if warps > WARPS:
        return None
    reads = -(-width // (warps * LANES * COLUMNS))
    each = count * warps // (sm_count() * WARPS_AT_ONCE)
    return Rows(count, width, warps, reads, min(max(each, 1), MOST_ROWS))


def row_sum(m: Any, rows: Rows, room: Any, turn: Any, word: Any) -> Any:
    """A sum over a row's lanes; the same bits in all of them.

    Args:
        m: the machine.
        rows: who shares a row.
        room: shared memory, [2 · WARPS] words. Two rows that follow each other use one half each: a
            warp gets to the row after the next one when all have left this one.
        turn: which row of the group's.
        word: float32, a lane's part.
    """
    word = lane_sum(m, word, LANES)
    if rows.warps == 1:
        return word
    begin = turn % 2 * WARPS
    m.store(room, begin + m.warp, word, m.lane < 1)
    m.wait_for_block()
    first = begin + m.warp // rows.warps * rows.warps
    total = m.load(room, first)
    for other in range(1, rows.warps):
        total = m.float_add(total, m.load(room, first + other))
    return total
