"""Auxiliary losses of a router, from statistics over all devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from moejax.config import RouterConfig
from sharding.collectives import psum_statistics

__all__ = ["RouterLosses", "router_losses"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterLosses:
    """This device's share of each loss, coefficient included; the devices' shares sum to the loss.

    load_balance: float32 []; the coefficient itself when the experts are used evenly.
    z: float32 [].
    """

    load_balance: Float32[Array, ""]
    z: Float32[Array, ""]

    @property
    def total(self) -> Float32[Array, ""]:
        """The sum of the two; float32 []."""
        return self.load_balance + self.z


def router_losses(
    logits_TE: Float32[Array, "T E"],
    probs_TE: Float32[Array, "T E"],
    counts_E: Int32[Array, " E"],
    token_mask_T: Bool[Array, " T"] | None,
    config: RouterConfig,
    axes: Sequence[str],
) -> RouterLosses:
    """Load-balance loss E·Σ_e f_e·P_e and z loss mean(logsumexp²).

    f_e is the share of all assignments that went to expert e, without gradient; P_e the mean
    probability of e over all tokens. Only f needs the other devices: P_e is a sum over tokens
    divided by their number, so each device adds its own tokens' part and the gradient stays local.

    Args:
        logits_TE: float32 [T, E].
        probs_TE: float32 [T, E], rows of sum 1.
        counts_E: int32 [E], this device's assignments of unmasked tokens.
        token_mask_T: bool [T], False for tokens that do not count; None counts all.
        config: the coefficients, `num_experts` and `top_k` are read.
        axes: mesh axes that tokens are split over, () outside of a shard_map.

    Source: arXiv 2101.03961 eq. 4 (f extended to K > 1 so that it sums to 1), arXiv 2202.08906
    eq. 5.
    """
    zero = jnp.zeros((), jnp.float32)
    if config.load_balance_coef == 0 and config.z_loss_coef == 0:
        return RouterLosses(zero, zero)
    global_counts_E = psum_statistics(counts_E, tuple(axes)) if axes else counts_E
    # At least 1: when every token is masked the losses are 0.
    assignments = jnp.maximum(jnp.sum(global_counts_E), 1).astype(jnp.float32)
    tokens = assignments / config.top_k
    weight_T = jnp.ones(logits_TE.shape[0], jnp.float32)
    if token_mask_T is not None:
        weight_T = token_mask_T.astype(jnp.float32)

    balance = z = zero
    if config.load_balance_coef != 0:
        f_E = global_counts_E.astype(jnp.float32) / assignments
        p_E = jnp.sum(weight_T[:, None] * probs_TE, axis=0) / tokens
        balance = config.load_balance_coef * config.num_experts * jnp.sum(f_E * p_E)
    if config.z_loss_coef != 0:
        lse_T = jax.nn.logsumexp(logits_TE, axis=-1)
        z = config.z_loss_coef * jnp.sum(weight_T * lse_T**2) / tokens
    return RouterLosses(balance, z)
