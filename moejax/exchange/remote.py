"""Rows in the layout of a ring, of which only those that somebody needs are written.

A device receives [G·T, D]: row g·T + t is token t of device g. Who has assignments where, every
device reads from the slots of all tokens, so nothing else is agreed upon. Rows that nobody sent
hold anything: experts read by index, and the sum at home selects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jax import numpy as jnp

from moejax.config import WireConfig, WireFormat
from moejax.exchange.budget import Budget
from moejax.exchange.codec import decode, encode
from moejax.exchange.wire import travel
from pallas_kernels.exchange.push import push_rows, sum_devices
from pallas_kernels.exchange.received import received
from pallas_kernels.fused_experts.remote import PushedRows, group_slots
from pallas_kernels.route.api import sorted_places
from sharding import collectives

__all__ = ["Routes", "collect_rows", "make_pushed_rows", "make_routes", "spread_rows"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routes:
    """Which rows travel in one wave, as entries g·T + t of `push_rows`; G·T for none.

    out_M: int32 [G·T], token t of this device to device g.
    back_M: int32 [G·T], received row g·T + t home to device g.
    goes_GT: bool, whether token t of this device has a row on device g.
    """

    out_M: jax.Array
    back_M: jax.Array
    goes_GT: jax.Array


def make_routes(target_TK: jax.Array, ids_RK: jax.Array, slots: int, axis: str) -> Routes:
    """The routes of one wave.

    Args:
        target_TK: int32 physical slot of each assignment of this device that travels; −1 for none.
        ids_RK: int32, slots here of the assignments of all devices; S for none.
        slots: S of a device.
        axis: mesh axis of size G.
    """
    devices, me = collectives.axis_size(axis), collectives.axis_index(axis)
    goes_GT = jnp.any(_goes(target_TK, slots, devices), axis=2)
    return Routes(_entries(goes_GT, me), _back(ids_RK, slots, devices, me), goes_GT)


def make_pushed_rows(target_TK: jax.Array, ids_RK: jax.Array, budget: Budget) -> PushedRows:
    """The same for kernels that move the rows while they multiply.

    Args:
        target_TK, ids_RK: as for `make_routes`.
        budget: static sizes.
    """
    axis, devices, slots = budget.axis, budget.devices, budget.slots
    assert isinstance(axis, str)
    me, goes_GTK = collectives.axis_index(axis), _goes(target_TK, slots, devices)
    goes_GT = jnp.any(goes_GTK, axis=2)
    first_GT = jnp.min(jnp.where(goes_GTK, target_TK % slots, slots), axis=2)
    out_M, firsts_Q = _sorted_entries(first_GT, slots, me)
    back_M = _back(ids_RK, slots, devices, me)
    return PushedRows(out_M, firsts_Q, back_M, goes_GT, axis=axis, expected=budget.moved_rows)


def _sorted_entries(slot_GT: jax.Array, slots: int, me: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entries by the group of a slot, in a group as in `_entries`; where the groups begin."""
    devices, tokens = slot_GT.shape
    each = group_slots(slots)
    groups = -(-slots // each)
    order_G = _order(devices, me)
    group_TG = jnp.where(slot_GT < slots, slot_GT // each, groups)[order_G].T
    _, sizes_Q, at_M = sorted_places(
        group_TG.reshape(-1, 1), groups=groups, alignment=1, places=devices * tokens
    )
    device, token = order_G[at_M % devices], at_M // devices
    entries_M = jnp.where(at_M < devices * tokens, device * tokens + token, devices * tokens)
    ends_Q = jnp.cumsum(sizes_Q, dtype=jnp.int32)
    return entries_M, jnp.concatenate([jnp.zeros((1,), jnp.int32), ends_Q])


def _order(devices: int, me: jax.Array) -> jax.Array:
    """All devices, another one first on each."""
    return (me + 1 + jnp.arange(devices, dtype=jnp.int32)) % devices


def _goes(target_TK: jax.Array, slots: int, devices: int) -> jax.Array:
    """Whether an assignment is for a device, [G, T, K]."""
    device_TK = jnp.where(target_TK >= 0, target_TK // slots, -1)
    return device_TK == jnp.arange(devices, dtype=jnp.int32)[:, None, None]


def _back(ids_RK: jax.Array, slots: int, devices: int, me: jax.Array) -> jax.Array:
    """Entries of the rows that came, those with an assignment here."""
    return _entries(jnp.any(ids_RK < slots, axis=1).reshape(devices, -1), me)


def _entries(goes_GT: jax.Array, me: jax.Array) -> jax.Array:
    """Token by token, so that neighbours have other peers, and each device another one first."""
    devices, tokens = goes_GT.shape
    order_G = _order(devices, me)
    entry_GT = order_G[:, None] * tokens + jnp.arange(tokens, dtype=jnp.int32)
    return jnp.where(goes_GT[order_G], entry_GT, devices * tokens).T.reshape(-1)


def _push_encoded(
    x_ND: jax.Array,
    entries_M: jax.Array,
    tokens: int,
    axis: str,
    wire: WireConfig,
    form: WireFormat,
    dtype,
) -> jax.Array:
    encoded = encode(x_ND, form, rotate=wire.rotate)
    arrived = travel(encoded, lambda part: received(push_rows(part, entries_M, axis, tokens)))
    return decode(arrived, form, x_ND.shape[1], dtype, rotate=wire.rotate)


def _push_home(
    y_RD: jax.Array, routes: Routes, axis: str, wire: WireConfig, form: WireFormat
) -> jax.Array:
    """Received rows to their tokens, whose rows are summed in float32 in the devices' order."""
    tokens = routes.goes_GT.shape[1]
    dtype = y_RD.dtype if form == "compute" else jnp.float32
    back_RD = _push_encoded(y_RD, routes.back_M, tokens, axis, wire, form, dtype)
    return sum_devices(back_RD, routes.goes_GT)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def spread_rows(x_TD: jax.Array, routes: Routes, axis: str, wire: WireConfig) -> jax.Array:
    """Sends tokens to the devices that need them; the backward sums their cotangents in float32.

    Args:
        x_TD: this device's tokens.
        routes: of the wave.
        axis: mesh axis of size G.
        wire: rounding of the tokens.

    Returns:
        [G·T, D] in x's dtype; rows that nobody sent hold anything.
    """
    return _spread_fwd(x_TD, routes, axis, wire)[0]


def _spread_fwd(x_TD, routes, axis, wire):
    tokens, form = x_TD.shape[0], wire.dispatch
    x_RD = _push_encoded(x_TD, routes.out_M, tokens, axis, wire, form, x_TD.dtype)
    return x_RD, routes


def _spread_bwd(axis, wire, routes, ct_RD):
    ct_TD = _push_home(ct_RD, routes, axis, wire, wire.dispatch_grad)
    return ct_TD.astype(ct_RD.dtype), None


spread_rows.defvjp(_spread_fwd, _spread_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def collect_rows(y_RD: jax.Array, routes: Routes, axis: str, wire: WireConfig) -> jax.Array:
    """Sends outputs home and sums those of each token.

    Args:
        y_RD: [G·T, D] outputs; rows that nobody needs hold anything.
        routes: of the wave.
        axis: mesh axis of size G.
        wire: rounding of the outputs.

    Returns:
        float32 [T, D]; zero for tokens that did not travel. The backward's cotangent [G·T, D] holds
        anything in rows that nobody needs.
    """
    return _collect_fwd(y_RD, routes, axis, wire)[0]


def _collect_fwd(y_RD, routes, axis, wire):
    y_TD = _push_home(y_RD, routes, axis, wire, wire.combine)
    return y_TD, (routes, jnp.zeros((), y_RD.dtype))


def _collect_bwd(axis, wire, residuals, ct_TD):
    (routes, like), form = residuals, wire.combine_grad
    if form == "compute":
        ct_TD = ct_TD.astype(like.dtype)
    tokens = ct_TD.shape[0]
    return _push_encoded(ct_TD, routes.out_M, tokens, axis, wire, form, like.dtype), None


collect_rows.defvjp(_collect_fwd, _collect_bwd)
