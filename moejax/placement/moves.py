"""Experts that travel: every slot of every device filled from some device's rows.

Who sends what is known to all devices, since all know the whole placement, so nothing is agreed
upon: buckets of B experts for each (source, destination) pair go out by `all_to_all`, in as many
waves as the fullest pair needs. What lies on the slot's own device is copied and never sent.

A wave moves B·(G−1) experts off each device, and 2·B·G experts are in memory beside the slots,
whatever the placement. With B = ceil(S / G) that is about as many as a device has slots, for
placements in which most experts travel; a smaller B pads less and needs more waves, for those in
which few do. A device sends waves·B·(G−1) experts: none where all is at hand, and no more than
S·(G−1), as gathering the whole bank does, unless B does not divide S. Beside what travels, a wave
touches only the slots that it fills.

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
    out_GW: int32 [G, W], own rows for each device, in the order of its slots; −1 for none.
    in_GW: int32 [G, W], slots that are filled from each device, in order; −1 for none.
    num_waves: int32 [], equal on all devices.
    bucket: B.
    rows: of a device's source.
    """

    local_S: jax.Array
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


def make_moves(source_P: Int32[Array, " P"], rows: int, bucket: int | None = None) -> Moves:
    """Plans, alike on all devices, how slots are filled; inside the shard_map.

    Args:
        source_P: int32 [G·S], the row that each slot is filled from, counted over all devices; −1
            leaves a slot empty.
        rows: of a device's source.
        bucket: B; None: `bucket_size`.
    """
    devices = collectives.axis_size(EXPERT)
    me = collectives.axis_index(EXPERT)
    source_GS = source_P.reshape(devices, -1)
    slots = source_GS.shape[1]
    bucket = bucket or bucket_size(slots, devices)
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

    def one_wave(wave: jax.Array, filled: Any) -> Any:
        slots_N = _of_wave(moves.in_GW, wave, moves.bucket).reshape(-1)

        def one(bank: jax.Array, filled: jax.Array) -> jax.Array:
            got = _exchanged(bank, moves.out_GW, wave, moves.bucket)
            places_N = jnp.where(slots_N >= 0, slots_N, filled.shape[0])
            return filled.at[places_N].set(got, mode="drop", unique_indices=True)

        return jax.tree.map(one, banks, filled)

    return _in_waves(one_wave, jax.tree.map(copied, banks), moves)


def carry_home(slots: Any, moves: Moves) -> Any:
    """The transpose of `carry_out`: what is in the slots, summed in the rows it came from.

    Sums are taken in float32 in an order that the moves fix, own slots first, then wave by wave and
    in it slot by slot, never by atomics: the same moves give the same bits. One rounding. A pass
    over the rows adds one term to each, so that there are as many as a row has terms at most.

    Args:
        slots: pytree of float [S, …].
        moves: as in `carry_out`.

    Returns:
        pytree of [rows, …] in the dtypes given; zero in rows that fill no slot.
    """

    def own(slot: jax.Array) -> jax.Array:
        return _added(None, moves.local_S, moves.rows, slot)

    def one_wave(wave: jax.Array, sums: Any) -> Any:
        def one(slot: jax.Array, sums: jax.Array) -> jax.Array:
            got = _exchanged(slot, moves.in_GW, wave, moves.bucket)
            rows_GB = _of_wave(moves.out_GW, wave, moves.bucket)
            return _added(sums, rows_GB.reshape(-1), moves.rows, got)

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


def _added(sums: jax.Array | None, rows_N: jax.Array, rows: int, terms: jax.Array) -> jax.Array:
    """Adds terms [N, …] to float32 sums [rows, …], those of a row in order; row −1 takes none.

    Without sums they begin with the first terms.
    """
    number = rows_N.shape[0]
    index_N = jnp.arange(number, dtype=jnp.int32)
    earlier_NN = (rows_N == rows_N[:, None]) & (index_N < index_N[:, None])
    turn_N = jnp.where(rows_N >= 0, jnp.sum(earlier_NN, axis=1, dtype=jnp.int32), -1)

    def of_turn(turn: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """The term of each row whose turn it is, in float32, and whether there is one."""
        to_N = jnp.where(turn_N == turn, rows_N, rows)
        term_R = jnp.full((rows,), -1, jnp.int32)
        term_R = term_R.at[to_N].set(index_N, mode="drop", unique_indices=False)
        found = jnp.take(terms, term_R, axis=0, mode="clip").astype(jnp.float32)
        return found, _along(term_R >= 0, found)

    def one(carry: Any) -> Any:
        turn, sums = carry
        found, there = of_turn(turn)
        return turn + 1, jnp.where(there, sums + found, sums)

    first = 0
    if sums is None:
        found, there = of_turn(0)
        sums, first = jnp.where(there, found, 0.0), 1
    begin = (jnp.asarray(first, jnp.int32), sums)
    turns = jnp.max(turn_N, initial=-1) + 1
    return lax.while_loop(lambda carry: carry[0] < turns, one, begin)[1]


def _along(mask_S: jax.Array, like: jax.Array) -> jax.Array:
    return mask_S.reshape(-1, *[1] * (like.ndim - 1))
