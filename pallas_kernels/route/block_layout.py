"""The sorted layout of few assignments on NVIDIA GPUs: one block, one launch.

A warp counts 32 assignments at a time: lanes with the same group find each other (`match`, PTX
ISA), and the first adds their number to the warp's count of the group, so that the order is kept
and nothing depends on which warp comes first.
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
MAX_PLACES = 2**17  # what one block fills in a few microseconds


def refusal(rows: int, copies: int, groups: int, places: int) -> str | None:
    """Why the kernel cannot serve this, or None."""
    if rows * copies * groups == 0:
        return "no rows, no assignments or no groups"
    if rows * copies > MAX_ASSIGNMENTS:
        return f"{rows * copies} assignments; one block takes up to {MAX_ASSIGNMENTS}"
    if groups > THREADS:
        return f"{groups} groups; one block takes up to {THREADS}"
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
    counts: Any,
    starts: Any,
    sums: Any,
    _block: Any,
    *,
    rows: int,
    copies: int,
    groups: int,
    places: int,
) -> None:
    """The whole layout; arguments as of `layout`, then scratch: counts of warps and groups,
    starts of groups, sums of warps.
    """
    assignments, tiles = rows * copies, places // ROWS
    steps = -(-assignments // THREADS)

    m.fill(copy_out, places, assignments, THREADS)
    for first in range(0, WARPS * groups, THREADS):
        at = m.thread + first
        m.store(counts, at, 0, at < WARPS * groups)

    for first in range(0, tiles, THREADS):
        at = m.thread + first
        m.store(tile_group, at, groups - 1, at < tiles)
        m.store(tile_rows, at, 0, at < tiles)

    # A warp has 32 · steps assignments in a row.
    flat = [(m.warp * steps + step) * LANES + m.lane for step in range(steps)]
    found = [m.load(ids, at, at < assignments) for at in flat]
    some = [
        (at < assignments) & (id_ >= 0) & (id_ < groups)
        for at, id_ in zip(flat, found, strict=True)
    ]
    m.wait_for_block()
    ranks = []
    for id_, valid in zip(found, some, strict=True):
        peers = m.match(m.select(valid, id_, -1))
        earlier = m.count_bits(peers & m.lanes_below())
        count = m.warp * groups + id_
        before = m.load(counts, count, valid)
        m.wait_for_warp()
        m.store(counts, count, before + m.count_bits(peers), valid & (earlier == 0))
        m.wait_for_warp()
        ranks.append(before + earlier)
    m.wait_for_block()

    # A thread for each group: where each warp's part begins, and the group.
    has_group = m.thread < groups
    total = m.thread * 0
    each = [m.load(counts, m.thread + warp * groups, has_group) for warp in range(WARPS)]
    for warp, count in enumerate(each):
        m.store(counts, m.thread + warp * groups, total, has_group)
        total = total + count
    whole = (total + (ROWS - 1)) // ROWS
    ends = whole
    for distance in (1, 2, 4, 8, 16):
        ends = m.select(m.lane < distance, ends, ends + m.shift_up(ends, distance))
    m.store(sums, m.warp, ends, m.lane == LANES - 1)
    m.wait_for_block()
    all_tiles = m.thread * 0
    for warp in range(WARPS):
        of_warp = m.load(sums, m.thread * 0 + warp)
        ends = m.select(m.warp < warp + 1, ends, ends + of_warp)
        all_tiles = all_tiles + of_warp
    begin = ends - whole
    m.store(starts, m.thread, begin * ROWS, has_group)
    m.store(sizes_out, m.thread, whole * ROWS, has_group)
    count = m.select(all_tiles < tiles, all_tiles, tiles)  # lists end there, whatever the ids say
    m.store(tile_count, m.thread, count, m.thread == 0)
    for tile in range(-(-rows // ROWS)):  # a group has at most one assignment of each row
        mine = has_group & (whole >= tile + 1) & (begin + tile < tiles)
        here = total - tile * ROWS
        m.store(tile_group, begin + tile, m.thread, mine)
        m.store(tile_rows, begin + tile, m.select(here < ROWS, here, ROWS), mine)
    m.wait_for_block()

    for at, id_, valid, rank in zip(flat, found, some, ranks, strict=True):
        start = m.load(starts, id_, valid) + m.load(counts, m.warp * groups + id_, valid)
        place = m.select(valid, start + rank, places)
        m.store(place_out, at, place, at < assignments)
        m.store(copy_out, place, at, valid & (place < places))


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
    tiles = places // ROWS
    lengths = (rows * copies, groups, places, tiles, tiles, 1)
    place, sizes, copy, *tile_lists = launch(
        partial(program, rows=rows, copies=copies, groups=groups, places=places),
        "sorted_places",
        blocks=1,
        threads=THREADS,
        inputs=[ids_RJ.reshape(-1)],
        out_type=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in lengths],
        scratch=(WARPS * groups, groups, WARPS),
    )
    return place.reshape(rows, copies), sizes, copy, TileMap(*tile_lists)
