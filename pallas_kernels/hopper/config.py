"""How products are cut up on Hopper."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.hopper.compat import sm_count

__all__ = ["RING", "RowsConfig", "choose_config"]

_WIDTHS = (256, 192, 128, 64)  # of a part, widest first: fewer bytes from L2 for each operation
RING = 4 * 48 * 1024  # bytes of the ring; the epilogue's buffers take what remains of 227 KiB
_MOST_STAGES = 8
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

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(
                f"stages={self.stages}: a stage is released a step late, so 2 at least"
            )

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
    rows: int = 128,
    ring: int = RING,
    band: int = 4,
    reserve_sms: int = 0,
) -> RowsConfig:
    """A good cut for a product.

    Args:
        columns: of a part, a multiple of 64.
        tiles: row tiles; 0: so many that all multiprocessors have work whatever the width.
        parts: accumulators side by side.
        widest: most columns of all parts together.
        rows: of a tile.
        ring: bytes of shared memory for all stages.
        band: see `RowsConfig`.
        reserve_sms: streaming multiprocessors to leave free, for communication.
    """
    sms = max(1, sm_count() - reserve_sms)

    def rounds(width: int) -> int:
        """Time of the busiest multiprocessor, in columns; a tile costs some whatever its width."""
        return -(-tiles * (columns // width) // sms) * (width + _TILE_COST)

    fitting = [w for w in _WIDTHS if columns % w == 0 and w * parts <= widest]
    width = min(fitting, key=lambda w: (rounds(w), -w))
    # Narrow tiles get more stages: what matters is how many bytes are under way.
    tile_n, tile_k = parts * width, 64
    stage = (rows + tile_n) * tile_k * 2
    stages = min(_MOST_STAGES, ring // stage)
    return RowsConfig(tile_n=tile_n, sms=sms, tile_k=tile_k, stages=stages, band=band)
