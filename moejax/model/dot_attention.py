"""Softmax attention of one device's heads: JAX's own where it serves, else with blocks of queries.

Shape letters: N query heads, M key-value heads, G = N / M of them to a key, L keys, Q queries of a
block, h width of a key, v of a value.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.precision import precision_of

__all__ = ["Implementation", "attend"]

Implementation = Literal["xla", "cudnn"] | None

SCORES_AT_ONCE = 2**26
"""Scores of a block of queries, all heads together: 256 MiB as float32."""

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# Far below every score and still finite: a row without keys gives no nan.


def attend(
    q_BSNh: jax.Array,
    k_BLMh: jax.Array,
    v_BLMv: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    mask_BSL: jax.Array | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Softmax of scaled products over the keys that a query sees, times their values.

    Query head n uses key head n // G. JAX's own function, which holds all scores unless it is
    cuDNN's, has neither sinks nor values of another width than keys, and without cuDNN long
    prompts behind a mask are too much for it. There `SCORES_AT_ONCE` are held, and computed again
    for the gradient.

    Args:
        q_BSNh: [B, S, N, h], float32 or bfloat16.
        k_BLMh: [B, L, M, h] in q's dtype.
        v_BLMv: [B, L, M, v] in q's dtype.
        scale: of the logits.
        window: a query sees this many keys, its own position's included; None: all before it.
        sinks_N: float32 [N], a logit of every head that takes part in the softmax and adds no
            value (arXiv 2309.17453; gpt-oss model card, arXiv 2508.10925); None for none.
        mask_BSL: bool [B, S, L], what each query sees, window included. None: query s sees the
            keys up to s, and S = L.
        implementation: of `jax.nn.dot_product_attention`, where that serves.

    Returns:
        [B, S, N, v] in q's dtype. Without sinks a query that sees nothing gets the mean of all
        values, with sinks zeros.
    """
    if mask_BSL is not None or (window is not None and window >= k_BLMh.shape[1]):
        window = None
    batch, queries, heads, _ = q_BSNh.shape
    keys = k_BLMh.shape[1]
    at_once = max(1, SCORES_AT_ONCE // (batch * heads * keys))
    short = mask_BSL is None or implementation == "cudnn" or queries <= at_once
    if sinks_N is None and k_BLMh.shape == v_BLMv.shape and short:
        return _jax_attention(
            q_BSNh,
            k_BLMh,
            v_BLMv,
            mask_BSL,
            scale=scale,
            window=window,
            implementation=implementation,
        )
    if queries > at_once:
        return _in_blocks(q_BSNh, k_BLMh, v_BLMv, mask_BSL, sinks_N, scale, window, at_once)
    if mask_BSL is None:
        positions = jnp.arange(keys, dtype=jnp.int32)
        mask_BSL = _sees(positions, positions, window)[None]
    return _softmax_product(q_BSNh, k_BLMh, v_BLMv, mask_BSL, sinks_N, scale)


def _in_blocks(
    q_BSNh: jax.Array,
    k_BLMh: jax.Array,
    v_BLMv: jax.Array,
    mask_BSL: jax.Array | None,
    sinks_N: jax.Array | None,
    scale: float,
    window: int | None,
    at_once: int,
) -> jax.Array:
    """`attend`, at most `at_once` queries at a time, each block with no more keys than it sees."""
    (batch, queries), keys, dtype = q_BSNh.shape[:2], k_BLMh.shape[1], q_BSNh.dtype
    size = -(-queries // -(-queries // at_once))  # blocks of equal size, the last one padded
    starts = jnp.arange(0, queries, size, dtype=jnp.int32)
    seen = keys if window is None else min(keys, size + window - 1)  # by a block
    # Carried as float32, so that the gradients of all blocks are added up in float32.
    wide = k_BLMh.astype(jnp.float32), v_BLMv.astype(jnp.float32)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(xs):
        start, q_BQNh, mask_BQL = xs
        first = jnp.clip(start + size - seen, 0, keys - seen)
        k, v = (lax.dynamic_slice_in_dim(a, first, seen, 1).astype(dtype) for a in wide)
        if mask_BQL is None:
            at = jnp.arange(size, dtype=jnp.int32) + start
            mask_BQL = _sees(at, first + jnp.arange(seen, dtype=jnp.int32), window)[None]
        return _softmax_product(q_BQNh, k, v, mask_BQL, sinks_N, scale)

    def cut(x_BS: jax.Array) -> jax.Array:
        pads = [(0, 0), (0, len(starts) * size - queries)] + [(0, 0)] * (x_BS.ndim - 2)
        blocks = jnp.pad(x_BS, pads).reshape(batch, len(starts), size, *x_BS.shape[2:])
        return jnp.moveaxis(blocks, 1, 0)

    mask = None if mask_BSL is None else cut(mask_BSL)
    y_BnQNv = jnp.moveaxis(lax.map(block, (starts, cut(q_BSNh), mask)), 0, 1)
    return y_BnQNv.reshape(batch, -1, *y_BnQNv.shape[3:])[:, :queries]


def _sees(queries_Q: jax.Array, keys_L: jax.Array, window: int | None) -> jax.Array:
    """What queries at these positions see of keys at those: bool [Q, L]."""
    before_QL = queries_Q[:, None] - keys_L[None]
    seen_QL = before_QL >= 0
    return seen_QL if window is None else seen_QL & (before_QL < window)


def _softmax_product(
    q_BQNh: jax.Array,
    k_BLMh: jax.Array,
    v_BLMv: jax.Array,
    mask_BQL: jax.Array,
    sinks_N: jax.Array | None,
    scale: float,
) -> jax.Array:
    """`attend` for all these queries together."""
    batch, queries, heads, _ = q_BQNh.shape
    shared_by = heads // k_BLMh.shape[2]
    q_BQMGh = q_BQNh.reshape(batch, queries, -1, shared_by, q_BQNh.shape[-1])
    scores_BMGQL = _product("BQMGh,BLMh->BMGQL", q_BQMGh, k_BLMh) * scale
    scores_BMGQL = jnp.where(mask_BQL[:, None, None], scores_BMGQL, _MASKED)
    top = jnp.max(scores_BMGQL, axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks_MG11 = sinks_N.reshape(-1, shared_by, 1, 1)
        top = jnp.maximum(top, sinks_MG11)
    top = lax.stop_gradient(top)
    parts_BMGQL = jnp.exp(scores_BMGQL - top)
    whole = jnp.sum(parts_BMGQL, axis=-1, keepdims=True)
    if sinks_N is not None:
        whole = whole + jnp.exp(sinks_MG11 - top)
    shares_BMGQL = (parts_BMGQL / whole).astype(v_BLMv.dtype)
    y_BQMGv = _product("BMGQL,BLMv->BQMGv", shares_BMGQL, v_BLMv)
    return y_BQMGv.reshape(batch, queries, heads, -1).astype(q_BQNh.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of factors of one dtype, in float32; its cotangent is rounded to their dtype.

    What JAX would derive multiplies a float32 cotangent with bfloat16 factors: at float32's price.
    """
    precision = precision_of(a.dtype)
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _product_fwd(subscripts, a, b):
    return _product(subscripts, a, b), (a, b)


def _product_bwd(subscripts, factors, ct):
    a, b = factors
    ct = ct.astype(a.dtype)
    of, result = subscripts.split("->")
    of_a, of_b = of.split(",")
    a_ct = _product(f"{result},{of_b}->{of_a}", ct, b)
    return a_ct.astype(a.dtype), _product(f"{result},{of_a}->{of_b}", ct, a).astype(b.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def _jax_attention(
    q_BSNh: jax.Array,
    k_BLMh: jax.Array,
    v_BLMh: jax.Array,
    mask_BSL: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    implementation: Implementation,
) -> jax.Array:
    # JAX's own function mixes dtypes on its way to a float32 softmax, and takes no precision;
    # the context is read where its products are traced, and their transposes keep it.
    precision = precision_of(q_BSNh.dtype).name.lower()
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision(precision):
        return jax.nn.dot_product_attention(
            q_BSNh,
            k_BLMh,
            v_BLMh,
            mask=None if mask_BSL is None else mask_BSL[:, None],
            scale=scale,
            is_causal=mask_BSL is None,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation,
        )
