"""Routing to merged experts: which expert each output of the router became.

The router chooses among its outputs as it did before experts were merged, so that what remains is
what it learned. An expert that several of a token's chosen outputs became is used once, with the
sum of their scores: the same sum, with less to send and to compute (arXiv 2310.01334 §3.2 keeps the
router's outputs likewise).

Shape letters: T tokens, K experts of a token, R outputs of the router, E experts.
"""

from __future__ import annotations

from jax import numpy as jnp
from jaxtyping import Array, Float32, Int32

from moejax.routing.bias import RouterState

__all__ = ["RouterTable", "initial_table", "redirect"]


class RouterTable(RouterState):
    """The expert that each output of a router became, int32 [R]."""


def initial_table(outputs: int, num_experts: int) -> Int32[Array, " R"]:
    """Neighbours in equal groups, but for one expert more or less: for a model that is made anew.

    Args:
        outputs: R.
        num_experts: E ≤ R.
    """
    return jnp.arange(outputs, dtype=jnp.int32) * num_experts // outputs


def redirect(
    chosen_TK: Int32[Array, "T K"], scores_TK: Float32[Array, "T K"], table_R: Int32[Array, " R"]
) -> tuple[Int32[Array, "T K"], Float32[Array, "T K"]]:
    """Experts of tokens whose outputs of the router were chosen.

    Args:
        chosen_TK: int32 [T, K], outputs; −1 for none.
        scores_TK: float32 [T, K], their weights, 0 for none.
        table_R: int32 [R].

    Returns:
        int32 [T, K], the experts, each once for a token: at the first of its outputs, −1 at the
        others; float32 [T, K], the sums of their outputs' scores, 0 at the others. The gradient
        flows to the scores of all.
    """
    experts_TK = jnp.where(chosen_TK < 0, -1, table_R[jnp.maximum(chosen_TK, 0)])
    same_TKK = (experts_TK[:, :, None] == experts_TK[:, None, :]) & (experts_TK >= 0)[:, :, None]
    earlier_KK = jnp.tri(experts_TK.shape[1], k=-1, dtype=jnp.bool_)
    first_TK = ~jnp.any(same_TKK & earlier_KK, axis=2)
    sums_TK = jnp.sum(jnp.where(same_TKK, scores_TK[:, None, :], 0.0), axis=2)
    return jnp.where(first_TK, experts_TK, -1), jnp.where(first_TK, sums_TK, 0.0)
