"""The layer in float32, dense, for a sample of tokens: what implementations are compared with.

It shares no code with any of them: every expert computes every sampled token. The cotangent is
zero except for the sample, so that all gradients, the weights' included, depend on it alone.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp


def _scores(logits_SE: jax.Array, top_k: int) -> jax.Array:
    """[S, E]: softmax over the K best, zero for the others."""
    kth_S1 = jnp.sort(logits_SE, axis=1)[:, -top_k][:, None]
    return jax.nn.softmax(jnp.where(logits_SE >= kth_S1, logits_SE, -jnp.inf), axis=-1)


def _logits(x_SD: jax.Array, router_DE: jax.Array, bias_E: Any) -> jax.Array:
    logits_SE = jnp.dot(x_SD, router_DE, precision="highest")
    return logits_SE if bias_E is None else logits_SE + bias_E


def _expert(x_SD: jax.Array, w_in_DNH: jax.Array, w_out_HD: jax.Array) -> jax.Array:
    h_SNH = jnp.einsum("sd,dnh->snh", x_SD, w_in_DNH, precision="highest")
    return jnp.dot(jax.nn.silu(h_SNH[:, 0]) * h_SNH[:, 1], w_out_HD, precision="highest")


@jax.jit
def _squares(difference: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(difference.astype(jnp.float32)))


def _relative(pairs: Any) -> jax.Array:
    """√(Σ|got − want|² / Σ|want|²) of [difference², reference²]."""
    return jnp.sqrt(pairs[0] / pairs[1])


def make_output_error(top_k: int) -> Any:
    """(weights, bias, x_TD, sample_S, y_TD) → norm-relative error of y over the sample."""

    @jax.jit
    def error(weights: dict, bias: Any, x_TD: jax.Array, sample_S: jax.Array, y_TD: jax.Array):
        x_SD = x_TD[sample_S].astype(jnp.float32)
        scores_SE = _scores(_logits(x_SD, weights["router"], bias), top_k)

        def add(y_SD: jax.Array, of_expert: Any) -> tuple[jax.Array, None]:
            w_in, w_out, score_S = of_expert
            y = _expert(x_SD, w_in.astype(jnp.float32), w_out.astype(jnp.float32))
            return y_SD + score_S[:, None] * y, None

        per_expert = (weights["w_in"], weights["w_out"], scores_SE.T)
        want_SD, _ = lax.scan(add, jnp.zeros_like(x_SD), per_expert)
        got_SD = y_TD[sample_S].astype(jnp.float32)
        return _relative([_squares(got_SD - want_SD), _squares(want_SD)])

    return error


def make_gradient_errors(top_k: int) -> Any:
    """(weights, bias, x_TD, ct_TD, sample_S, grads) → norm-relative error of each gradient.

    `grads` is (of the weights, of x) for a cotangent that is zero outside the sample; whatever
    is not zero in x's gradient outside the sample counts as error.
    """

    @jax.jit
    def errors(
        weights: dict, bias: Any, x_TD: jax.Array, ct_TD: jax.Array, sample_S: jax.Array, grads: Any
    ) -> dict[str, jax.Array]:
        got, x_ct_TD = grads
        x_SD, ct_SD = (a[sample_S].astype(jnp.float32) for a in (x_TD, ct_TD))
        scores_SE, pull_scores = jax.vjp(
            lambda x, w: _scores(_logits(x, w, bias), top_k), x_SD, weights["router"]
        )

        def add(carry: Any, of_expert: Any) -> tuple[Any, jax.Array]:
            x_ct_SD, sums = carry
            w_in, w_out, score_S, got_in, got_out = of_expert
            wide = (w_in.astype(jnp.float32), w_out.astype(jnp.float32))
            y_SD, pull = jax.vjp(_expert, x_SD, *wide)
            x_ct, *wants = pull(score_S[:, None] * ct_SD)
            found = [
                jnp.stack([_squares(got - want), _squares(want)])
                for got, want in zip((got_in, got_out), wants)
            ]
            return (x_ct_SD + x_ct, sums + jnp.stack(found)), jnp.sum(y_SD * ct_SD, axis=-1)

        per_expert = (weights["w_in"], weights["w_out"], scores_SE.T, got["w_in"], got["w_out"])
        start = (jnp.zeros_like(x_SD), jnp.zeros((2, 2)))
        (want_x_SD, sums), scores_ct_ES = lax.scan(add, start, per_expert)
        from_router_SD, want_router = pull_scores(scores_ct_ES.T)
        want_x_SD = want_x_SD + from_router_SD
        got_x_SD = x_ct_TD[sample_S].astype(jnp.float32)
        outside = _squares(x_ct_TD.at[sample_S].set(0))
        return {
            "x": _relative([_squares(got_x_SD - want_x_SD) + outside, _squares(want_x_SD)]),
            "w_in": _relative(sums[0]),
            "w_out": _relative(sums[1]),
            "router": _relative([_squares(got["router"] - want_router), _squares(want_router)]),
        }

    return errors
