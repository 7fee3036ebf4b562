"""How many pages of the key-value cache a device has room for."""

from __future__ import annotations

import math

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding

from moejax.errors import UserError
from moejax.model.cache import init_pages, page_specs
from moejax.training.state import Blueprint

__all__ = ["default_pages", "page_bytes"]

_SHARE_OF_FREE = 0.8  # the rest is for what steps need on their way


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

    Where a device does not say how much memory it has, as fake ones do not, all are taken to fit.

    Raises:
        UserError: there is no room for one text.
    """
    of_text = -(-max_len // page_len)
    reports = [d.memory_stats() for d in blueprint.mesh.local_devices]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in reports if s and "bytes_limit" in s]
    if not free:
        return rows * of_text
    fit = int(min(free) * _SHARE_OF_FREE) // page_bytes(blueprint, page_len)
    if fit < 2:
        raise UserError(
            f"free memory of {min(free)} bytes: too little for a key-value cache; use more devices"
        )
    return min(rows * of_text, fit)
