"""Queries, keys and values from one product, normalised and rotated by one kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from moejax.attention_config import AttentionConfig
from pallas_kernels.heads import api

__all__ = ["heads_refusal", "split_heads"]


def heads_refusal(config: AttentionConfig, tokens: int, heads: int, dtype: Any) -> str | None:
    """Why `split_heads` cannot serve an attention, or None.

    Args:
        config: of the attention.
        tokens: of a device.
        heads: of a device, of queries, keys and values together.
        dtype: of the tokens.
    """
    if config.qk_norm == "full":
        return "all heads are normalised together"
    if config.rope_interleaved:
        return "pairs lie side by side"
    return api.refusal(tokens, heads, config.head_dim, dtype, forced=False)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def split_heads(
    qkv_BSHh: jax.Array,
    cos_BSp: jax.Array,
    sin_BSp: jax.Array,
    scales_h: tuple[jax.Array, jax.Array] | None,
    key_heads: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What attention takes, from the joint product.

    Args:
        qkv_BSHh: [B, S, N + 2 M, h] bfloat16, heads of queries, keys, values.
        cos_BSp: float32 [B, S, h / 2], see `turns`; without a gradient.
        sin_BSp: likewise.
        scales_h: [h] float32 of the norms of q and k; None: they are not normalised.
        key_heads: M.
        eps: added to mean squares.

    Returns:
        q [B, S, N, h], k and v [B, S, M, h].
    """
    shape, flat = qkv_BSHh.shape, partial(jax.lax.collapse, start_dimension=0, stop_dimension=2)
    made = api.heads_forward(flat(qkv_BSHh), flat(cos_BSp), flat(sin_BSp), scales_h, key_heads, eps)
    q, k, v = (array.reshape(*shape[:2], *array.shape[1:]) for array in made)
    return q, k, v


def _split_fwd(
    qkv_BSHh: jax.Array,
    cos_BSp: jax.Array,
    sin_BSp: jax.Array,
    scales_h: tuple[jax.Array, jax.Array] | None,
    key_heads: int,
    eps: float,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    made = split_heads(qkv_BSHh, cos_BSp, sin_BSp, scales_h, key_heads, eps)
    return made, (qkv_BSHh, cos_BSp, sin_BSp, scales_h)


def _split_bwd(key_heads: int, eps: float, kept: Any, cts: Any) -> tuple[Any, ...]:
    del key_heads  # in the cotangents' shapes
    qkv, cos, sin, scales_h = kept
    q, c, s, *ct = (jax.lax.collapse(array, 0, 2) for array in (qkv, cos, sin, *cts))
    qkv_ct, scales_ct = api.heads_backward(q, c, s, scales_h, (ct[0], ct[1], ct[2]), eps)
    return qkv_ct.reshape(qkv.shape), jnp.zeros_like(cos), jnp.zeros_like(sin), scales_ct


split_heads.defvjp(_split_fwd, _split_bwd)
