"""Generation with the key-value cache equals recomputing."""

import itertools

import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from model_support import (
    TinyMoE,
    dense_config,
    mesh_of,
    mixed_config,
    place,
    randomize,
    shapes,
    shard_map,
    specs_of,
)

from moejax.errors import UserError
from moejax.model import block
from moejax.model.cache import cache_specs, init_cache
from sharding.mesh import TENSOR, TOKEN_AXES, MeshShape

V = 50
BATCH = P(TOKEN_AXES, None)


@pytest.fixture(autouse=True)
def tiny_moe(monkeypatch):
    monkeypatch.setattr(block, "MoELayer", TinyMoE)


@pytest.mark.parametrize("scan", [False, True])
def test_cached_generation_equals_recomputing(scan, rng):
    config = mixed_config(scan_layers=scan)
    mesh = mesh_of(2, 1, 2)
    graphdef, state = shapes(config, MeshShape(2, 1, 2))
    state = randomize(state, rng)
    state = place(state, mesh)
    batch, length = 4, 12
    tokens = rng.integers(0, V, size=(batch, length)).astype(np.int32)
    prompts = np.array([5, 1, 3, 4], np.int32)

    caches = cache_specs(config)
    vocabulary = P(TOKEN_AXES, None, TENSOR)

    def full(state, tokens):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens).hidden_BSD)

    def step(state, cache, tokens, mask):
        model = nnx.merge(graphdef, state)
        out = model(tokens, token_mask_BS=mask, cache=cache, inference=True)
        return model.logits(out.hidden_BSD), out.cache

    full = shard_map(full, mesh, (specs_of(state), BATCH), vocabulary)
    step = shard_map(step, mesh, (specs_of(state), caches, BATCH, BATCH), (vocabulary, caches))
    expected = np.asarray(full(state, tokens))[..., :V]

    cache = init_cache(config, batch, length, jnp.float32, mesh)
    assert cache.max_len == length
    done = np.zeros(batch, np.int32)
    # A ragged prefill of padded prompts, single tokens, then a ragged piece whose padding
    # runs over the end of the cache, with an empty row.
    pieces = [(5, prompts), *itertools.repeat((1, np.ones(batch, np.int32)), 4)]
    pieces.append((5, np.array([3, 0, 2, 1], np.int32)))
    for width, counts in pieces:
        columns = np.arange(width)
        mask = columns < counts[:, None]
        at = np.minimum(done[:, None] + columns, length - 1)
        piece = np.where(mask, np.take_along_axis(tokens, at, 1), 0).astype(np.int32)
        logits, cache = step(state, cache, piece, mask)
        for row, count in enumerate(counts):
            got = np.asarray(logits)[row, :count, :V]
            want = expected[row, done[row] : done[row] + count]
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        done += counts
        np.testing.assert_array_equal(cache.lengths_B, done)


def test_cache_refuses_rows_that_do_not_divide_and_too_long_a_context():
    with pytest.raises(UserError, match=r"batch=3.*data×expert=2"):
        init_cache(dense_config(), 3, 8, jnp.float32, mesh_of(2))
    with pytest.raises(UserError, match=r"max_len=17.*max_context=16"):
        init_cache(dense_config(), 2, 17, jnp.float32, mesh_of(2))
