"""The router's product of few rows on Hopper: as accurate as float32, in one launch.

Every warp multiplies a tile of a slice of the contraction, so that few rows fill the device. Its
lanes read both factors from global memory straight into the registers of `mma` (PTX ISA), whose
order along the contraction and along the columns is free: a lane's 16 bytes of a row or column hold
what would belong to several instructions. The float32 weights are split into three bfloat16 parts,
whose products with bfloat16 rows are exact. The sums of a tile's warps are added up in one order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.compat import interpret_mode
from pallas_kernels.hopper.simt import LANES, launch
from pallas_kernels.hopper.simt_multiply import COLUMNS, ROWS, load_words, multiply_add
from pallas_kernels.route.warp_sums import Sums

__all__ = ["ProductConfig", "choose_config", "product", "refusal"]

DEPTH = 32  # of the contraction, for which a lane reads 16 bytes of a row
PARTS = 3  # bfloat16 numbers whose sum is a float32
CHAIN = 2  # depths summed up by the matrix unit, which rounds worse than float32 addition
MAX_ROWS = 512
MAX_D_MODEL = 16384  # its depths are unrolled
MAX_PRODUCTS = 2**27  # T · D · E, about the most that was measured


@dataclass(frozen=True)
class ProductConfig:
    """How a product is cut up.

    rows: of a tile, a multiple of 16 and of `blocks`.
    columns: of a tile: 8, 16 or a multiple of 32.
    deep: slices of a block, each a warp's: a multiple of 4.
    blocks: of a cluster, each with its slices of the contraction; at most 8.
    ahead: depths that are read before the first is used.
    """

    rows: int
    columns: int
    deep: int
    blocks: int = 8
    ahead: int = 2

    @property
    def slices(self) -> int:
        """Of the contraction."""
        return self.deep * self.blocks

    @property
    def vector(self) -> int:
        """Neighbouring columns that a lane reads at once."""
        return min(self.columns // COLUMNS, 4)


CHOICES = (  # by the most rows a config is taken for; many small blocks, as measured on an H100
    (16, ProductConfig(16, 8, 4)),
    (128, ProductConfig(32, 16, 4)),
    (MAX_ROWS, ProductConfig(64, 16, 4)),
)
LONG = 4096  # rows of so many take twice the slices, if they are so few that blocks are few too


def choose_config(tokens: int, d_model: int, experts: int) -> ProductConfig:
    """How a product that the kernel serves is cut up."""
    most, config = next(choice for choice in CHOICES if tokens <= choice[0])
    if experts % config.columns:
        config = replace(config, columns=COLUMNS)
    if most == CHOICES[0][0] and d_model >= LONG:
        config = replace(config, deep=2 * config.deep)
    return config


def refusal(tokens: int, d_model: int, experts: int, w_dtype: Any = jnp.float32) -> str | None:
    """Why the kernel cannot serve this, or None."""
    if jnp.dtype(w_dtype) != jnp.float32:
        return f"the weights are {jnp.dtype(w_dtype).name}, the kernel takes float32"
    if not 0 < tokens <= MAX_ROWS:
        return f"{tokens} rows; the kernel takes 1 to {MAX_ROWS}"
    if d_model % DEPTH or not 0 < d_model <= MAX_D_MODEL:
        return f"rows of {d_model}; the kernel takes multiples of {DEPTH} up to {MAX_D_MODEL}"
    if experts % COLUMNS or not experts:
        return f"{experts} experts; the kernel takes multiples of {COLUMNS}"
    if tokens * d_model * experts > MAX_PRODUCTS:
        return f"{tokens} × {d_model} × {experts} products; the kernel takes up to {MAX_PRODUCTS}"
    return None


def _split(m: Any, low: Any, high: Any) -> list[Any]:
    """The three bfloat16 parts of two float32, packed."""
    parts = []
    for i in range(PARTS):
        parts.append(m.pack(low, high))
        if i < PARTS - 1:
            rounded = m.unpack(parts[-1])
            low, high = m.float_sub(low, rounded[0]), m.float_sub(high, rounded[1])
    return parts


Fragments = list[list[list[Any]]]
"""Words of a warp's [rows, columns]: [tile of 16 rows][tile of 8 columns][word of `mma`]."""


def _multiply_depth(
    m: Any, rows: list[list[Any]], columns: list[list[Any]], c: Fragments
) -> Fragments:
    """Rows times columns of one depth, plus c.

    Args:
        m: the machine.
        rows: [8 rows of each 16][word], those of a lane: 8 numbers of a row.
        columns: [of the 8 numbers][tile of 8 columns], those of a lane: float32.
        c: what is added to.
    """
    split = [
        [[_split(m, *pair) for pair in zip(columns[k], columns[k + 1], strict=True)]
         for k in (4 * half, 4 * half + 2)]
        for half in range(2)
    ]  # fmt: skip
    c = [list(tiles) for tiles in c]
    for part in reversed(range(PARTS)):  # the smallest first
        for half, (first, second) in enumerate(split):
            for i, tiles in enumerate(c):
                upper, lower = rows[2 * i], rows[2 * i + 1]
                a = [upper[2 * half], lower[2 * half], upper[2 * half + 1], lower[2 * half + 1]]
                for j, own in enumerate(tiles):
                    tiles[j] = multiply_add(m, a, [first[j][part], second[j][part]], own)
    return c


def _add(m: Any, a: Fragments, b: Fragments) -> Fragments:
    """A + b."""
    return jax.tree.map(m.float_add, a, b)


