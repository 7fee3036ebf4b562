"""Cross-entropy over a split vocabulary, whole and in chunks, against float64."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from model_support import check_replicas, mesh_of, shard_map

from moejax.model.embedding import PADDING_LOGIT, vocabulary_logits
from moejax.model.loss import hidden_nll, summed_nll, token_nll

B, S, D, V, V_PAD = 2, 7, 16, 50, 64


def oracle(logits, targets):
    """nll and softmax minus one-hot, float64."""
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    total = np.exp(logits - top).sum(-1, keepdims=True)
    one_hot = np.arange(logits.shape[-1]) == targets[..., None]
    nll = (np.log(total) + top)[..., 0] - np.sum(np.where(one_hot, logits, 0), -1)
    return nll, np.exp(logits - top) / total - one_hot


@pytest.mark.parametrize("tensor", [1, 4])
def test_token_nll(tensor, rng):
    logits = rng.normal(size=(B, S, V_PAD)).astype(np.float32) * 3
    logits[..., V:] = PADDING_LOGIT
    logits[0, 0, 5] = 1e4  # an exponential that overflows unless the largest is taken off
    targets = rng.integers(0, V, size=(B, S)).astype(np.int32)
    targets[0, :2] = 5, V - 1
    weights = rng.normal(size=(B, S)).astype(np.float32)

    def local(logits, targets, weights):
        def share(logits):
            nll = token_nll(logits, targets)
            return jnp.sum(nll * weights), nll

        (_, nll), grad = jax.value_and_grad(share, has_aux=True)(logits)
        return nll, grad

    split = P(None, None, "tensor")
    run = shard_map(local, mesh_of(tensor=tensor), (split, P(), P()), (P(), split))
    nll, grad = run(logits, targets, weights)
    check_replicas(nll)
    expected_nll, expected_grad = oracle(logits, targets)
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(grad, expected_grad * weights[..., None], atol=2e-6)
    assert not np.any(np.asarray(grad)[..., V:])


def hidden_case(tensor, chunk, hidden, w, targets, weights):
    """nll, gradients of hidden and weights, through `hidden_nll`."""

    def local(hidden, w, targets, weights):
        def share(hidden, w):
            nll = hidden_nll(hidden, w, targets, vocab_size=V, chunk=chunk)
            return jnp.sum(nll * weights), nll

        (_, nll), grads = jax.value_and_grad(share, (0, 1), has_aux=True)(hidden, w)
        return nll, *grads

    split = P(None, "tensor")
    run = shard_map(local, mesh_of(tensor=tensor), (P(), split, P(), P()), (P(), P(), split))
    nll, d_hidden, d_w = run(hidden, w, targets, weights)
    check_replicas((nll, d_hidden))
    return nll, d_hidden, d_w


@pytest.mark.parametrize(("tensor", "chunk"), [(1, None), (2, 4), (4, 14)])
def test_hidden_nll_in_chunks(tensor, chunk, rng):
    hidden = rng.normal(size=(B, S, D)).astype(np.float32)
    w = rng.normal(size=(D, V_PAD)).astype(np.float32)
    targets = rng.integers(0, V, size=(B, S)).astype(np.int32)
    weights = rng.normal(size=(B, S)).astype(np.float32)
    nll, d_hidden, d_w = hidden_case(tensor, chunk, hidden, w, targets, weights)

    x64, w64 = hidden.astype(np.float64), w.astype(np.float64)
    expected, d_logits = oracle(np.where(np.arange(V_PAD) < V, x64 @ w64, -np.inf), targets)
    d_logits *= weights[..., None]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_hidden, d_logits @ w64.T, atol=1e-4)
    np.testing.assert_allclose(d_w, np.einsum("bsd,bsv->dv", x64, d_logits), atol=1e-4)


def summed_case(tensor, chunk, hidden, w, targets, scale, factor=1.0):
    """The sum and its gradients, times a factor, through `summed_nll`."""

    def local(hidden, w, targets):
        def share(hidden, w):
            total = summed_nll(hidden, w, targets, vocab_size=V, scale=scale, chunk=chunk)
            return factor * total

        alone = summed_nll(hidden, w, targets, vocab_size=V, scale=scale, chunk=chunk)
        total, grads = jax.value_and_grad(share, (0, 1))(hidden, w)
        return alone, total, *grads

    split = P(None, "tensor")
    run = shard_map(local, mesh_of(tensor=tensor), (P(), split, P()), (P(), P(), P(), split))
    alone, total, d_hidden, d_w = run(hidden, w, targets)
    check_replicas((alone, total, d_hidden))
    np.testing.assert_allclose(alone * factor, total, rtol=1e-6)
    return total, d_hidden, d_w


@pytest.mark.parametrize(
    ("tensor", "chunk", "factor"), [(1, None, 1.0), (2, 4, -2.5), (4, 20, 1.0)]
)
def test_the_sum_has_its_gradients_from_the_forward(tensor, chunk, factor, rng):
    hidden = rng.normal(size=(B, S, D)).astype(np.float32)
    w = rng.normal(size=(D, V_PAD)).astype(np.float32)
    targets = rng.integers(0, V, size=(B, S)).astype(np.int32)
    total, d_hidden, d_w = summed_case(tensor, chunk, hidden, w, targets, 0.25, factor)

    x64, w64 = hidden.astype(np.float64), w.astype(np.float64)
    nll, d_logits = oracle(np.where(np.arange(V_PAD) < V, x64 @ w64, -np.inf), targets)
    d_logits *= 0.25 * factor
    np.testing.assert_allclose(total, 0.25 * factor * nll.sum(), rtol=1e-5)
    np.testing.assert_allclose(d_hidden, d_logits @ w64.T, atol=1e-4)
    np.testing.assert_allclose(d_w, np.einsum("bsd,bsv->dv", x64, d_logits), atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 100])
def test_the_sum_in_bfloat16_is_as_good_as_the_tokens(chunk, rng):
    hidden = jnp.asarray(rng.normal(size=(1, 512, D)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(D, V_PAD)) * 0.3, jnp.bfloat16)
    targets = rng.integers(0, V, size=(1, 512)).astype(np.int32)
    _, *sums = summed_case(1, chunk, hidden, w, targets, 1 / 512)
    _, *tokens = hidden_case(1, chunk, hidden, w, targets, np.full((1, 512), 1 / 512, np.float32))
    x64, w64 = np.asarray(hidden, np.float64), np.asarray(w, np.float64)
    _, d_logits = oracle(np.where(np.arange(V_PAD) < V, x64 @ w64, -np.inf), targets)
    wanted = d_logits @ w64.T / 512, np.einsum("bsd,bsv->dv", x64, d_logits) / 512
    for got, peer, want in zip(sums, tokens, wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        error, other = (np.linalg.norm(np.asarray(a, np.float64) - want) for a in (got, peer))
        assert error < 1.1 * other and error < 0.01 * np.linalg.norm(want)


def test_chunks_of_bfloat16_sum_the_weights_gradient_in_float32(rng):
    tokens = 512
    hidden = jnp.asarray(rng.normal(size=(1, tokens, D)) + 1.0, jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(D, V_PAD)) * 0.1, jnp.bfloat16)
    targets = np.zeros((1, tokens), np.int32)  # all alike: a bfloat16 sum of 256 terms stalls
    weights = np.ones((1, tokens), np.float32)
    _, _, d_w = hidden_case(1, 2, hidden, w, targets, weights)
    assert d_w.dtype == jnp.bfloat16
    x64, w64 = np.asarray(hidden, np.float64), np.asarray(w, np.float64)
    _, d_logits = oracle(np.where(np.arange(V_PAD) < V, x64 @ w64, -np.inf), targets)
    expected = np.einsum("bsd,bsv->dv", x64, d_logits)
    error = np.asarray(d_w, np.float64) - expected
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(expected)


def test_padding_ids_have_no_probability(rng):
    hidden = rng.normal(size=(3, D)).astype(np.float32)
    w = rng.normal(size=(D, V_PAD)).astype(np.float32)

    def local(hidden, w):
        return vocabulary_logits(hidden, w, V)

    split = P(None, "tensor")
    logits = shard_map(local, mesh_of(tensor=2), (P(), split), split)(hidden, w)
    assert np.all(np.asarray(logits)[:, V:] == np.float32(PADDING_LOGIT))
    np.testing.assert_allclose(logits[:, :V], (hidden @ w)[:, :V], atol=1e-4)
