"""How many pages of the key-value cache a device has room for."""

from __future__ import annotations

import math

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding

from moejax.errors import UserError
from moejax.meminfo import meminfo
from moejax.model.cache import init_pages, page_specs
from moejax.training.state import Blueprint
from sharding.distributed import smallest

__all__ = ["default_pages", "free_bytes", "page_bytes"]

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

    See `free_bytes` of devices that do not say how much memory they have.

    Raises:
        UserError: there is no room for one text.
    """
    of_text = -(-max_len // page_len)
    room = _room(blueprint, _SHARE_OF_FREE)
    wanted = fit = rows * of_text
    if not math.isinf(room):
        fit = int(room) // page_bytes(blueprint, page_len)
    if fit < min(wanted, 2):
        raise UserError(
            f"free memory of {room:.0f} bytes: too little for a key-value cache; use more devices"
        )
    # Programs are compiled for the number, so it is the same in all processes.
    return smallest("pages", min(wanted, fit))


def free_bytes(blueprint: Blueprint) -> float:
    """Memory that the fullest of this process's devices has left; infinite where it is not told.

    Devices that do not say how much they have, as a CPU's, share half of what their host has left.
    """
    return _room(blueprint, 1.0)


def _room(blueprint: Blueprint, share: float) -> float:
    """A share of what a device has free."""
    reports = [d.memory_stats() for d in blueprint.mesh.local_devices]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in reports if s and "bytes_limit" in s]
    return min(free) * share if free else _host_bytes() * _SHARE_OF_HOST / len(reports)


def _host_bytes() -> float:
    """Memory that this host has left; infinite where it does not tell."""
    left = meminfo("MemAvailable")
    return math.inf if left is None else float(left)
