"""How products are cut up on Hopper."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.hopper.compat import sm_count

__all__ = ["RowsConfig", "choose_config"]

_WIDTHS = (256, 192, 128, 64)  # of a part, widest first: fewer bytes from L2 for each operation
_TILE_COST = 24  # of a tile besides its columns, in columns


@dataclass(frozen=True)
class RowsConfig:
    """Sizes of a product's tiles.

    tile_n: columns of a tile, all parts together.
    sms: streaming multiprocessors that are used.
    tile_k: of the contraction, for a stage.
    stages: of the ring.
    band: row tiles that are swept over all columns together, for reuse in the L2 cache.
    """

    tile_n: int
    sms: int
    tile_k: int = 64
    stages: int = 4
    band: int = 4

    @property
    def lag(self) -> int:
        """Steps between starting a gather and waiting for it.

        A stage is released a step late, so that with stages or more both sides would wait.
        """
        return min(2, self.stages - 1)


def choose_config(
    columns: int,
    *,
    tiles: int = 0,
    parts: int = 1,
    widest: int = 256,
    stages: int = 4,
    band: int = 4,
    reserve_sms: int = 0,
) -> RowsConfig:
    """A good cut for a product.

    Args:
        columns: of a part, a multiple of 64.
        tiles: row tiles; 0: so many that all multiprocessors have work whatever the width.
        parts: accumulators side by side.
        widest: most columns of all parts together.
        stages, band: see `RowsConfig`.
        reserve_sms: streaming multiprocessors to leave free, for communication.
    """
    sms = max(1, sm_count() - reserve_sms)

    def rounds(width: int) -> int:
        """Time of the busiest multiprocessor, in columns; a tile costs some whatever its width."""
        return -(-tiles * (columns // width) // sms) * (width + _TILE_COST)

    fitting = [w for w in _WIDTHS if columns % w == 0 and w * parts <= widest]
    width = min(fitting, key=lambda w: (rounds(w), -w))
    return RowsConfig(tile_n=parts * width, sms=sms, stages=stages, band=band)
