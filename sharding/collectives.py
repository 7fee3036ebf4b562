"""Every crossing between devices, by name, each with its own transpose.

All of these run inside one fully manual `jax.shard_map(..., check_vma=False)`. The transposes are
right when `grad` is taken *inside* that shard_map, under this convention:

* the loss of a device is its *share*: the sum over `data` × `expert` is the global loss;
* along `tensor` everything outside a tensor-parallel region is replicated, cotangents included.

Taken outside the shard_map the same transposes would be off by the axis size; `moejax.standalone`
wraps the layer for that use.

What arrives is marked (`received`), so that `remat="local"` keeps it and sends nothing again. In a
custom VJP the forward rule has to call what does the work itself: marks inside of a function that
has a VJP of its own are not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.exchange.received import received

__all__ = [
    "AxisGroups",
    "all_gather",
    "all_to_all",
    "axes_are_bound",
    "axis_arguments",
    "axis_index",
    "axis_size",
    "enter_parallel",
    "exit_parallel",
    "pmax_statistics",
    "psum_statistics",
]


@dataclass(frozen=True)
class AxisGroups:
    """A mesh axis in groups of equal size; what is exchanged over it stays within each group.

    axis: the mesh axis.
    groups: positions along the axis, each in one group; their order in it is that of the exchange.
    """

    axis: str
    groups: tuple[tuple[int, ...], ...]


AxisNames = str | Sequence[str]


def axis_arguments(axis: AxisNames | AxisGroups) -> dict[str, Any]:
    """An axis as the arguments of JAX's collectives."""
    if isinstance(axis, AxisGroups):
        return {"axis_name": axis.axis, "axis_index_groups": [list(g) for g in axis.groups]}
    return {"axis_name": axis}


def axis_size(axis: AxisNames | AxisGroups) -> int:
    """Number of devices along an axis, along several together, or in a group. Static."""
    if isinstance(axis, AxisGroups):
        return len(axis.groups[0])
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    size = 1
    for name in names:
        size *= lax.axis_size(name)
    return size


def axes_are_bound(axes: Sequence[str]) -> bool:
    """Whether this is traced inside a shard_map over all of these axes."""
    try:
        return axis_size(axes) > 0
    except NameError:  # what JAX raises for an axis that nothing around binds
        return False


def axis_index(axis: str | AxisGroups) -> jax.Array:
    """This device's position along an axis, or in its group; int32 []."""
    if not isinstance(axis, AxisGroups):
        return lax.axis_index(axis)
    place = {device: i for group in axis.groups for i, device in enumerate(group)}
    places = jnp.asarray([place[device] for device in range(len(place))], jnp.int32)
    return places[lax.axis_index(axis.axis)]


def psum_statistics(x, axis: AxisNames):
    """Sum over an axis of something no gradient flows through.

    Counts, norms, metrics, and sums within functions that have a VJP of their own.

    Args:
        x: a pytree of arrays.
        axis: mesh axis or axes.
    """
    return received(lax.psum(jax.tree.map(lax.stop_gradient, x), axis))


def pmax_statistics(x, axis: AxisNames):
    """Maximum over an axis of something no gradient flows through.

    Args:
        x: a pytree of arrays.
        axis: mesh axis or axes.
    """
    return received(lax.pmax(jax.tree.map(lax.stop_gradient, x), axis))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def enter_parallel(x, axis: AxisNames):
    """Identity forward, sum backward: what is replicated enters a region split along `axis`.

    The `f` of Megatron-LM (arXiv 1909.08053 §3). Works on any pytree of float arrays.
    """
    del axis
    return x


def _enter_fwd(x, axis):
    del axis
    return x, None


def _enter_bwd(axis, _, ct):
    return (lax.psum(ct, axis),)


enter_parallel.defvjp(_enter_fwd, _enter_bwd)


def exit_parallel(x, axis: AxisNames):
    """Sum forward, identity backward: partial results leave a region split along `axis`.

    The `g` of Megatron-LM (arXiv 1909.08053 §3). Works on any pytree of float arrays.
    """
    return received(_exit(x, axis))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _exit(x, axis):
    return lax.psum(x, axis)


def _exit_fwd(x, axis):
    return lax.psum(x, axis), None


def _exit_bwd(axis, _, ct):
    del axis
    return (ct,)


_exit.defvjp(_exit_fwd, _exit_bwd)


def all_gather(x: jax.Array, axis: AxisNames | AxisGroups, dim: int = 0) -> jax.Array:
    """Concatenates the devices' pieces along `dim`; backward sums each piece in float32 at home.

    Args:
        x: [..., n, ...], any dtype (integers carry no gradient).
        axis: mesh axis or axes, or groups of one.
        dim: the dimension that grows by the axis size.
    """
    return received(_gather(x, axis, dim))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, axis, dim):
    return lax.all_gather(x, axis=dim, tiled=True, **axis_arguments(axis))


def _gather_fwd(x, axis, dim):
    return _gather(x, axis, dim), None


def _gather_bwd(axis, dim, _, ct):
    return (_sum_scatter(ct, axis, dim),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _sum_scatter(x: jax.Array, axis: AxisNames | AxisGroups, dim: int) -> jax.Array:
    # An all-to-all of the pieces and a local float32 sum: the bytes of a ring reduce-scatter, but
    # each term is rounded once, not once a hop.
    size = axis_size(axis)
    if size == 1:
        return x
    pieces = x.reshape(*x.shape[:dim], size, x.shape[dim] // size, *x.shape[dim + 1 :])
    pieces = jnp.moveaxis(pieces, dim, 0)
    received = lax.all_to_all(pieces, split_axis=0, concat_axis=0, **axis_arguments(axis))
    return jnp.sum(received.astype(jnp.float32), axis=0).astype(x.dtype)


def all_to_all(x: jax.Array, axis: str | AxisGroups) -> jax.Array:
    """Device i's x[j] becomes device j's result[i]; backward is the same exchange.

    Args:
        x: [G, ...], G the axis size.
        axis: mesh axis, or groups of one: i and j are then positions in a group.
    """
    return received(_a2a(x, axis))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _a2a(x, axis):
    return lax.all_to_all(x, split_axis=0, concat_axis=0, **axis_arguments(axis))


def _a2a_fwd(x, axis):
    return _a2a(x, axis), None


def _a2a_bwd(axis, _, ct):
    return (lax.all_to_all(ct, split_axis=0, concat_axis=0, **axis_arguments(axis)),)


_a2a.defvjp(_a2a_fwd, _a2a_bwd)
