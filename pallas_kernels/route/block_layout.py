"""The sorted layout of few assignments on NVIDIA GPUs: one launch, no sorting.

The groups of a row are distinct. A group's rows are therefore a set, a bit for each row in shared
memory, and an assignment's rank is the number of bits before its own. Setting bits needs no order,
so nothing depends on which thread comes first.

Every block computes the whole layout, which costs no time, and stores its share of the list of
copies: most of what is stored, more than one multiprocessor can send off meanwhile.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels.hopper.simt import LANES, Machine, launch
from pallas_kernels.hopper.tiles import ROWS, TileMap

__all__ = ["THREADS", "layout", "program", "refusal"]

THREADS = 512
WARPS = THREADS // LANES
MAX_ASSIGNMENTS = 8 * THREADS
MAX_PLACES = 2**17
MAX_WORDS = 2**14  # of bits and of their counts, each, in shared memory
SHARE = 2048  # places that a block stores where there are enough blocks
MAX_BLOCKS = 16
CHUNK = 8  # words of a group's bits that are loaded side by side


def _blocks(places: int) -> int:
    return min(-(-places // SHARE), MAX_BLOCKS)


def refusal(rows: int, copies: int, groups: int, places: int) -> str | None:
    """Why the kernel cannot serve this, or None."""
    if rows * copies * groups == 0:
        return "no rows, no assignments or no groups"
    if rows * copies > MAX_ASSIGNMENTS:
        return f"{rows * copies} assignments; the kernel takes up to {MAX_ASSIGNMENTS}"
    if groups > THREADS:
        return f"{groups} groups; the kernel takes up to {THREADS}"
    words = -(-rows // LANES) * groups
    if words > MAX_WORDS:
        return f"{rows} rows in {groups} groups are {words} words of bits, not up to {MAX_WORDS}"
    if places > MAX_PLACES or places % ROWS:
        return f"{places} places, no multiple of {ROWS} up to {MAX_PLACES}"
    return None


def program(
    m: Machine,
    ids: Any,
    place_out: Any,
    sizes_out: Any,
    copy_out: Any,
    tile_group: Any,
    tile_rows: Any,
    tile_count: Any,
    bits: Any,
    before: Any,
    starts: Any,
    sums: Any,
    block: Any,
    *,
    rows: int,
    copies: int,
    groups: int,
    places: int,
) -> None:
    """The whole layout; arguments as of `layout`, then scratch: the groups' bits, how many come
    before each word of them, where groups start, sums of warps.
    """
    assignments, tiles = rows * copies, places // ROWS
    words = -(-rows // LANES)  # of a group's bits
    share = -(-tiles // _blocks(places)) * ROWS
    first_place = block * share
    first_block = m.thread * 0 + block == 0

    flat = [m.thread + first for first in range(0, assignments, THREADS)]
    found = [m.load(ids, at, at < assignments) for at in flat]
    for first in range(0, words * groups, 4 * THREADS):  # while they are on the way
        at = m.thread * 4 + first
        m.store_four(bits, at, [0] * 4, at < words * groups)
    for first in range(0, share, 4 * THREADS):
        at = m.thread * 4 + first
        place = first_place + at
        m.store_four(copy_out, place, [assignments] * 4, (at < share) & (place < places))
    m.wait_for_block()

    valid = [
        (at < assignments) & (id_ >= 0) & (id_ < groups)
        for at, id_ in zip(flat, found, strict=True)
    ]
    row = [at // copies for at in flat]
    word = [at // LANES * groups + id_ for at, id_ in zip(row, found, strict=True)]
    for at, own, some in zip(row, word, valid, strict=True):
        m.set_bits(bits, own, 1 << at % LANES, some)
    m.wait_for_block()

    # A thread for each group.
    has_group = m.thread < groups
    total = m.thread * 0
    for first in range(0, words, CHUNK):
        chunk = range(first, min(first + CHUNK, words))
        each = [m.load(bits, m.thread + i * groups, has_group) for i in chunk]
        for i, rows_of_word in zip(chunk, each, strict=True):
            m.store(before, m.thread + i * groups, total, has_group)
            total = total + m.count_bits(rows_of_word)
    whole = (total + (ROWS - 1)) // ROWS
    ends = whole
    for distance in (1, 2, 4, 8, 16):
        ends = m.select(m.lane < distance, ends, ends + m.shift_up(ends, distance))
    m.store(sums, m.warp, ends, m.lane == LANES - 1)
    m.store(starts, m.thread, ends - whole, has_group)  # within the warp
    m.wait_for_block()
    of_warps = [m.load(sums, m.thread * 0 + warp) for warp in range(-(-groups // LANES))]
    all_tiles = m.thread * 0
    for of_warp in of_warps:
        all_tiles = all_tiles + of_warp

    def tiles_before(warp: Any) -> Any:
        tiles = m.thread * 0
        for earlier, of_warp in enumerate(of_warps[:-1]):
            tiles = tiles + m.select(warp < earlier + 1, 0, of_warp)
        return tiles

    places_of_flat = []
    for at, id_, own, some in zip(row, found, word, valid, strict=True):
        earlier = m.load(bits, own, some) & ((1 << at % LANES) - 1)
        rank = m.load(before, own, some) + m.count_bits(earlier)
        start = m.load(starts, id_, some) + tiles_before(id_ // LANES)
        places_of_flat.append(m.select(some, start * ROWS + rank, places))
    for at, place, some in zip(flat, places_of_flat, valid, strict=True):
        mine = (place >= first_place) & (place < first_place + share) & (place < places)
        m.store(copy_out, place, at, some & mine)
        m.store(place_out, at, place, (at < assignments) & first_block)

    m.store(sizes_out, m.thread, whole * ROWS, has_group & first_block)
    count = m.select(all_tiles < tiles, all_tiles, tiles)  # lists end there, whatever the ids say
    m.store(tile_count, m.thread, count, (m.thread == 0) & first_block)
    begin = ends - whole + tiles_before(m.warp)
    for tile in range(-(-rows // ROWS)):  # a group has at most one assignment of each row
        mine = has_group & (whole >= tile + 1) & (begin + tile < tiles) & first_block
        here = total - tile * ROWS
        m.store(tile_group, begin + tile, m.thread, mine)
        m.store(tile_rows, begin + tile, m.select(here < ROWS, here, ROWS), mine)
    for first in range(0, tiles, THREADS):
        at = m.thread + first
        past = (at < tiles) & (at >= count) & first_block
        m.store(tile_group, at, groups - 1, past)
        m.store(tile_rows, at, 0, past)


def layout(
    ids_RJ: jax.Array, *, groups: int, places: int
) -> tuple[jax.Array, jax.Array, jax.Array, TileMap]:
    """Places for assignments, sorted by group, each group padded to whole tiles.

    Args:
        ids_RJ: int32, the group of each assignment; others for none. The groups of a row are
            distinct.
        groups: G.
        places: M, room for all groups.

    Returns:
        int32 [R, J], the place of each assignment, M for none; int32 [G], the groups' sizes with
        padding; int32 [M], the flat assignment r·J + j at each place, R·J for none; the tiles.
    """
    rows, copies = ids_RJ.shape
    tiles, words = places // ROWS, -(-rows // LANES) * groups
    lengths = (rows * copies, groups, places, tiles, tiles, 1)
    place, sizes, copy, *tile_lists = launch(
        partial(program, rows=rows, copies=copies, groups=groups, places=places),
        "sorted_places",
        blocks=_blocks(places),
        threads=THREADS,
        inputs=[ids_RJ.reshape(-1)],
        out_type=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in lengths],
        scratch=(-(-words // 4) * 4, words, groups, WARPS),
    )
    return place.reshape(rows, copies), sizes, copy, TileMap(*tile_lists)
