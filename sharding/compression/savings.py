"""Whether a method sends fewer bytes of a gradient than the exact sum would, and how that is told.

A method has costs that float32 has not: chunks padded to whole blocks, factors of matrices that are
small, numbers that every rank sends to every other. Where these outweigh what is saved, the exact
sum is both smaller and right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sharding.compression.interface import Sent
from sharding.mesh import DATA
from sharding.traffic import sent_bytes

__all__ = ["compressed_bytes", "exact_bytes", "explain_larger"]

NAMES = 4  # parameters that are named


def compressed_bytes(found: Sequence[Sent], sizes: Mapping[str, int], hosts: int = 0) -> float:
    """Bytes that a rank sends of a gradient by a method.

    Args:
        found: collectives, as of `Method.crossings`.
        sizes: devices along each axis that is summed over.
        hosts: where it is not 0, only what goes to other hosts is counted.
    """
    total = 0.0
    for kind, axes, operand, *among in found:
        if hosts and (DATA not in axes or "inside hosts" in among):
            continue
        devices = int(among[1]) if among else math.prod(sizes[a] for a in axes)
        total += sent_bytes(kind, devices, operand)
    return total


def exact_bytes(
    shape: tuple[int, ...], sizes: Mapping[str, int], dim: int | None, hosts: int = 0
) -> float:
    """Bytes that a rank sends of a gradient that is summed as float32, see `sharding.zero`.

    Args:
        shape: of the local gradient.
        sizes: devices along each axis that is summed over, `data` first.
        dim: the dimension that storage splits over `data`; None where it splits none.
        hosts: where it is not 0, only what goes to other hosts is counted, on average over ranks:
            a ring over `data` leaves each host once.
    """
    whole, ranks = 4 * math.prod(shape), math.prod(sizes.values())
    if dim is None:
        sent = sent_bytes("all-reduce", ranks, whole)
        return sent * hosts / ranks if hosts else sent
    data = sizes[DATA]
    scattered = sent_bytes("reduce-scatter", data, whole)
    if hosts:
        return scattered * hosts / data
    return scattered + sent_bytes("all-reduce", ranks // data, whole / data)


def explain_larger(method: str, compressed: int, larger: Sequence[str]) -> str:
    """What is told where a method does not serve all parameters that it might; empty if it does.

    Args:
        method: its name.
        compressed: number of parameters that it serves.
        larger: names of those that would be no fewer bytes.
    """
    if not larger:
        return ""
    names = ", ".join(larger[:NAMES])
    more = f" and {len(larger) - NAMES} more" if len(larger) > NAMES else ""
    return (
        f"gradients: {method} serves {compressed} of {compressed + len(larger)} large matrices; of "
        f"the others it would send no less than float32, so they are summed exactly: {names}{more}"
    )
