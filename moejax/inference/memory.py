"""How many pages of the key-value cache a device has room for."""

from __future__ import annotations

import math
from pathlib import Path

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding

from moejax.errors import UserError
from moejax.model.cache import init_pages, page_specs
from moejax.training.state import Blueprint

__all__ = ["default_pages", "page_bytes"]

_SHARE_OF_FREE = 0.8  # the rest is for what steps need on their way
_SHARE_OF_HOST = 0.5  # of a host's memory, where devices lie in it: others want some, too


def page_bytes(blueprint: Blueprint, page_len: int) -> int:
    """Bytes that one page takes on a device, of all layers together."""
    config, mesh = blueprint.config, blueprint.mesh
    devices = blueprint.shape.data * blueprint.shape.expert
    dtype = jnp.dtype(config.compute_dtype)
    pages = jax.eval_shape(lambda: init_pages(config, devices, page_len, dtype, mesh))
    sizes = jax.tree.map(
        lambda array, spec: (
            dtype.itemsize * math.prod(NamedSharding(mesh, spec).shard_shape(array.shape))
        ),
        pages,
        page_specs(config),
    )
    return sum(jax.tree.leaves(sizes))


def default_pages(blueprint: Blueprint, page_len: int, rows: int, max_len: int) -> int:
    """As many pages as `rows` texts of full length need, or as fit into the free memory.

    Devices that do not say how much memory they have, as a CPU's, share half of what their host has
    left.

    Raises:
        UserError: there is no room for one text.
    """
    of_text = -(-max_len // page_len)
    reports = [d.memory_stats() for d in blueprint.mesh.local_devices]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in reports if s and "bytes_limit" in s]
    room = min(free) * _SHARE_OF_FREE if free else _host_bytes() * _SHARE_OF_HOST / len(reports)
    if math.isinf(room):
        return rows * of_text
    fit = int(room) // page_bytes(blueprint, page_len)
    if fit < 2:
        raise UserError(
            f"free memory of {room:.0f} bytes: too little for a key-value cache; use more devices"
        )
    return min(rows * of_text, fit)


def _host_bytes() -> float:
    """Memory that this host has left; infinite where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(n.split()[1]) for n in lines if n.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return math.inf
