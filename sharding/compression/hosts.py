"""Gradients summed exactly inside a host and rounded between hosts.

`data` runs over H hosts, each with d consecutive data ranks; the other axes stay inside a host. A
rank cuts its gradient into chunks [H, d, E] as `quantized` does. Inside the host float32
reduce-scatters leave it H rows, the host's sums of one chunk for each host; these go to the ranks
in the same place of the other hosts, rounded. So a rank sends 1 / (d·E) of its gradient between
hosts, once (and where nothing is stored in pieces, as much on the way back).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from sharding.collectives import AxisGroups, axis_arguments, axis_size
from sharding.compression.blocks import Blocks
from sharding.compression.chunks import Chunks
from sharding.compression.quantized import Ranks, sum_rows
from sharding.mesh import DATA
from sharding.traffic import Kind, Part

__all__ = ["contradiction", "crossings", "reduce"]


def _groups(data: int, hosts: int) -> tuple[Ranks, Ranks]:
    """Data ranks of one host, and those in the same place of all hosts."""
    near = data // hosts
    if near == 1:
        return (DATA,), (DATA,)
    inside = tuple(tuple(range(h * near, (h + 1) * near)) for h in range(hosts))
    return AxisGroups(DATA, inside), AxisGroups(DATA, tuple(zip(*inside)))


def reduce(
    grad: jax.Array,
    state: jax.Array | None,
    axes: tuple[str, ...],
    dim: int | None,
    *,
    key: jax.Array | None,
    blocks: Blocks,
    hosts: int,
) -> tuple[jax.Array, jax.Array | None]:
    """As `quantized.reduce`, exact inside hosts.

    Args:
        grad, state, axes, dim, key, blocks: as there. Of the residual only this rank's chunks of
            each host are ever other than zero.
        hosts: H, of which `data` has equal parts; at least 2.
    """
    sizes = {a: axis_size(a) for a in axes}
    chunks = Chunks(grad.shape, sizes, dim, blocks.block)
    near, others = sizes[DATA] // hosts, tuple(a for a in axes if a != DATA)
    inside, between = _groups(sizes[DATA], hosts)
    grad = grad.astype(jnp.float32)
    rows = chunks.cut(grad if state is None else grad + state)
    rows = rows.reshape(hosts, near, axis_size(others), chunks.width)
    place = lax.axis_index(DATA)
    here_dE = jnp.arange(near, dtype=jnp.int32)[:, None] == place % near
    if axis_size(others) > 1:
        here_E = jnp.arange(rows.shape[2], dtype=jnp.int32) == lax.axis_index(others)
        here_dE = here_dE & here_E
        rows = lax.psum_scatter(rows, others, scatter_dimension=2)
    rows = rows.reshape(hosts, near, chunks.width)
    if near > 1:
        rows = lax.psum_scatter(rows, scatter_dimension=1, **axis_arguments(inside))
    rows_HC = rows.reshape(hosts, chunks.width)
    total, left_HC = sum_rows(
        *(rows_HC, between, place // near, key, blocks),
        gather=between if dim is None else None,
        keep=state is not None,
    )
    if dim is None:
        whole = total[:, None]
        if near > 1:
            whole = lax.all_gather(total, axis=1, **axis_arguments(inside))
        whole = whole[:, :, None]
        if axis_size(others) > 1:
            whole = lax.all_gather(whole[:, :, 0], others, axis=2)
        piece = chunks.join_piece(whole)
    else:
        whole = lax.all_gather(total, others, tiled=True) if axis_size(others) > 1 else total
        piece = chunks.join_piece(whole)
    if left_HC is not None:
        left = jnp.where(here_dE[:, :, None], left_HC[:, None, None], 0.0)
        state = chunks.join(left.reshape(chunks.ranks, chunks.width))
    return piece, state


def crossings(
    shape: tuple[int, ...], sizes: Mapping[str, int], dim: int | None, blocks: Blocks, hosts: int
) -> list[tuple[Kind, tuple[str, ...], int, Part, int]]:
    """The collectives of `reduce`: kind, axes, bytes a rank puts in, where, and how many take part.

    Args:
        shape: of the local gradient.
        sizes: devices along each axis that is summed over, `data` first.
        dim, blocks, hosts: as for `reduce`.
    """
    chunks = Chunks(shape, sizes, dim, blocks.block)
    near, row = sizes[DATA] // hosts, blocks.row_bytes(chunks.width)
    others = tuple(a for a in sizes if a != DATA)
    count = chunks.ranks // sizes[DATA]
    whole = 4 * chunks.ranks * chunks.width
    inside: Part = "inside hosts"
    between: Part = "between hosts" if near > 1 else ""
    found: list[tuple[Kind, tuple[str, ...], int, Part, int]] = [
        ("reduce-scatter", others, whole, "", count),
        ("reduce-scatter", (DATA,), whole // count, inside, near),
        ("all-to-all", (DATA,), hosts * row, between, hosts),
    ]
    if dim is not None:
        return [*found, ("all-gather", others, 4 * chunks.width, "", count)]
    return [
        *found,
        ("all-gather", (DATA,), row, between, hosts),
        ("all-gather", (DATA,), 4 * hosts * chunks.width, inside, near),
        ("all-gather", others, 4 * hosts * near * chunks.width, "", count),
    ]


def contradiction(hosts: int, laid_DET: np.ndarray) -> str:
    """What is to be told where a mesh lies on other hosts than the flag says; empty if it does not.

    The sums are right all the same: what changes is how much travels between hosts, and what is
    rounded. On TPUs, whose hosts are joined inside a slice, the flag may well mean slices.

    Args:
        hosts: H of the flag; 0: not given.
        laid_DET: int [data, expert, tensor], the host of each device.
    """
    if not hosts:
        return ""
    real, data = len(np.unique(laid_DET)), len(laid_DET)
    fitting = [h for h in range(1, data + 1) if data % h == 0 and _inside_hosts(h, laid_DET)]
    flag = "--grad-compression.hosts"
    if hosts in fitting and hosts == fitting[0]:
        return ""
    on = "one host" if real == 1 else f"{real} hosts"
    advice = f"{flag} {0 if fitting[:1] in ([], [1]) else fitting[0]}"
    if hosts not in fitting:
        return (
            f"note: {flag} {hosts} on a mesh that lies on {on}: devices that are taken for one "
            f"host's are of several, and send float32 between them; pass {advice}"
        )
    return (
        f"note: {flag} {hosts} on a mesh that lies on {on}: gradients are rounded between devices "
        f"of one host, too; pass {advice}"
        + (", with method none where nothing should be rounded" if real == 1 else "")
    )


def _inside_hosts(hosts: int, laid_DET: np.ndarray) -> bool:
    """Whether each of so many equal groups along `data` lies in one host."""
    groups = laid_DET.reshape(hosts, -1)
    return bool((groups == groups[:, :1]).all())
