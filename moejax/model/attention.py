"""Grouped-query attention (arXiv 2305.13245), heads split over `tensor`.

Shape letters: N query heads, M key-value heads, L positions of the cache; all heads local.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import AttentionConfig, ModelConfig
from moejax.model.cache import LayerCache
from moejax.model.initializers import INIT_STD, make_constant, make_normal
from moejax.model.norm import rms_normalize, rms_normalize_heads
from moejax.model.rope import rotate
from pallas_kernels.precision import precision_of
from sharding.collectives import enter_parallel, exit_parallel
from sharding.mesh import TENSOR

__all__ = ["Attention", "Implementation", "choose_attention"]

Implementation = Literal["xla", "cudnn"] | None


def choose_attention(
    platform: str, config: ModelConfig, *, deterministic: bool = False
) -> Implementation:
    """The implementation of `jax.nn.dot_product_attention` for training on a platform.

    cuDNN's flash attention takes 16-bit types and heads of at most 128 in multiples of 8; XLA's
    serves everything, at the price of the S × S scores. Under XLA's deterministic operations a
    program with cuDNN's backward does not compile (jax 0.11.2: IndexError in raw_hash_map::at).
    """
    if deterministic:
        return "xla"
    cudnn = platform in ("gpu", "cuda") and config.compute_dtype == "bfloat16"
    head_dim = config.attention.head_dim
    return "cudnn" if cudnn and head_dim % 8 == 0 and head_dim <= 128 else None


class Attention(nnx.Module):
    """Causal self-attention with rotary positions.

    Parameters: w_q [D, N, h], w_k and w_v [D, M, h], w_o [N, h, D]; with `qk_norm="head"` the
    scales q_scale and k_scale [h], with `"full"` [N, h] and [M, h].
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
            config: heads, rotary base, normalisation of q and k.
            norm_eps: added to mean squares when q and k are normalised.
            output_std: standard deviation of w_o.
            implementation: passed to `jax.nn.dot_product_attention`; None lets it choose.
            rngs: the stream `params` is drawn from.
        """
        n, m, h = config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        self.norm_eps = norm_eps
        self.implementation = implementation
        heads = P(None, TENSOR, None)
        self.w_q = make_normal(rngs, (d_model, n, h), heads)
        self.w_k = make_normal(rngs, (d_model, m, h), heads)
        self.w_v = make_normal(rngs, (d_model, m, h), heads)
        self.w_o = make_normal(rngs, (n, h, d_model), P(TENSOR, None, None), output_std)
        self.q_scale = _norm_scale(config, n)
        self.k_scale = _norm_scale(config, m)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        *,
        cache: LayerCache | None = None,
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends causally, inside the shard_map.

        Args:
            x_BSD: [B, S, D] normalised input, replicated along `tensor`.
            positions_BS: int32 [B, S] for the rotation.
            cache: keys and values so far. The S new ones are written behind them, and row b's
                token s attends to the cache up to and including itself.
            lengths_B: int32 [B] filled positions of the cache; required with it.

        Returns:
            [B, S, D] in x's dtype, and the cache with the new positions, or None.
        """
        dtype, precision = x_BSD.dtype, precision_of(x_BSD.dtype)
        x_BSD = enter_parallel(x_BSD, TENSOR)
        q_BSNh, k_BSMh, v_BSMh = (
            jnp.einsum("BSD,DNh->BSNh", x_BSD, w[...].astype(dtype), precision=precision)
            for w in (self.w_q, self.w_k, self.w_v)
        )
        q_BSNh = rotate(self._norm(q_BSNh, self.q_scale), positions_BS, self.config.rope_theta)
        k_BSMh = rotate(self._norm(k_BSMh, self.k_scale), positions_BS, self.config.rope_theta)
        if cache is None:
            y_BSNh = self._attend(q_BSNh, k_BSMh, v_BSMh, is_causal=True)
        else:
            assert lengths_B is not None
            at_BS = lengths_B[:, None] + jnp.arange(x_BSD.shape[1], dtype=jnp.int32)
            cache = _write(cache, k_BSMh, v_BSMh, at_BS)
            filled_L = jnp.arange(cache.k_BLMh.shape[1], dtype=jnp.int32)
            mask_BNSL = (filled_L <= at_BS[..., None])[:, None]
            k_BLMh, v_BLMh = (a.astype(q_BSNh.dtype) for a in (cache.k_BLMh, cache.v_BLMh))
            y_BSNh = self._attend(q_BSNh, k_BLMh, v_BLMh, mask=mask_BNSL)
        w_NhD = self.w_o[...].astype(dtype)
        y_BSD = jnp.einsum("BSNh,NhD->BSD", y_BSNh, w_NhD, precision=precision)
        return exit_parallel(y_BSD, TENSOR), cache

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, **mask: Any) -> jax.Array:
        # JAX's own function mixes dtypes on its way to a float32 softmax, and takes no precision;
        # the context is read where its products are traced, and their transposes keep it.
        precision = precision_of(q.dtype).name.lower()
        with (
            jax.numpy_dtype_promotion("standard"),
            jax.default_matmul_precision(precision),
        ):
            return jax.nn.dot_product_attention(q, k, v, implementation=self.implementation, **mask)

    def _norm(self, x_BSNh: jax.Array, scale: nnx.Param | None) -> jax.Array:
        if scale is None:
            return x_BSNh
        if self.config.qk_norm == "full":
            return rms_normalize_heads(x_BSNh, scale[...], self.norm_eps)
        # One scale serves the heads of every device, so its gradient is summed over them.
        return rms_normalize(x_BSNh, enter_parallel(scale[...], TENSOR), self.norm_eps)


def _norm_scale(config: AttentionConfig, heads: int) -> nnx.Param | None:
    if config.qk_norm == "none":
        return None
    if config.qk_norm == "head":
        return make_constant((config.head_dim,), P(None), 1.0, float32=True)
    return make_constant((heads, config.head_dim), P(TENSOR, None), 1.0, float32=True)


def _write(cache: LayerCache, k_BSMh: jax.Array, v_BSMh: jax.Array, at_BS: jax.Array) -> LayerCache:
    rows = jnp.arange(at_BS.shape[0], dtype=jnp.int32)[:, None]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        # `drop`, because the default clamp would overwrite the last position of a full row.
        return old.at[rows, at_BS].set(new.astype(old.dtype), mode="drop", unique_indices=True)

    return LayerCache(put(cache.k_BLMh, k_BSMh), put(cache.v_BLMh, v_BSMh))
