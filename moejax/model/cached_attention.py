"""Reading and writing a layer's pages: plain JAX, but for single tokens where a kernel serves.

Shape letters: B rows, S new positions of a row, T positions that a row has pages for; P pages of
this device, L positions of a page; N query heads (of a table: its pages), M key-value heads, h
width of one.
"""

from __future__ import annotations

import jax
from jax import lax
from jax import numpy as jnp

from moejax.config import ModelConfig
from moejax.model.cache import LayerCache, position_shape
from moejax.model.dot_attention import Implementation, attend
from pallas_kernels.paged_attention.api import Case, explain, paged_attention
from pallas_kernels.paged_attention.reference import (
    by_rows,
    gather_pages,
    page_exists,
    recent_pages,
)

__all__ = [
    "append",
    "attend_cached",
    "explain_decode",
    "flatten_layers",
    "gather",
    "layer_tables",
    "positions_in_text",
    "seen",
]


def positions_in_text(lengths_B: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """The positions int32 [B, S] of new tokens: from `lengths_B` on, or from 0 if that is None."""
    new_S = jnp.arange(shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(new_S if lengths_B is None else lengths_B[:, None] + new_S, shape)


def append(
    cache: LayerCache,
    k_BSMh: jax.Array,
    v_BSMh: jax.Array | None,
    at_BS: jax.Array,
    tables_BN: jax.Array,
) -> LayerCache:
    """Writes positions into their pages, in place where the cache is donated or carried.

    Padding behind a row's last token is written too, if the row has pages there: it is overwritten
    when the text goes on, and until then nobody sees it.

    Args:
        cache: the pages.
        k_BSMh: [B, S, M, h] keys, cast to the cache's dtype.
        v_BSMh: values, likewise; None where the cache has none.
        at_BS: int32 [B, S] positions in the text, each of a row only once.
        tables_BN: int32 [B, N], see `KVCache`. Positions without a page are dropped.
    """
    pages, page_len = cache.k_MPLh.shape[1:3]
    page_BS = jnp.take_along_axis(tables_BN, at_BS // page_len, axis=1, mode="fill", fill_value=-1)
    # Dropped writes get an index outside of the array, and each its own: so all are distinct.
    none_BS = pages + lax.broadcasted_iota(jnp.int32, (at_BS.size, 1), 0).reshape(at_BS.shape)
    page_BS = jnp.where(page_exists(page_BS, pages), page_BS, none_BS)

    # The heads by index, too: a scatter of all heads at once makes XLA lay them inside of the
    # positions on TPUs, and copy the whole store there and back.
    heads_M = jnp.arange(cache.k_MPLh.shape[0], dtype=jnp.int32)
    inside_BS = at_BS % page_len

    def put(old_MPLh: jax.Array, new_BSMh: jax.Array) -> jax.Array:
        at = old_MPLh.at[heads_M, page_BS[..., None], inside_BS[..., None]]
        return at.set(new_BSMh.astype(old_MPLh.dtype), mode="drop", unique_indices=True)

    if cache.v_MPLh is None:
        return LayerCache(put(cache.k_MPLh, k_BSMh), None)
    assert v_BSMh is not None
    return LayerCache(put(cache.k_MPLh, k_BSMh), put(cache.v_MPLh, v_BSMh))


def gather(
    cache: LayerCache, at_BS: jax.Array, tables_BN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rows' pages side by side.

    Args:
        cache: the pages.
        at_BS: int32 [B, S], the largest of a row is its last position.
        tables_BN: int32 [B, N], see `KVCache`.

    Returns:
        keys and values [B, T, M, h] in the cache's dtype, the keys twice if there are no values.
        Values behind the last position are zeros: a page keeps what an earlier text left in it,
        and a weight of zero times its infinity would be no number.
    """
    count = tables_BN.shape[1] * cache.k_MPLh.shape[2]
    filled_BT = jnp.arange(count, dtype=jnp.int32) <= jnp.max(at_BS, axis=1, keepdims=True)

    def get(pages_MPLh: jax.Array) -> jax.Array:
        return jnp.swapaxes(gather_pages(pages_MPLh, tables_BN), 1, 2)

    def clean(values: jax.Array) -> jax.Array:
        return jnp.where(filled_BT[..., None, None], values, jnp.zeros_like(values))

    k_BTMh = get(cache.k_MPLh)
    if cache.v_MPLh is None:
        k_BTMh = clean(k_BTMh)
        return k_BTMh, k_BTMh
    return k_BTMh, clean(get(cache.v_MPLh))


def seen(at_BS: jax.Array, count: int, window: int | None = None) -> jax.Array:
    """Which of a row's first `count` positions its tokens see.

    Args:
        at_BS: int32 [B, S] the tokens' own positions.
        count: positions T.
        window: a token sees this many positions, its own included; None: all before it.

    Returns:
        bool [B, S, T].
    """
    positions_T = jnp.arange(count, dtype=jnp.int32)
    seen_BST = positions_T <= at_BS[..., None]
    if window is not None:
        seen_BST = seen_BST & (positions_T > at_BS[..., None] - window)
    return seen_BST


def attend_cached(
    q_BSNh: jax.Array,
    cache: LayerCache,
    at_BS: jax.Array,
    tables_BN: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Attention of new tokens to their texts, themselves included; they have been appended.

    Single tokens read the pages where they are, if a kernel serves (`explain_decode`). For longer
    pieces the rows' pages are laid side by side, and what is seen of them is a mask for cuDNN, too:
    its own causal mask begins with the first key. A text's first piece needs no pages at all:
    `attend` is half the work.

    Args:
        q_BSNh: [B, S, N, h] queries.
        cache: the pages; where it has no values the keys are the values.
        at_BS: int32 [B, S] the queries' positions in their texts.
        tables_BN: int32 [B, N], see `KVCache`.
        scale: of the logits.
        window: see `seen`.
        sinks_N: see `attend`.
        implementation: see `attend`; of more than one token.

    Returns:
        [B, S, N, h] in q's dtype.
    """
    if q_BSNh.shape[1] == 1:
        y_BNh = paged_attention(
            q_BSNh[:, 0],
            cache.k_MPLh,
            cache.v_MPLh,
            at_BS[:, 0] + 1,
            tables_BN,
            scale=scale,
            window=window,
            sinks_N=sinks_N,
        )
        return y_BNh[:, None]
    heads, _, page_len, width = cache.k_MPLh.shape
    tables_BN, at_BS = recent_pages(tables_BN, at_BS, window, page_len)

    def some(q_BSNh: jax.Array, at_BS: jax.Array, tables_BN: jax.Array) -> jax.Array:
        k_BTMh, v_BTMh = (a.astype(q_BSNh.dtype) for a in gather(cache, at_BS, tables_BN))
        return attend(
            q_BSNh,
            k_BTMh,
            v_BTMh,
            scale=scale,
            sinks_N=sinks_N,
            mask_BSL=seen(at_BS, k_BTMh.shape[1], window),
            implementation=implementation,
        )

    of_row = 2 * tables_BN.shape[1] * page_len * heads * width * q_BSNh.dtype.itemsize
    return by_rows(some, of_row, q_BSNh, at_BS, tables_BN)


def explain_decode(
    config: ModelConfig, *, rows: int, table: int, page_len: int, tensor: int = 1
) -> list[str]:
    """What computes the attention of single tokens on the default device, and why nothing faster.

    Args:
        config: the model; the cache is in its compute dtype.
        rows: B of a device.
        table: pages N of a row's table.
        page_len: positions L of a page.
        tensor: devices that the heads are split over.

    Returns:
        a line for each kind of layer that another backend serves, or for another reason.
    """
    lines: dict[str, None] = {}  # each once, in order
    for attention in dict.fromkeys(layer.attention for layer in config.layers()):
        groups, width = position_shape(attention)
        latent = attention.latent is not None
        case = Case(
            rows,
            attention.num_heads // tensor,
            groups if latent else groups // tensor,
            width,
            page_len,
            table,
            config.compute_dtype,
            config.compute_dtype,
            values=not latent,
            window=attention.window,
            sinks=attention.sinks,
        )
        lines[explain(case)] = None
    return list(lines)


def flatten_layers(stacked: LayerCache) -> LayerCache:
    """Scanned layers' pages [M, layers, P, L, h] as the pages [M, layers·P, L, h] of one store.

    With `layer_tables` each layer then writes its few positions into the whole in place; taking a
    layer's pages out and putting them back would copy all of them, each step.
    """
    return jax.tree.map(lambda a: a.reshape(a.shape[0], -1, *a.shape[3:]), stacked)


def layer_tables(tables_BN: jax.Array, index: jax.Array, pages: int) -> jax.Array:
    """The tables of one layer in the store of `flatten_layers`.

    Args:
        tables_BN: int32 [B, N], see `KVCache`.
        index: int32 [], of the layer.
        pages: P of a layer.
    """
    return jnp.where(page_exists(tables_BN, pages), tables_BN + index * pages, -1)
