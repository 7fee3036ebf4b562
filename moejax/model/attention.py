"""Grouped-query attention (arXiv 2305.13245), heads split over `tensor`.

Shape letters: N query heads, M key-value heads, L positions of the cache; all heads local.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import AttentionConfig, ModelConfig
from moejax.model.cache import LayerCache
from moejax.model.cached_attention import append, attend_cached, positions_in_text
from moejax.model.dot_attention import Implementation, attend
from moejax.model.heads import heads_refusal, split_heads
from moejax.model.initializers import INIT_STD, make_constant, make_normal
from moejax.model.mlp import add_bias
from moejax.model.norm import rms_normalize, rms_normalize_heads
from moejax.model.rope import rotate, turns
from pallas_kernels.precision import precision_of
from sharding.collectives import enter_parallel, exit_parallel
from sharding.mesh import TENSOR

__all__ = ["Attention", "Implementation", "choose_attention"]


def choose_attention(
    platform: str, config: ModelConfig, *, deterministic: bool = False
) -> Implementation:
    """The implementation of `jax.nn.dot_product_attention` for training on a platform.

    cuDNN's flash attention takes 16-bit types and heads of at most 128 in multiples of 8, with or
    without a window; XLA's serves these all, at the price of the S × S scores. Sinks, and values of
    another width than keys, neither serves: see `attend`. Under XLA's deterministic operations a
    program with cuDNN's backward does not compile (jax 0.11.2: IndexError in raw_hash_map::at).
    """
    if deterministic:
        return "xla"
    cudnn = platform in ("gpu", "cuda") and config.compute_dtype == "bfloat16"
    attention, head_dim = config.attention, config.attention.head_dim
    plain = not attention.sinks and attention.value_dim == head_dim
    return "cudnn" if cudnn and plain and head_dim % 8 == 0 and head_dim <= 128 else None


class Attention(nnx.Module):
    """Causal self-attention with rotary positions.

    Parameters: w_q [D, N, h], w_k and w_v [D, M, h], w_o [N, h, D]; with `qk_norm="head"` the
    scales q_scale and k_scale [h], with `"full"` [N, h] and [M, h]; with `bias` b_q [N, h], b_k
    and b_v [M, h]; with `output_bias` b_o [D]; with `sinks` the logits sinks [N], float32.
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
            config: heads, positions, normalisation of q and k, biases, sinks, window; not latent.
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
        self.b_q = _bias((n, h), P(TENSOR, None), config.bias)
        self.b_k = _bias((m, h), P(TENSOR, None), config.bias)
        self.b_v = _bias((m, h), P(TENSOR, None), config.bias)
        self.b_o = _bias((d_model,), P(None), config.output_bias)
        self.sinks = make_constant((n,), P(TENSOR), 0.0, float32=True) if config.sinks else None

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
            cache: keys and values so far. The S new ones are written behind them, and row b's
                token s attends to the cache up to and including itself.
            lengths_B: int32 [B] filled positions of the cache; None: none, and the new ones attend
                to each other without reading them back.
            tables_BN: int32 [B, N], the cache's pages, see `KVCache`; required with it.

        Returns:
            [B, S, D] in x's dtype, and the cache with the new positions, or None.
        """
        dtype, precision, config = x_BSD.dtype, precision_of(x_BSD.dtype), self.config
        x_BSD = enter_parallel(x_BSD, TENSOR)

        def project(w: nnx.Param, bias: nnx.Param | None) -> jax.Array:
            y_BSNh = jnp.einsum("BSD,DNh->BSNh", x_BSD, w[...].astype(dtype), precision=precision)
            return y_BSNh if bias is None else add_bias(y_BSNh, bias[...].astype(dtype))

        def place(x_BSNh: jax.Array, scale: nnx.Param | None) -> jax.Array:
            return rotate(
                self._norm(x_BSNh, scale),
                positions_BS,
                config.rope_theta,
                interleaved=config.rope_interleaved,
                yarn=config.yarn,
            )

        heads = self.w_q.shape[1] + 2 * self.w_k.shape[1]  # of this device
        tokens = x_BSD.shape[0] * x_BSD.shape[1]
        if cache is None and heads_refusal(config, tokens, heads, dtype) is None:
            q_BSNh, k_BSMh, v_BSMh = self._joint_heads(x_BSD, positions_BS)
        else:
            q_BSNh = place(project(self.w_q, self.b_q), self.q_scale)
            k_BSMh = place(project(self.w_k, self.b_k), self.k_scale)
            v_BSMh = project(self.w_v, self.b_v)
        sinks_N = None if self.sinks is None else self.sinks[...]
        at_BS = None
        if cache is not None:
            assert tables_BN is not None
            at_BS = positions_in_text(lengths_B, x_BSD.shape[:2])
            cache = append(cache, k_BSMh, v_BSMh, at_BS, tables_BN)
        if cache is None or lengths_B is None:
            y_BSNh = attend(
                q_BSNh,
                k_BSMh,
                v_BSMh,
                scale=config.scale,
                window=config.window,
                sinks_N=sinks_N,
                implementation=self.implementation,
            )
        else:
            assert at_BS is not None and tables_BN is not None
            y_BSNh = attend_cached(
                q_BSNh,
                cache,
                at_BS,
                tables_BN,
                scale=config.scale,
                window=config.window,
                sinks_N=sinks_N,
                implementation=self.implementation,
            )
        w_NhD = self.w_o[...].astype(dtype)
        y_BSD = jnp.einsum("BSNh,NhD->BSD", y_BSNh, w_NhD, precision=precision)
        y_BSD = exit_parallel(y_BSD, TENSOR)
        if self.b_o is not None:
            y_BSD = add_bias(y_BSD, self.b_o[...].astype(dtype))
        return y_BSD, cache

    def _joint_heads(
        self, x_BSD: jax.Array, positions_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v of one product, whose gradients are one product too."""
        dtype, config = x_BSD.dtype, self.config
        weights = [w[...].astype(dtype) for w in (self.w_q, self.w_k, self.w_v)]
        w_DHh, precision = jnp.concatenate(weights, axis=1), precision_of(dtype)
        qkv_BSHh = jnp.einsum("BSD,DHh->BSHh", x_BSD, w_DHh, precision=precision)
        if config.bias:
            biases = [b[...].astype(dtype) for b in (self.b_q, self.b_k, self.b_v) if b is not None]
            qkv_BSHh = add_bias(qkv_BSHh, jnp.concatenate(biases, axis=0))
        cos_BSp, sin_BSp = turns(positions_BS, config.head_dim, config.rope_theta, config.yarn)
        scales_h = None
        if self.q_scale is not None and self.k_scale is not None:
            # One scale serves the heads of every device, so its gradient is summed over them.
            scales_h = tuple(enter_parallel(s[...], TENSOR) for s in (self.q_scale, self.k_scale))
        return split_heads(qkv_BSHh, cos_BSp, sin_BSp, scales_h, weights[1].shape[1], self.norm_eps)

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


def _bias(shape: tuple[int, ...], spec: P, present: bool) -> nnx.Param | None:
    return make_constant(shape, spec, 0.0) if present else None
