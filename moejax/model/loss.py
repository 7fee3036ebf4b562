"""Cross-entropy of the next token while the vocabulary is split over `tensor`."""

from __future__ import annotations

from functools import partial

import jax
from jax import lax
from jax import numpy as jnp

from moejax.model.embedding import logits_of_entered, vocabulary_logits
from pallas_kernels.precision import precision_of
from sharding.collectives import axis_index, enter_parallel, pmax_statistics, psum_statistics
from sharding.mesh import TENSOR

__all__ = ["hidden_nll", "summed_nll", "token_nll"]


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
    wide_DV = w_DV.astype(jnp.float32)  # what the loop closes over decides how it sums gradients

    @partial(jax.checkpoint, prevent_cse=False)  # a loop body cannot be merged with its own past
    def chunk_nll(chunk_of):
        x, targets = chunk_of
        return token_nll(vocabulary_logits(x, wide_DV.astype(x.dtype), vocab_size), targets)

    nll_CT = lax.map(chunk_nll, _chunks(x_TD, targets_T, chunk))
    return nll_CT.reshape(-1)[: targets_T.shape[0]].reshape(targets_BS.shape)


def _chunks(x_TD, targets_T, chunk):
    """Tokens and targets in chunks, the last one filled up."""
    short = -targets_T.shape[0] % chunk
    x_CTD = jnp.pad(x_TD, ((0, short), (0, 0))).reshape(-1, chunk, x_TD.shape[1])
    return x_CTD, jnp.pad(targets_T, (0, short)).reshape(-1, chunk)


def summed_nll(
    hidden_BSD: jax.Array,
    w_DV: jax.Array,
    targets_BS: jax.Array,
    *,
    vocab_size: int,
    scale: float,
    chunk: int | None = None,
) -> jax.Array:
    """Head and cross-entropy of a training step: the sum alone, its gradients made on the way.

    As all tokens count alike, the gradients are known as soon as a chunk's logits are: nothing of
    the logits is kept for the backward, nor are they computed again (Liger Kernel, arXiv
    2410.10989, section 3.2). The result is `scale · sum(hidden_nll(...))`.

    Args:
        hidden_BSD, w_DV, targets_BS, vocab_size, chunk: as for `hidden_nll`.
        scale: what each token's loss counts, such as one over their number.

    Returns:
        float32 [], nats; replicated along `tensor`.
    """
    targets_T = targets_BS.reshape(-1)
    x_TD = enter_parallel(hidden_BSD.reshape(targets_T.shape[0], -1), TENSOR)
    w_DV = w_DV.astype(x_TD.dtype)
    return _summed(x_TD, w_DV, targets_T, vocab_size, scale, chunk or targets_T.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _summed(x_TD, w_DV, targets_T, vocab_size, scale, chunk):
    def add(total, part):
        x_CD, targets_C, counts_C = part
        nll_C, _ = _nll_fwd(logits_of_entered(x_CD, w_DV, vocab_size), targets_C)
        return total + jnp.sum(nll_C * counts_C), None

    parts = _parts(x_TD, targets_T, scale, chunk)
    return lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]


def _parts(x_TD, targets_T, scale, chunk):
    """Chunks of tokens, targets and what each counts; 0 where the last one is filled up."""
    tokens = targets_T.shape[0]
    x_NCD, targets_NC = _chunks(x_TD, targets_T, min(chunk, tokens))
    there_T = jnp.arange(targets_NC.size, dtype=jnp.int32) < tokens
    counts_T = jnp.where(there_T, scale, 0.0).astype(jnp.float32)
    return x_NCD, targets_NC, counts_T.reshape(targets_NC.shape)


def _summed_fwd(x_TD, w_DV, targets_T, vocab_size, scale, chunk):
    precision = precision_of(x_TD.dtype)

    def add(sums, part):
        total, w_ct_DV = sums
        x_CD, targets_C, counts_C = part
        nll_C, kept = _nll_fwd(logits_of_entered(x_CD, w_DV, vocab_size), targets_C)
        ct_CV = _nll_bwd(kept, counts_C)[0].astype(x_CD.dtype)
        x_ct_CD = jnp.einsum("CV,DV->CD", ct_CV, w_DV, precision=precision)
        more_DV = jnp.einsum(
            "CD,CV->DV", x_CD, ct_CV, precision=precision, preferred_element_type=jnp.float32
        )
        return (total + jnp.sum(nll_C * counts_C), w_ct_DV + more_DV), x_ct_CD

    start = jnp.zeros((), jnp.float32), jnp.zeros(w_DV.shape, jnp.float32)
    parts = _parts(x_TD, targets_T, scale, chunk)
    (total, w_ct_DV), x_ct_NCD = lax.scan(add, start, parts)
    x_ct_TD = x_ct_NCD.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]]
    return total, (x_ct_TD, w_ct_DV.astype(w_DV.dtype))


def _summed_bwd(vocab_size, scale, chunk, residuals, ct):
    del vocab_size, scale, chunk
    # 1 in a training step, and then the compiler leaves it out.
    x_ct, w_ct = ((r.astype(jnp.float32) * ct).astype(r.dtype) for r in residuals)
    return x_ct, w_ct, None


_summed.defvjp(_summed_fwd, _summed_bwd)
