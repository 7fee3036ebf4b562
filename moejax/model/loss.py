"""Cross-entropy of the next token while the vocabulary is split over `tensor`."""

from __future__ import annotations

from functools import partial

import jax
from jax import lax
from jax import numpy as jnp

from moejax.model.embedding import vocabulary_logits
from sharding.collectives import axis_index, pmax_statistics, psum_statistics
from sharding.mesh import TENSOR

__all__ = ["hidden_nll", "token_nll"]


@jax.custom_vjp
def token_nll(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    """Negative log-likelihood of the targets, in nats, inside the shard_map.

    Args:
        logits_TV: [..., V local] this device's columns, any float dtype; see `vocabulary_logits`.
        targets_T: int32 [...], ids in the whole vocabulary. An id outside it gives a meaningless
            number: multiply by a mask of the targets that count.

    Returns:
        float32 [...], replicated along `tensor`. The gradient is local: softmax minus one-hot in
        this device's columns, for a cotangent that is replicated along `tensor`.
    """
    return _nll_fwd(logits_TV, targets_T)[0]


def _target_columns(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    columns = logits_TV.shape[-1]
    ids_V = axis_index(TENSOR) * columns + jnp.arange(columns, dtype=jnp.int32)
    return targets_T[..., None].astype(jnp.int32) == ids_V


def _nll_fwd(logits_TV, targets_T):
    wide = logits_TV.astype(jnp.float32)
    largest_T = pmax_statistics(jnp.max(wide, axis=-1), TENSOR)
    hit_TV = _target_columns(logits_TV, targets_T)
    terms = (
        jnp.sum(jnp.exp(wide - largest_T[..., None]), axis=-1),
        jnp.sum(jnp.where(hit_TV, wide, 0.0), axis=-1),
    )
    total_T, target_T = psum_statistics(terms, TENSOR)
    log_total_T = jnp.log(total_T) + largest_T
    return log_total_T - target_T, (logits_TV, log_total_T, targets_T)


def _nll_bwd(residuals, ct_T):
    logits_TV, log_total_T, targets_T = residuals
    softmax_TV = jnp.exp(logits_TV.astype(jnp.float32) - log_total_T[..., None])
    one_hot_TV = _target_columns(logits_TV, targets_T).astype(jnp.float32)
    grad_TV = (softmax_TV - one_hot_TV) * ct_T[..., None]
    return grad_TV.astype(logits_TV.dtype), None


token_nll.defvjp(_nll_fwd, _nll_bwd)


def hidden_nll(
    hidden_BSD: jax.Array,
    w_DV: jax.Array,
    targets_BS: jax.Array,
    *,
    vocab_size: int,
    chunk: int | None = None,
) -> jax.Array:
    """Head and cross-entropy in chunks of tokens, so that all logits never exist at once.

    The backward computes the logits of a chunk again; the gradient of the weights is summed over
    chunks in float32. The result does not depend on `chunk` except by rounding.

    Args:
        hidden_BSD: [B, S, D] after the final norm, in the compute dtype.
        w_DV: [D, V local], see `Decoder.head_weight`.
        targets_BS: int32 [B, S].
        vocab_size: ids from here on are padding.
        chunk: tokens of a chunk on this device, or None for all at once. The float32 logits of a
            chunk take 4 · chunk · V_local bytes.

    Returns:
        float32 [B, S], nats.
    """
    targets_T = targets_BS.reshape(-1)
    x_TD = hidden_BSD.reshape(targets_T.shape[0], -1)
    if chunk is None or chunk >= targets_T.shape[0]:
        return token_nll(vocabulary_logits(x_TD, w_DV, vocab_size), targets_T).reshape(
            targets_BS.shape
        )
    short = -targets_T.shape[0] % chunk
    x_CTD = jnp.pad(x_TD, ((0, short), (0, 0))).reshape(-1, chunk, x_TD.shape[1])
    targets_CT = jnp.pad(targets_T, (0, short)).reshape(-1, chunk)
    wide_DV = w_DV.astype(jnp.float32)  # what the loop closes over decides how it sums gradients

    @partial(jax.checkpoint, prevent_cse=False)  # a loop body cannot be merged with its own past
    def chunk_nll(chunk_of):
        x, targets = chunk_of
        return token_nll(vocabulary_logits(x, wide_DV.astype(x.dtype), vocab_size), targets)

    nll_CT = lax.map(chunk_nll, (x_CTD, targets_CT))
    return nll_CT.reshape(-1)[: targets_T.shape[0]].reshape(targets_BS.shape)
