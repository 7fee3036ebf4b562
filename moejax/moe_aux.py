"""What a Mixture-of-Experts layer reports besides its output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float32, Int32

from moejax.exchange.counters import ExchangeCounters, over_devices
from moejax.exchange.reduced import RowMoments
from moejax.routing.losses import RouterLosses
from sharding.collectives import psum_statistics
from sharding.mesh import TOKEN_AXES

__all__ = ["MoEAux"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEAux:
    """What a layer reports besides its output; all of it local to the device.

    losses: this device's shares of the auxiliary losses, coefficients included.
    counts_E: int32 [E], assignments to each logical expert, before any drop.
    entropy_sum: float32 [], nats, summed over tokens.
    num_tokens: int32 [], unmasked tokens.
    counters: what moved.
    moments: of the rows, where `MoELayer.measure_rows` asks for them.
    experts_TK: int32 [T', K'], the experts of some tokens in order, before any drop, −1 for none;
        where `MoELayer.report_experts` asks for them.
    kept: float32 [], the share of its score mass that a token keeps under `MoEConfig.locality`,
        summed over tokens; None where that is off. See `moejax.routing.near.mass_kept`.
    slots_TK: int32 [T, K'], the slots that serve the tokens, in order, of all devices along
        `expert`: slot p is on device p // S. After any drop, −1 for none; where
        `MoELayer.report_slots` asks for them.
    """

    losses: RouterLosses
    counts_E: Int32[Array, " E"]
    entropy_sum: Float32[Array, ""]
    num_tokens: Int32[Array, ""]
    counters: ExchangeCounters
    moments: RowMoments | None = None
    experts_TK: Int32[Array, "T2 K2"] | None = None
    kept: Float32[Array, ""] | None = None
    slots_TK: Int32[Array, "T K2"] | None = None

    def over_devices(self) -> MoEAux:
        """The same of all devices together, inside the shard_map; no gradient.

        `experts_TK` and `slots_TK` stay this device's.
        """
        counters = over_devices(self.counters, TOKEN_AXES)
        total = psum_statistics(replace(self, experts_TK=None, slots_TK=None), TOKEN_AXES)
        return replace(total, counters=counters, experts_TK=self.experts_TK, slots_TK=self.slots_TK)

    def with_experts(self, count: int) -> MoEAux:
        """The same with counts of so many experts, those of layers with fewer filled up with 0."""
        more = [(0, 0)] * (self.counts_E.ndim - 1) + [(0, count - self.counts_E.shape[-1])]
        return replace(self, counts_E=jnp.pad(self.counts_E, more)) if more[-1][1] else self

    def summed(self) -> MoEAux:
        """Summed over a leading dimension (microbatches) of [A, L, …]; waves are the largest.

        Tokens of `experts_TK` and `slots_TK` come behind each other.
        """
        total = jax.tree.map(
            lambda a: jnp.sum(a, axis=0, dtype=a.dtype),
            replace(self, experts_TK=None, slots_TK=None),
        )
        counters = replace(total.counters, waves=jnp.max(self.counters.waves, axis=0))
        experts_TK, slots_TK = _in_a_row(self.experts_TK), _in_a_row(self.slots_TK)
        return replace(total, counters=counters, experts_TK=experts_TK, slots_TK=slots_TK)


def _in_a_row(ids_ALTK: jax.Array | None) -> jax.Array | None:
    """The tokens of microbatches behind each other: [A, L, T, K] to [L, A · T, K]."""
    if ids_ALTK is None:
        return None
    ids_LATK = jnp.moveaxis(ids_ALTK, 0, 1)
    layers, _, _, columns = ids_LATK.shape
    return ids_LATK.reshape(layers, -1, columns)
