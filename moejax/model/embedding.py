"""Token embedding and output head, the vocabulary split over `tensor` (arXiv 1909.08053 §3)."""

from __future__ import annotations

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.model.initializers import make_normal
from pallas_kernels.precision import precision_of
from sharding.collectives import axis_index, enter_parallel, exit_parallel
from sharding.mesh import TENSOR

__all__ = ["PADDING_LOGIT", "Embedding", "Head", "logits_of_entered", "vocabulary_logits"]

PADDING_LOGIT = -1e30  # finite, so that a padding id has probability 0 and never gives 0 · inf


@jax.custom_vjp
def _lookup(w_VD: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(w_VD, ids, axis=0, mode="clip")


def _lookup_fwd(w_VD, ids):
    return _lookup(w_VD, ids), (w_VD, ids)


def _lookup_bwd(residuals, ct):
    # A frequent token sums thousands of cotangents: in bfloat16 most of them would be lost.
    w_VD, ids = residuals
    total = jnp.zeros(w_VD.shape, jnp.float32).at[ids].add(ct.astype(jnp.float32), mode="clip")
    return total.astype(w_VD.dtype), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)


@jax.custom_vjp
def _float32_product(x_TD: jax.Array, w_DV: jax.Array) -> jax.Array:
    return jnp.einsum(
        "...D,DV->...V",
        x_TD,
        w_DV,
        precision=precision_of(x_TD.dtype),
        preferred_element_type=jnp.float32,
    )


def _product_fwd(x_TD, w_DV):
    return _float32_product(x_TD, w_DV), (x_TD, w_DV)


def _product_bwd(residuals, ct):
    # The derived transpose would multiply float32 by bfloat16, which has no fast path.
    x_TD, w_DV = residuals
    ct, precision = ct.astype(x_TD.dtype), precision_of(x_TD.dtype)
    x_ct = jnp.einsum("...V,DV->...D", ct, w_DV, precision=precision)
    return x_ct, jnp.einsum("...D,...V->DV", x_TD, ct, precision=precision)


_float32_product.defvjp(_product_fwd, _product_bwd)


class Embedding(nnx.Module):
    """The table w [padded vocabulary, D], rows split over `tensor`."""

    def __init__(self, padded_vocab: int, d_model: int, *, rngs: nnx.Rngs):
        self.w = make_normal(rngs, (padded_vocab, d_model), P(TENSOR, None))

    def __call__(self, tokens_BS: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Looks tokens up, inside the shard_map.

        Args:
            tokens_BS: int32 [B, S], ids below the vocabulary size.
            dtype: dtype of the result.

        Returns:
            [B, S, D].
        """
        w_VD = self.w[...]
        local = tokens_BS - axis_index(TENSOR) * w_VD.shape[0]
        mine = (local >= 0) & (local < w_VD.shape[0])
        x_BSD = _lookup(w_VD, jnp.where(mine, local, 0)).astype(dtype)
        return exit_parallel(jnp.where(mine[..., None], x_BSD, jnp.zeros_like(x_BSD)), TENSOR)


class Head(nnx.Module):
    """The output weights w [D, padded vocabulary], columns split over `tensor`."""

    def __init__(self, d_model: int, padded_vocab: int, *, rngs: nnx.Rngs):
        self.w = make_normal(rngs, (d_model, padded_vocab), P(None, TENSOR))


def vocabulary_logits(x_TD: jax.Array, w_DV: jax.Array, vocab_size: int) -> jax.Array:
    """This device's columns of the logits, inside the shard_map.

    Args:
        x_TD: [..., D] in the compute dtype, replicated along `tensor`.
        w_DV: [D, V local]; cast to x's dtype.
        vocab_size: ids from here on are padding and get `PADDING_LOGIT`.

    Returns:
        float32 [..., V local]; column j is id V_local · (index along `tensor`) + j.
    """
    return logits_of_entered(enter_parallel(x_TD, TENSOR), w_DV, vocab_size)


def logits_of_entered(x_TD: jax.Array, w_DV: jax.Array, vocab_size: int) -> jax.Array:
    """`vocabulary_logits` of hidden vectors that have entered the parallel region already."""
    logits_TV = _float32_product(x_TD, w_DV.astype(x_TD.dtype))
    ids_V = axis_index(TENSOR) * w_DV.shape[1] + jnp.arange(w_DV.shape[1], dtype=jnp.int32)
    return jnp.where(ids_V < vocab_size, logits_TV, jnp.float32(PADDING_LOGIT))
