"""Multi-head latent attention (MLA, arXiv 2405.04434 §2.1; 2412.19437 §2.1.1).

Keys and values of all heads are expanded from one normalised vector a token, the latent; beside it
stands one rotated key for all heads. Only these two are cached.

Shape letters: N query heads of this device, h width of a query or key = n + p, n numbers without
positions and p rotated ones; r width of the latent, c = r + p what is cached of a position; v width
of a value; Q width of what queries are expanded from; T positions that are attended to.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import AttentionConfig
from moejax.model.attention import Implementation
from moejax.model.cache import LayerCache
from moejax.model.cached_attention import (
    append,
    attend_cached,
    gather,
    positions_in_text,
    seen,
)
from moejax.model.dot_attention import attend
from moejax.model.initializers import INIT_STD, make_constant, make_normal
from moejax.model.norm import rms_normalize
from moejax.model.rope import rotate
from pallas_kernels.paged_attention.reference import by_rows, recent_pages
from pallas_kernels.precision import precision_of
from sharding.collectives import enter_parallel, exit_parallel
from sharding.mesh import TENSOR

__all__ = ["LatentAttention", "absorbs"]


def absorbs(config: AttentionConfig, queries: int) -> bool:
    """Whether attending to latents costs fewer products than expanding them.

    For each cached position and head, expanding costs r·(n + v) once, then h + v for each query
    (logit and value); attending to the latents themselves costs 2·c for each query.

    Args:
        config: with `latent`.
        queries: of a row, S.
    """
    latent = config.latent
    assert latent is not None
    nope = config.head_dim - latent.rope_dim
    expanding = latent.rank * (nope + latent.value_dim)
    expanded = config.head_dim + latent.value_dim
    return queries * 2 * (latent.rank + latent.rope_dim) <= expanding + queries * expanded


class LatentAttention(nnx.Module):
    """Causal self-attention to keys and values expanded from a latent.

    Parameters: w_q [D, N, h], or with `query_rank` w_q_down [D, Q], q_scale [Q] and w_q_up
    [Q, N, h]; w_kv_down [D, c], the latent first; kv_scale [r]; w_kv_up [r, N, n + v], keys first;
    w_o [N, v, D]. Heads are split over `tensor`, the rest is on every device.
    """

    def __init__(
        self,
        d_model: int,
        config: AttentionConfig,
        *,
        norm_eps: float,
        output_std: float = INIT_STD,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        """Draws the weights.

        Args:
            d_model: width D of input and output.
            config: with `latent`.
            norm_eps: added to the mean squares of the latents.
            output_std: standard deviation of w_o.
            implementation: passed to `attend` where there is no cache.
            rngs: the stream `params` is drawn from.
        """
        latent, n, h = config.latent, config.num_heads, config.head_dim
        assert latent is not None
        self.config = config
        self.latent = latent
        self.norm_eps = norm_eps
        self.implementation = implementation
        heads = P(None, TENSOR, None)
        if latent.query_rank is None:
            self.w_q = make_normal(rngs, (d_model, n, h), heads)
        else:
            self.w_q_down = make_normal(rngs, (d_model, latent.query_rank), P(None, None))
            self.q_scale = make_constant((latent.query_rank,), P(None), 1.0, float32=True)
            self.w_q_up = make_normal(rngs, (latent.query_rank, n, h), heads)
        up = h - latent.rope_dim + latent.value_dim
        self.w_kv_down = make_normal(rngs, (d_model, latent.rank + latent.rope_dim), P(None, None))
        self.kv_scale = make_constant((latent.rank,), P(None), 1.0, float32=True)
        self.w_kv_up = make_normal(rngs, (latent.rank, n, up), heads)
        self.w_o = make_normal(
            rngs, (n, latent.value_dim, d_model), P(TENSOR, None, None), output_std
        )

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        *,
        cache: LayerCache | None = None,
        lengths_B: jax.Array | None = None,
        tables_BN: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends causally, inside the shard_map.

        Args:
            x_BSD: [B, S, D] normalised input, replicated along `tensor`.
            positions_BS: int32 [B, S] for the rotation.
            cache: latents so far. The S new ones are written behind them, and row b's token s
                attends to the cache up to and including itself.
            lengths_B: int32 [B] filled positions of the cache; None: none, and the new ones attend
                to each other without reading them back.
            tables_BN: int32 [B, N], see `KVCache`; required with the cache.

        Returns:
            [B, S, D] in x's dtype, and the cache with the new positions, or None.
        """
        # What all heads share is computed by every device, outside of the parallel region: so its
        # weights have their whole gradients, and what crosses is narrower than x.
        source_BSQ, kv_BSc = enter_parallel(
            (self._query_source(x_BSD), self._latents(x_BSD, positions_BS)), TENSOR
        )
        q_BSNh = self._queries(source_BSQ, positions_BS)
        config = self.config
        at_BS = None
        if cache is not None:
            assert tables_BN is not None
            at_BS = positions_in_text(lengths_B, x_BSD.shape[:2])
            cache = append(cache, kv_BSc[:, :, None], None, at_BS, tables_BN)
        if cache is None or lengths_B is None:
            y_BSNv = attend(
                q_BSNh,
                *self._expand(kv_BSc),
                scale=config.scale,
                window=config.window,
                implementation=self.implementation,
            )
        else:
            assert at_BS is not None and tables_BN is not None
            many = not absorbs(config, x_BSD.shape[1])
            read = self._attend_expanded if many else self._attend_latents
            y_BSNv = read(q_BSNh, cache, at_BS, tables_BN)
        y_BSD = self._product("BSNv,NvD->BSD", y_BSNv, self.w_o[...])
        return exit_parallel(y_BSD, TENSOR), cache

    def _query_source(self, x_BSD: jax.Array) -> jax.Array:
        """What queries are expanded from: the input itself, or its normalised projection."""
        if self.latent.query_rank is None:
            return x_BSD
        down_BSQ = self._product("BSD,DQ->BSQ", x_BSD, self.w_q_down[...])
        return rms_normalize(down_BSQ, self.q_scale[...], self.norm_eps)

    def _queries(self, source_BSQ: jax.Array, positions_BS: jax.Array) -> jax.Array:
        w_QNh = self.w_q if self.latent.query_rank is None else self.w_q_up
        q_BSNh = self._product("BSQ,QNh->BSNh", source_BSQ, w_QNh[...])
        plain_BSNn, rotated_BSNp = _part(q_BSNh, self.latent.rope_dim)
        return jnp.concatenate([plain_BSNn, self._rotate(rotated_BSNp, positions_BS)], axis=-1)

    def _latents(self, x_BSD: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """What is cached: [B, S, c], the normalised latent, then the rotated key."""
        down_BSc = self._product("BSD,Dc->BSc", x_BSD, self.w_kv_down[...])
        latent_BSr, key_BSp = _part(down_BSc, self.latent.rope_dim)
        latent_BSr = rms_normalize(latent_BSr, self.kv_scale[...], self.norm_eps)
        key_BSp = self._rotate(key_BSp[:, :, None], positions_BS)[:, :, 0]
        return jnp.concatenate([latent_BSr, key_BSp], axis=-1)

    def _expand(self, kv_BTc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B, T, N, h] and values [B, T, N, v] of all heads."""
        latent_BTr, key_BTp = _part(kv_BTc, self.latent.rope_dim)
        up_BTNm = self._product("BTr,rNm->BTNm", latent_BTr, self.w_kv_up[...])
        k_BTNn, v_BTNv = _part(up_BTNm, self.latent.value_dim)
        shape = (*k_BTNn.shape[:-1], self.latent.rope_dim)
        k_BTNp = jnp.broadcast_to(key_BTp[:, :, None], shape)
        return jnp.concatenate([k_BTNn, k_BTNp], axis=-1), v_BTNv

    def _attend_expanded(
        self, q_BSNh: jax.Array, cache: LayerCache, at_BS: jax.Array, tables_BN: jax.Array
    ) -> jax.Array:
        window, page_len = self.config.window, cache.k_MPLh.shape[2]
        tables_BN, at_BS = recent_pages(tables_BN, at_BS, window, page_len)

        def some(q_BSNh: jax.Array, at_BS: jax.Array, tables_BN: jax.Array) -> jax.Array:
            kv_BTc = gather(cache, at_BS, tables_BN)[0][:, :, 0].astype(q_BSNh.dtype)
            mask_BST = seen(at_BS, kv_BTc.shape[1], window)
            return attend(q_BSNh, *self._expand(kv_BTc), scale=self.config.scale, mask_BSL=mask_BST)

        widths = q_BSNh.shape[-1] + self.latent.value_dim
        of_row = tables_BN.shape[1] * page_len * q_BSNh.shape[2] * widths * q_BSNh.dtype.itemsize
        return by_rows(some, of_row, q_BSNh, at_BS, tables_BN)

    def _attend_latents(
        self, q_BSNh: jax.Array, cache: LayerCache, at_BS: jax.Array, tables_BN: jax.Array
    ) -> jax.Array:
        """Attends to the latents as the one key and value of all heads.

        The keys' part of w_kv_up moves to the queries, the values' part behind the sum.
        """
        keys_rNn, values_rNv = _part(self.w_kv_up[...], self.latent.value_dim)
        q_BSNn, q_BSNp = _part(q_BSNh, self.latent.rope_dim)
        q_BSNr = self._product("BSNn,rNn->BSNr", q_BSNn, keys_rNn)
        y_BSNc = attend_cached(
            jnp.concatenate([q_BSNr, q_BSNp], axis=-1),
            cache,
            at_BS,
            tables_BN,
            scale=self.config.scale,
            window=self.config.window,
        )
        return self._product("BSNr,rNv->BSNv", y_BSNc[..., : self.latent.rank], values_rNv)

    def _rotate(self, x_BSNp: jax.Array, positions_BS: jax.Array) -> jax.Array:
        config = self.config
        return rotate(
            x_BSNp,
            positions_BS,
            config.rope_theta,
            interleaved=config.rope_interleaved,
            yarn=config.yarn,
        )

    def _product(self, subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, x, w.astype(x.dtype), precision=precision_of(x.dtype))


def _part(x: jax.Array, last: int) -> tuple[jax.Array, jax.Array]:
    """All but the `last` columns, and those."""
    return x[..., :-last], x[..., -last:]
