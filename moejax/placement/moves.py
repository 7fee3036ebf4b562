"""Experts that travel: every slot of every device filled from some device's rows.

Who sends what is known to all devices, since all know the whole placement, so nothing is agreed
upon: buckets of B experts for each (source, destination) pair go out by `all_to_all`, in as many
waves as the fullest pair needs. What lies on the slot's own device is copied and never sent.

A wave moves B·(G−1) experts off each device. With B = ceil(S / G) it holds about as many experts as
a device has slots, both out and in, so 2·S experts are in memory beside the slots, whatever the
placement; a smaller B pads less in the last wave and needs more of them, a larger one the other way
round. A device sends waves·B·(G−1) experts: none where all is at hand, and no more than S·(G−1), as
gathering the whole bank does, unless B does not divide S.

Letters: G devices along `expert`, S slots of a device, P = G·S, B bucket, W = B · most waves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Int32

from sharding import collectives
from sharding.mesh import EXPERT

__all__ = ["Moves", "bucket_size", "carry_home", "carry_out", "make_moves"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moves:
    """This device's part of filling all slots.

    local_S: int32 [S], the own row that is copied into each slot; −1 for none.
    device_S: int32 [S], the device that a slot's expert comes from; −1 where none comes.
    rank_S: int32 [S], how many slots before it are filled from the same device.
    out_GW: int32 [G, W], own rows for each device, in the order of its slots; −1 for none.
    in_GW: int32 [G, W], slots that are filled from each device, in order; −1 for none.
    num_waves: int32 [], equal on all devices.
    bucket: B.
    rows: of a device's source.
    """

    local_S: jax.Array
    device_S: jax.Array
    rank_S: jax.Array
    out_GW: jax.Array
    in_GW: jax.Array
    num_waves: jax.Array
    bucket: int = field(metadata={"static": True})
    rows: int = field(metadata={"static": True})


def bucket_size(slots: int, devices: int) -> int:
    """B: experts of a (source, destination) pair in one wave.

    Args:
        slots: S.
        devices: G.
    """
    return -(-slots // devices)


def make_moves(source_P: Int32[Array, " P"], rows: int) -> Moves:
    """Plans, alike on all devices, how slots are filled; inside the shard_map.

    Args:
        source_P: int32 [G·S], the row that each slot is filled from, counted over all devices; −1
            leaves a slot empty.
        rows: of a device's source.
    """
    devices = collectives.axis_size(EXPERT)
    me = collectives.axis_index(EXPERT)
    source_GS = source_P.reshape(devices, -1)
    slots = source_GS.shape[1]
    bucket = bucket_size(slots, devices)
    every_G1 = jnp.arange(devices, dtype=jnp.int32)[:, None]
    device_GS = jnp.where(source_GS >= 0, source_GS // rows, -1)
    travels_GS = (device_GS >= 0) & (device_GS != every_G1)
    earlier_SS = jnp.tril(jnp.ones((slots, slots), bool), -1)
    same_GSS = device_GS[:, :, None] == device_GS[:, None, :]
    rank_GS = jnp.sum(same_GSS & earlier_SS, axis=-1, dtype=jnp.int32)
    waves_GS = jnp.where(travels_GS, rank_GS // bucket + 1, 0)

    width = -(-slots // bucket) * bucket
    mine_S, come_S = source_GS[me], travels_GS[me]
    device_S = jnp.where(come_S, device_GS[me], -1)
    to_GW = _listed(travels_GS & (device_GS == me), width)
    rows_GW = jnp.take_along_axis(source_GS % rows, jnp.clip(to_GW, 0, slots - 1), axis=1)
    return Moves(
        local_S=jnp.where((mine_S >= 0) & ~come_S, mine_S % rows, -1),
        device_S=device_S,
        rank_S=rank_GS[me],
        out_GW=jnp.where(to_GW >= 0, rows_GW, -1),
        in_GW=_listed(device_S == every_G1, width),
        num_waves=jnp.max(waves_GS),
        bucket=bucket,
        rows=rows,
    )


def _listed(mask_GS: jax.Array, width: int) -> jax.Array:
    """The places where each row is true, in order; −1 beyond, [G, width]."""
    order_GS = jnp.argsort(~mask_GS, axis=1, stable=True).astype(jnp.int32)
    counts_G1 = jnp.sum(mask_GS, axis=1, keepdims=True, dtype=jnp.int32)
    there_GS = jnp.arange(mask_GS.shape[1], dtype=jnp.int32) < counts_G1
    return jnp.pad(
        jnp.where(there_GS, order_GS, -1),
        ((0, 0), (0, width - mask_GS.shape[1])),
        constant_values=-1,
    )


def carry_out(banks: Any, moves: Moves) -> Any:
    """The slots of this device, filled; inside the shard_map, no gradient.

    Args:
        banks: pytree of [rows, …], any dtype; all travel in the same waves.
        moves: from `make_moves`.

    Returns:
        pytree of [S, …]; empty slots are zero.
    """

    def copied(bank: jax.Array) -> jax.Array:
        filled = jnp.take(bank, moves.local_S, axis=0, mode="clip")
        return jnp.where(_along(moves.local_S >= 0, filled), filled, jnp.zeros_like(filled))

    wave_S = jnp.where(moves.device_S >= 0, moves.rank_S // moves.bucket, -1)
    place_S = moves.device_S * moves.bucket + moves.rank_S % moves.bucket

    def one_wave(wave: jax.Array, filled: Any) -> Any:
        def one(bank: jax.Array, filled: jax.Array) -> jax.Array:
            got = _exchanged(bank, moves.out_GW, wave, moves.bucket)
            new = jnp.take(got, place_S, axis=0, mode="clip")
            return jnp.where(_along(wave_S == wave, new), new, filled)

        return jax.tree.map(one, banks, filled)

    return _in_waves(one_wave, jax.tree.map(copied, banks), moves)


def carry_home(slots: Any, moves: Moves) -> Any:
    """The transpose of `carry_out`: what is in the slots, summed in the rows it came from.

    Sums are taken in float32 in an order that the moves fix, own slots first, then wave by wave and
    in it slot by slot, never by atomics: the same moves give the same bits. One rounding.

    Args:
        slots: pytree of float [S, …].
        moves: as in `carry_out`.

    Returns:
        pytree of [rows, …] in the dtypes given; zero in rows that fill no slot.
    """

    def own(slot: jax.Array) -> jax.Array:
        zeros = jnp.zeros((moves.rows, *slot.shape[1:]), jnp.float32)
        return _added(zeros, moves.local_S, slot)

    def one_wave(wave: jax.Array, sums: Any) -> Any:
        def one(slot: jax.Array, sums: jax.Array) -> jax.Array:
            got = _exchanged(slot, moves.in_GW, wave, moves.bucket)
            rows_GB = _of_wave(moves.out_GW, wave, moves.bucket)
            return _added(sums, rows_GB.reshape(-1), got)

        return jax.tree.map(one, slots, sums)

    sums = _in_waves(one_wave, jax.tree.map(own, slots), moves)
    return jax.tree.map(lambda total, slot: total.astype(slot.dtype), sums, slots)


def _in_waves(one_wave: Any, start: Any, moves: Moves) -> Any:
    if moves.out_GW.shape[0] == 1:  # a single device: nothing travels
        return start

    def body(carry: Any) -> Any:
        wave, state = carry
        return wave + 1, one_wave(wave, state)

    # All devices count the same waves, so all of them stay in the loop, and in its exchange, alike.
    begin = (jnp.zeros((), jnp.int32), start)
    return lax.while_loop(lambda carry: carry[0] < moves.num_waves, body, begin)[1]


def _of_wave(table_GW: jax.Array, wave: jax.Array, bucket: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(table_GW, wave * bucket, bucket, axis=1)


def _exchanged(rows: jax.Array, table_GW: jax.Array, wave: jax.Array, bucket: int) -> jax.Array:
    """What arrives in a wave: [G·B, …], by source. Places without a row hold any row."""
    sent = jnp.take(rows, _of_wave(table_GW, wave, bucket), axis=0, mode="clip")
    got = collectives.all_to_all(sent, EXPERT)
    return got.reshape(-1, *rows.shape[1:])


def _added(sums: jax.Array, rows_N: jax.Array, terms: jax.Array) -> jax.Array:
    """Adds terms [N, …] to rows of float32 sums one after the other; row −1 takes none."""

    def one(i: jax.Array, sums: jax.Array) -> jax.Array:
        row = jnp.maximum(rows_N[i], 0)
        old = lax.dynamic_index_in_dim(sums, row, keepdims=False)
        term = lax.dynamic_index_in_dim(terms, i, keepdims=False).astype(jnp.float32)
        new = jnp.where(rows_N[i] >= 0, old + term, old)
        return lax.dynamic_update_index_in_dim(sums, new, row, 0)

    return lax.fori_loop(0, terms.shape[0], one, sums)


def _along(mask_S: jax.Array, like: jax.Array) -> jax.Array:
    return mask_S.reshape(-1, *[1] * (like.ndim - 1))