def _sums(
    m: Any, x: Any, w: Any, row: Any, column: Any, slice_: Any, config: ProductConfig, sizes: Any
) -> Fragments:
    """A warp's sums over a slice of the contraction.

    Args:
        m: the machine.
        x: bfloat16 words [T · D / 2].
        w: float32 words [D · E].
        row, column: of the tile; of rows past the end the last one is taken.
        slice_: index.
        config: how the product is cut up.
        sizes: T, D, E.

    Returns:
        words of row i · 16 + lane // 4 (words 2 and 3: 8 below) and of column
        j // v · 8 v + (lane % 4 · 2 + word % 2) · v + j % v, where v = `config.vector`.
    """
    tokens, d_model, experts = sizes
    group, quad, v = m.lane // 4, m.lane % 4, config.vector
    there = d_model // DEPTH
    depths = -(-there // config.slices)
    # A slice may reach past the end; it then reads from elsewhere and takes rows of zeros.
    ragged = depths * config.slices != there
    start = slice_ * depths
    first = m.select(start < there, start, 0) if ragged else start
    left = []
    for below in range(0, config.rows, ROWS // 2):
        r = row + group + below
        r = m.select(r < tokens, r, tokens - 1)
        left.append(r * (d_model // 2) + first * (DEPTH // 2) + quad * 4)
    origin = (first * DEPTH + quad * 8) * experts + column + group * v
    right = [origin + tile for tile in range(0, config.columns, COLUMNS * v)]

    def read(depth: int) -> tuple[Any, Any]:
        step = m.select(start + depth < there, depth, 0) if ragged else depth
        rows = [load_words(m, x, index + step * (DEPTH // 2), 4) for index in left]
        columns = [
            [word for i in right for word in load_words(m, w, i + (step * DEPTH + k) * experts, v)]
            for k in range(8)
        ]
        return rows, columns

    zero = [[[m.lane * 0] * 4] * (config.columns // COLUMNS)] * (config.rows // ROWS)
    total, chain = None, zero
    loaded = [read(depth) for depth in range(min(config.ahead, depths))]
    for depth in range(depths):
        rows, columns = loaded.pop(0)
        if depth + config.ahead < depths:
            loaded.append(read(depth + config.ahead))
        if ragged:
            rows = [[m.select(start + depth < there, word, 0) for word in row] for row in rows]
        chain = _multiply_depth(m, rows, columns, chain)
        if (depth + 1) % CHAIN == 0 or depth + 1 == depths:
            total, chain = chain if total is None else _add(m, total, chain), zero
    assert total is not None
    return total


def _program(
    m: Any,
    x: Any,
    w: Any,
    out: Any,
    received: Any,
    mailbox: Any,
    block: Any,
    *,
    config: ProductConfig,
    sizes: tuple[int, int, int],
) -> None:
    """One block.

    Args:
        m: the machine.
        x, w, out: words of the factors and of the product.
        received, mailbox: of `Sums`.
        block: index; those of a cluster have the same tile.
        config: how the product is cut up.
        sizes: T, D, E.
    """
    tokens, _, experts = sizes
    tile, rank, v = block // config.blocks, block % config.blocks, config.vector
    across = experts // config.columns
    row, column = tile // across * config.rows, tile % across * config.columns
    sums = Sums(config.rows, config.columns, config.blocks, config.deep)
    sums.open(m, mailbox)
    slice_ = rank * config.deep + m.warp
    total = _sums(m, x, w, row, column, slice_, config, sizes)
    sums.wait_for_opening()
    for i, tiles in enumerate(total):
        for first in range(0, len(tiles), v):
            for below in range(2):
                words = [tiles[first + j][2 * below + s] for s in range(2) for j in range(v)]
                own_row = m.lane // 4 + (i * ROWS + below * 8)
                own_column = m.lane % 4 * (2 * v) + first * COLUMNS
                sums.send(m, received, mailbox, slice_, own_row, own_column, words)
    sums.wait(m, mailbox)
    first_row = row + rank * sums.rows
    sums.add_up(m, received, out, first_row, column, rows=tokens, experts=experts)


def product(x_TD: jax.Array, w_DE: jax.Array, config: ProductConfig | None = None) -> jax.Array:
    """X @ w as accurate as float32.

    Args:
        x_TD: bfloat16.
        w_DE: float32.
        config: how to cut it up; None: `choose_config`.

    Returns:
        float32 [T, E].
    """
    (tokens, d_model), experts = x_TD.shape, w_DE.shape[1]
    sizes = tokens, d_model, experts
    config = config or choose_config(*sizes)
    assert d_model % DEPTH == 0 and experts % config.columns == 0
    if interpret_mode() is not None:  # a block has all slices of a tile: numpy knows no clusters
        config = replace(config, deep=config.slices, blocks=1)
    tiles = -(-tokens // config.rows) * (experts // config.columns)
    (out,) = launch(
        partial(_program, config=config, sizes=sizes),
        "router_product",
        blocks=tiles * config.blocks,
        threads=config.deep * LANES,
        inputs=[x_TD.reshape(-1), w_DE.reshape(-1)],
        out_type=[jax.ShapeDtypeStruct((tokens * experts,), jnp.float32)],
        scratch=[Sums(config.rows, config.columns, config.blocks, config.deep).words, 4],
        cluster=config.blocks,
    )
    return out.reshape(tokens, experts)
