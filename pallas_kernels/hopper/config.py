"""How products are cut up on Hopper: by the device's table of measured sizes, or by a heuristic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pallas_kernels.hopper.compat import most_blocks_of_a_cluster, sm_count
from pallas_kernels.tuning.lookup import cut_for
from pallas_kernels.tuning.product import (
    TILE_K,
    WIDTHS,
    Cut,
    Product,
    bucket,
    can_pair,
    ring_stages,
)

__all__ = ["RING", "RowsConfig", "check_reserve", "choose_config"]

RING = 4 * 48 * 1024  # bytes of the ring; the epilogue's buffers take what remains of 227 KiB
_TILE_COST = 24  # of a tile besides its columns, in columns


@dataclass(frozen=True)
class RowsConfig:
    """Sizes of a product's tiles.

    tile_n: columns of a tile, all parts together.
    sms: streaming multiprocessors that are used.
    tile_k: of the contraction, for a stage.
    stages: of the ring.
    band: row tiles that are swept over all columns together, for reuse in the L2 cache.
    cluster: blocks, 1 or 2, that load what both multiply with once for both (TMA multicast).
    """

    tile_n: int
    sms: int
    tile_k: int = TILE_K
    stages: int = 4
    band: int = 4
    cluster: int = 1

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(
                f"stages={self.stages}: a stage is released a step late, so 2 at least"
            )

    @property
    def clusters(self) -> int:
        """That run side by side; of one block each, or of a pair."""
        return self.sms // self.cluster

    @property
    def lag(self) -> int:
        """Steps between starting a gather and waiting for it.

        A stage is released a step late, so that with stages or more both sides would wait.
        """
        return min(2, self.stages - 1)


def check_reserve(reserve_sms: int) -> None:
    """Raises ValueError unless this is a number of multiprocessors, 0 or more."""
    whole = isinstance(reserve_sms, int) and not isinstance(reserve_sms, bool)
    if not whole or reserve_sms < 0:
        raise ValueError(
            f"reserve_sms={reserve_sms!r} must be a number of multiprocessors, 0 or more"
        )


def _usable_sms(reserve_sms: int) -> int:
    check_reserve(reserve_sms)
    there = sm_count()
    if reserve_sms >= there:
        raise ValueError(
            f"reserve_sms={reserve_sms} leaves none of the device's {there} multiprocessors; "
            f"it can be {there - 1} at most"
        )
    return there - reserve_sms


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
    kernel: str = "",
    contraction: int = 0,
    groups: int = 0,
    assignments: int = 0,
    flags: Mapping[str, bool] | None = None,
    dtype: str = "bfloat16",
) -> RowsConfig:
    """A good cut for a product: the tuning table's where it has one, else by a heuristic.

    Args:
        columns: of a part, a multiple of 64.
        tiles: row tiles; 0: so many that all multiprocessors have work whatever the width.
        parts: accumulators side by side.
        widest: most columns of all parts together.
        rows: of a tile.
        ring: bytes of shared memory for all stages.
        band: of the heuristic; see `RowsConfig`.
        reserve_sms: streaming multiprocessors to leave free, for communication.
        kernel, contraction, groups, assignments, flags, dtype: see
            `pallas_kernels.tuning.Product`; assignments need not be a power of two, and of the
            flags those that are true count. No kernel: no table is asked.

    Raises:
        ValueError: `reserve_sms` leaves no multiprocessor, or the device's table is not valid.
    """
    sms = _usable_sms(reserve_sms)

    def rounds(width: int) -> int:
        """Time of the busiest multiprocessor, in columns; a tile costs some whatever its width."""
        return -(-tiles * (columns // width) // sms) * (width + _TILE_COST)

    fitting = [w for w in WIDTHS if columns % w == 0 and w * parts <= widest]
    width = min(fitting, key=lambda w: (rounds(w), -w))
    cut = Cut(parts * width, ring_stages(ring, rows, parts * width), band)
    if kernel:
        product = Product(
            kernel=kernel,
            contraction=contraction,
            columns=columns,
            groups=groups,
            assignments=bucket(assignments),
            parts=parts,
            tile_rows=rows,
            widest=widest,
            ring=ring,
            flags=tuple(sorted(name for name, on in (flags or {}).items() if on)),
            dtype=dtype,
        )
        if can_pair(product, cut.tile_n) and _better_in_pairs(product):
            cut = replace(cut, cluster=2)
        cut = cut_for(product, cut)
    cluster = min(cut.cluster, sms, most_blocks_of_a_cluster())
    return RowsConfig(cut.tile_n, sms, stages=cut.stages, band=cut.band, cluster=cluster)


def _better_in_pairs(product: Product) -> bool:
    """What both blocks need is read once from the L2 cache, but they wait for each other.

    Measured on an H100 (docs/performance.md): −2 to −5 % of the time, but up to +7 % where one of
    them waits for gathered rows or for an epilogue that loads.
    """
    waits = any(flag.startswith("gather") for flag in product.flags)
    return not waits and product.kernel != "experts_down_backward"
