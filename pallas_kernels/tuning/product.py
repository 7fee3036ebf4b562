"""What decides how a product is cut up, and which cuts are possible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product as every

__all__ = [
    "BANDS",
    "DTYPES",
    "FLAGS",
    "KERNELS",
    "WIDTHS",
    "Cut",
    "Product",
    "bucket",
    "can_pair",
    "candidates",
    "refusal",
    "ring_stages",
]

TILE_K = 64  # of the contraction, for a stage
STEP = 64  # columns that a part of a tile is a multiple of
ELEMENT = 2  # bytes
WIDTHS = (256, 192, 128, 64)  # of a part, widest first: fewer bytes from L2 for each operation
CLUSTERS = (1, 2)  # thread blocks that load together
BANDS = (2, 3, 4, 8, 16, 32)
MOST_STAGES = 8
KERNELS = (
    "experts_down",
    "experts_down_backward",
    "experts_up",
    "grouped_matmul",
    "rows_gradient",
    "w_in_gradient",
    "w_out_gradient",
    "weights_gradient",
)
FLAGS = ("few", "gather", "gather_lhs", "gather_rhs", "keep", "ragged", "transposed", "weights")
DTYPES = ("bfloat16",)


@dataclass(frozen=True, order=True)
class Product:
    """The key of a table's entry. What a kernel leaves room for is in it, so that an entry does not
    outlive a change of the kernel.

    kernel: its name, one of `KERNELS`.
    contraction, columns: the sides of a group's matrix; columns are those of one part. With the
        flag `weights` the matrices are the result, and the contraction is over a group's rows.
    groups: G.
    assignments: rows that are wanted, rounded down to a power of two.
    parts: accumulators side by side.
    tile_rows: rows of a tile.
    widest: most columns of a tile, all parts together.
    ring: bytes of shared memory for all stages.
    flags: what else makes it another program, of `FLAGS`, sorted.
    dtype: of the operands, one of `DTYPES`.
    tile_k: of the contraction, for a stage.
    """

    kernel: str
    contraction: int
    columns: int
    groups: int
    assignments: int
    parts: int
    tile_rows: int
    widest: int
    ring: int
    flags: tuple[str, ...]
    dtype: str
    tile_k: int = TILE_K

    def __str__(self) -> str:
        text = f"{self.kernel} {self.contraction}×{self.parts * self.columns}, {self.groups} groups"
        return ", ".join([f"{text}, {self.assignments} rows", *self.flags])


@dataclass(frozen=True, order=True)
class Cut:
    """A table's answer; the fields are those of `pallas_kernels.hopper.config.RowsConfig`."""

    tile_n: int
    stages: int
    band: int
    cluster: int = 1

    def __str__(self) -> str:
        text = f"{self.tile_n} columns, {self.stages} stages, bands of {self.band}"
        return f"{text}, in pairs" if self.cluster > 1 else text


def bucket(rows: int) -> int:
    """The largest power of two that is at most `rows`; 1 for none."""
    return 1 << max(0, rows.bit_length() - 1)


def _stage(tile_rows: int, tile_n: int, tile_k: int = TILE_K) -> int:
    """Bytes of a stage."""
    return (tile_rows + tile_n) * tile_k * ELEMENT


def ring_stages(ring: int, tile_rows: int, tile_n: int) -> int:
    """The stages for which there is room.

    Narrow tiles get more of them: what matters is how many bytes are under way.
    """
    return min(MOST_STAGES, ring // _stage(tile_rows, tile_n))


def refusal(product: Product, cut: Cut) -> str | None:
    """Why a product cannot be cut up like this; None if it can."""
    width, odd = divmod(cut.tile_n, product.parts)
    if odd or width % STEP or width <= 0:
        return f"tile_n={cut.tile_n} is not {product.parts} times a multiple of {STEP}"
    if cut.tile_n > product.widest:
        return f"tile_n={cut.tile_n} is more than the {product.widest} columns of its registers"
    if product.columns % width:
        return f"tile_n={cut.tile_n}: tiles of {width} do not divide {product.columns} columns"
    if cut.stages < 2:
        return f"stages={cut.stages}: a stage is released a step late, so 2 at least"
    needed = cut.stages * _stage(product.tile_rows, cut.tile_n, product.tile_k)
    if needed > product.ring:
        return (
            f"stages={cut.stages} of tile_n={cut.tile_n} need {needed} bytes of shared memory, "
            f"and {product.ring} are left for them"
        )
    if cut.band < 1:
        return f"band={cut.band} must be 1 at least"
    if cut.cluster not in CLUSTERS:
        return f"cluster={cut.cluster} is none of {', '.join(map(str, CLUSTERS))}"
    if cut.cluster > 1 and not can_pair(product, cut.tile_n):
        return f"cluster={cut.cluster}: its tiles cannot be shared out to pairs of blocks"
    return None


def can_pair(product: Product, tile_n: int) -> bool:
    """Whether two blocks can have tiles beside each other throughout, and load together."""
    if {"few", "ragged"} & set(product.flags):
        return False
    if "weights" not in product.flags:
        return True
    tile, size = product.tile_rows, product.contraction
    if "gather_rhs" in product.flags:
        tile, size = tile_n, product.columns
    return size % (2 * tile) == 0


def _possible(product: Product) -> Iterator[Cut]:
    for width, band, cluster in every(WIDTHS, BANDS, CLUSTERS):
        tile_n = width * product.parts
        for stages in range(2, ring_stages(product.ring, product.tile_rows, tile_n) + 1):
            if refusal(product, cut := Cut(tile_n, stages, band, cluster)) is None:
                yield cut


def _tallest(product: Product) -> int:
    """Row tiles: taller bands are the same program. Unknown where it depends on the routing."""
    rows = product.contraction if "weights" in product.flags else 2**31
    return -(-rows // product.tile_rows)


def candidates(product: Product, heuristic: Cut, most: int) -> list[Cut]:
    """Cuts worth trying beside the heuristic's, the nearest to it first.

    A step is the next width, the next band, a stage fewer than fit, or pairs of blocks instead of
    single ones. Where tiles have few rows, bands hardly matter, as there are few tiles.

    Args:
        product: what is cut up.
        heuristic: is left out.
        most: how many.
    """
    band_cost, others_cost = (3.0, 1.0) if "few" in product.flags else (1.0, 1.5)
    tallest = _tallest(product)
    every_cut = {replace(cut, band=min(cut.band, tallest)) for cut in _possible(product)}
    here = replace(heuristic, band=min(heuristic.band, tallest))
    bands = sorted({cut.band for cut in every_cut} | {here.band})
    tiles = sorted({cut.tile_n for cut in every_cut} | {here.tile_n})

    def distance(cut: Cut) -> float:
        wider = abs(tiles.index(cut.tile_n) - tiles.index(here.tile_n))
        fewer = ring_stages(product.ring, product.tile_rows, cut.tile_n) - cut.stages
        away = abs(bands.index(cut.band) - bands.index(here.band))
        other = cut.cluster != here.cluster
        return others_cost * (wider + fewer) + band_cost * away + other

    return sorted(every_cut - {here}, key=lambda cut: (distance(cut), cut))[:most]
