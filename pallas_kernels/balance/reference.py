"""Settling loads in plain JAX; integers only, so that every run and device gives the same."""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp

__all__ = ["part_of", "settle"]


def settle(
    count_ER: jax.Array,
    device_ER: jax.Array,
    real_ER: jax.Array,
    devices: int,
    fixed_G: jax.Array,
    *,
    percent: int,
    rounds: int,
) -> jax.Array:
    """See `api.settle`."""
    total = jnp.sum(count_ER, dtype=jnp.int32) + jnp.sum(fixed_G, dtype=jnp.int32)
    mean = (total + devices - 1) // devices
    limit = mean + mean * (percent - 100) // 100
    is_on_ERG = device_ER[..., None] == jnp.arange(devices, dtype=jnp.int32)

    def on_devices(x_ER: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_on_ERG, x_ER[..., None], 0), axis=(0, 1), dtype=jnp.int32)

    def one_round(_, count_ER: jax.Array) -> jax.Array:
        load_G = on_devices(count_ER) + fixed_G
        over_G = jnp.maximum(load_G - limit, 0)
        load_ER = load_G[device_ER]
        open_ER = jnp.where(real_ER, load_ER, jnp.iinfo(jnp.int32).max)
        best_E1 = jnp.argmin(open_ER, axis=1, keepdims=True).astype(jnp.int32)
        least_E1 = jnp.min(open_ER, axis=1, keepdims=True)
        gap_ER = jnp.where(real_ER, load_ER - least_E1, 0)
        any_ER = jnp.where((gap_ER > 1) & (over_G[device_ER] > 0), count_ER, 0)
        good_ER = jnp.where(least_E1 < limit, any_ER, 0)
        enough_G = on_devices(good_ER) >= over_G
        from_ER = jnp.where(enough_G[device_ER], good_ER, any_ER)
        out_G = on_devices(from_ER)
        push_ER = part_of(from_ER, jnp.minimum(over_G, out_G)[device_ER], out_G[device_ER])
        push_ER = jnp.minimum(push_ER, gap_ER // 2)

        to_E1 = jnp.take_along_axis(device_ER, best_E1, axis=1)
        is_to_EG = to_E1 == jnp.arange(devices, dtype=jnp.int32)
        push_E1 = jnp.sum(push_ER, axis=1, keepdims=True, dtype=jnp.int32)
        in_G = jnp.sum(jnp.where(is_to_EG, push_E1, 0), axis=0, dtype=jnp.int32)
        from_E1 = jnp.max(jnp.where(push_ER > 0, load_ER, 0), axis=1, keepdims=True)
        top_G = jnp.max(jnp.where(is_to_EG, from_E1, 0), axis=0)
        room_G = jnp.maximum(jnp.maximum(limit - load_G, (top_G - load_G) // 2), 0)
        push_ER = part_of(push_ER, jnp.minimum(room_G, in_G)[to_E1], in_G[to_E1])
        push_E1 = jnp.sum(push_ER, axis=1, keepdims=True, dtype=jnp.int32)
        is_best_ER = jnp.arange(count_ER.shape[1], dtype=jnp.int32) == best_E1
        return count_ER - push_ER + jnp.where(is_best_ER, push_E1, 0)

    return lax.fori_loop(0, rounds, one_round, count_ER)


def part_of(
    count: jax.Array, part: jax.Array, whole: jax.Array, up: jax.Array | int = 0, of: int = 1
) -> jax.Array:
    """⌊count · part / whole + up / of⌋ in int32 without overflow; the ratio is kept to 15 bits."""
    whole = jnp.maximum(whole, 1)
    shift = jnp.maximum(17 - lax.clz(whole), 0)
    whole = whole >> shift
    part = jnp.minimum(part >> shift, whole)
    return count // whole * part + (count % whole * part + up * whole // of) // whole
