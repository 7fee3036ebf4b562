"""The pages of the key-value cache: who reads and writes which, against loops over numpy arrays."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from model_support import (
    TinyMoE,
    mesh_of,
    mixed_config,
    place,
    randomize,
    shapes,
    shard_map,
    specs_of,
)

from moejax.config import AttentionConfig, LatentConfig
from moejax.errors import UserError
from moejax.model import block
from moejax.model.cache import KVCache, LayerCache, cache_specs, init_cache, init_pages
from moejax.model.cached_attention import append, attend_cached
from pallas_kernels.paged_attention import reference
from sharding.mesh import TENSOR, TOKEN_AXES, MeshShape

V, PAGE = 50, 4
BATCH = P(TOKEN_AXES, None)
LATENT = AttentionConfig(4, 4, 12, latent=LatentConfig(8, 4, 6))


def random_tables(rng, counts, width, pages):
    """Pages of their own for each row, `counts` many; behind them -1 or ids too large."""
    rows = len(counts)
    ids = rng.permutation(pages)[: rows * width].reshape(rows, width)
    none = rng.choice([-1, -7, pages, pages + 3], size=(rows, width))
    return np.where(np.arange(width) < counts[:, None], ids, none).astype(np.int32)


@pytest.mark.parametrize("with_values", [True, False])
def test_append_writes_the_rows_pages_and_nothing_else(with_values, rng):
    pages, rows, width, new = 13, 3, 4, 5
    counts = rng.integers(1, width + 1, size=rows)
    tables = random_tables(rng, counts, width, pages)
    old = rng.normal(size=(2, 2, pages, PAGE, 3)).astype(np.float32)
    k, v = rng.normal(size=(2, rows, new, 2, 3)).astype(np.float32)
    # Row 0 runs over the end of its pages, row 1 over that of the table.
    starts = np.array([counts[0] * PAGE - 2, width * PAGE - 1, 0])
    at = (starts[:, None] + np.arange(new)).astype(np.int32)

    cache = LayerCache(old[0], old[1] if with_values else None)
    got = jax.jit(append)(
        jax.tree.map(jnp.asarray, cache), k, v if with_values else None, at, tables
    )
    want = old.copy()
    for row in range(rows):
        for s, position in enumerate(at[row]):
            page = position // PAGE
            if page < counts[row]:
                want[:, :, tables[row, page], position % PAGE] = k[row, s], v[row, s]
    np.testing.assert_array_equal(got.k_MPLh, want[0])
    if with_values:
        np.testing.assert_array_equal(got.v_MPLh, want[1])
    else:
        assert got.v_MPLh is None


@pytest.mark.parametrize("together", [True, False], ids=["together", "row by row"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["grouped", "sinks", "latent"])
def test_attend_cached_reads_the_rows_text_only(kind, window, together, rng, monkeypatch):
    """All that is not the rows' text so far is no number: one touch would show."""
    if not together:
        monkeypatch.setattr(reference, "GATHERED_BYTES", 1)
    pages, width, queries, heads, h = 13, 4, 3, 4, 6
    groups = 1 if kind == "latent" else 2
    counts = np.array([rng.integers(2, width + 1), 1, rng.integers(1, width)])
    tables = random_tables(rng, counts, width, pages - 1)
    tables[tables >= pages - 1] = pages
    tables[1, 0] = tables[0, 0]  # a page of two rows
    tables[2, counts[2]] = -1  # not the last page, which is nobody's
    # Row 0 ends inside a page, row 1 with the shared one. The last token of row 2 is padding
    # without a page.
    last = np.array([rng.integers(PAGE, counts[0] * PAGE - 1), PAGE - 1, counts[2] * PAGE])
    at = (last[:, None] + np.arange(1 - queries, 1)).astype(np.int32)
    real = [queries, queries, queries - 1]

    store = np.full((2, groups, pages, PAGE, h), np.nan, np.float32)
    texts = []
    for row in 0, 1, 2:  # the shared page is drawn anew by row 1, row 0 reads it afterwards
        page, inside = np.divmod(np.arange(at[row, real[row] - 1] + 1), PAGE)
        texts.append((slice(None), slice(None), tables[row, page], inside))
        store[texts[row]] = rng.normal(size=store[texts[row]].shape)
    q = rng.normal(size=(3, queries, heads, h)).astype(np.float32)
    sinks = rng.normal(size=heads).astype(np.float32) if kind == "sinks" else None

    cache = LayerCache(jnp.asarray(store[0]), None if kind == "latent" else jnp.asarray(store[1]))

    def run(cache, q):
        return attend_cached(q, cache, at, tables, scale=0.3, window=window, sinks_N=sinks)

    got = jax.jit(run)(cache, q)
    for row, text in enumerate(texts):
        keys, values = store[text].astype(np.float64)
        values = keys if kind == "latent" else values
        for s in range(real[row]):
            first = 0 if window is None else max(0, at[row, s] - window + 1)
            span = slice(first, at[row, s] + 1)
            for n in range(heads):
                m = n // (heads // groups)
                score = np.exp(keys[m, span] @ q[row, s, n].astype(np.float64) * 0.3)
                whole = score.sum() + (0.0 if sinks is None else np.exp(np.float64(sinks[n])))
                want = score @ values[m, span] / whole
                np.testing.assert_allclose(got[row, s, n], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [None, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("scan,begins", [(False, False), (True, False), (True, True)])
def test_decoder_with_shuffled_and_shared_pages_equals_recomputing(
    scan, begins, attention, rng, monkeypatch
):
    monkeypatch.setattr(block, "MoELayer", TinyMoE)
    config = mixed_config(scan_layers=scan)
    config = config if attention is None else dataclasses.replace(config, attention=attention)
    sizes, devices = (2, 1, 2), 2
    mesh = mesh_of(*sizes)
    graphdef, state = shapes(config, MeshShape(*sizes))
    state = place(randomize(state, rng), mesh)
    rows, length, pages = 6, 12, 11  # rows and pages of all devices, of one device
    tokens = rng.integers(0, V, size=(rows, length)).astype(np.int32)
    tables = np.concatenate(
        [rng.permutation(pages)[:9].reshape(3, 3) for _ in range(devices)]
    ).astype(np.int32)
    # The second row of a device begins like the first, and takes its first page.
    tokens[1::3, :PAGE], tables[1::3, 0] = tokens[::3, :PAGE], tables[::3, 0]

    specs, vocabulary = cache_specs(config), P(TOKEN_AXES, None, TENSOR)

    def full(state, tokens):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens).hidden_BSD)

    def step(state, cache, tokens, mask):
        model = nnx.merge(graphdef, state)
        out = model(tokens, token_mask_BS=mask, cache=cache, inference=True)
        return model.logits(out.hidden_BSD), out.cache

    full = shard_map(full, mesh, (specs_of(state), BATCH), vocabulary)
    first = dataclasses.replace(specs, lengths_B=None)
    begin = shard_map(step, mesh, (specs_of(state), first, BATCH, BATCH), (vocabulary, specs))
    step = shard_map(step, mesh, (specs_of(state), specs, BATCH, BATCH), (vocabulary, specs))
    expected = np.asarray(full(state, tokens))[..., :V]

    layers = init_pages(config, pages * devices, PAGE, jnp.float32, mesh)
    done = np.zeros(rows, np.int32)
    # The row that shares a page joins when that page is there; the third has no page till then.
    pieces = [(5, [5, 0, 0] * 2), (5, [1, 3, 5] * 2), (1, [1, 1, 0] * 2), (5, [4, 2, 3] * 2)]
    for number, (width, counts) in enumerate(pieces):
        counts, given = np.array(counts, np.int32), tables.copy()
        if number == 0:
            given[1::3], given[2::3] = -1, pages
        if number == 1:
            done[1::3] = PAGE
        columns = np.arange(width)
        mask = columns < counts[:, None]
        at = np.minimum(done[:, None] + columns, length - 1)
        piece = np.where(mask, np.take_along_axis(tokens, at, 1), 0).astype(np.int32)
        cache = KVCache(layers, jnp.asarray(done), jnp.asarray(given))
        if number == 0 and begins:  # known when compiled: no page is read
            logits, cache = begin(state, dataclasses.replace(cache, lengths_B=None), piece, mask)
        else:
            logits, cache = step(state, cache, piece, mask)
        layers = cache.layers
        for row, count in enumerate(counts):
            got = np.asarray(logits)[row, :count, :V]
            want = expected[row, done[row] : done[row] + count]
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
        done = done + counts
        np.testing.assert_array_equal(cache.lengths_B, done)
        np.testing.assert_array_equal(cache.tables_BN, given)
    owned = np.zeros((devices, pages), bool)
    for row in range(rows):
        owned[row // 3, tables[row]] = True
    for group in layers.values():
        for array in jax.tree.leaves(group):
            by_page = np.asarray(array).reshape(-1, devices, pages, np.prod(array.shape[-2:]))
            np.testing.assert_array_equal(np.any(by_page, axis=(0, 3)), owned)


def test_a_step_writes_a_donated_cache_in_place(rng, monkeypatch):
    """Scanned layers too: no copy of the pages is made, however many there are."""
    monkeypatch.setattr(block, "MoELayer", TinyMoE)
    config = mixed_config(scan_layers=True)
    mesh = mesh_of()
    graphdef, state = shapes(config)
    specs = cache_specs(config)

    def step(cache, state, tokens):
        return nnx.merge(graphdef, state)(tokens, cache=cache, inference=True).cache

    run = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, specs_of(state), BATCH), out_specs=specs, check_vma=False
    )
    pages = 512
    layers = jax.eval_shape(lambda: init_pages(config, pages, PAGE, jnp.float32, mesh))
    cache = KVCache(layers, jnp.zeros(2, jnp.int32), jnp.zeros((2, 3), jnp.int32))
    compiled = jax.jit(run, donate_argnums=0).lower(cache, state, np.zeros((2, 1), np.int32))
    memory = compiled.compile().memory_analysis()
    stored = sum(4 * np.prod(a.shape) for a in jax.tree.leaves(layers))
    assert memory.alias_size_in_bytes >= stored
    assert memory.temp_size_in_bytes < stored / config.num_layers / 4


def test_a_latent_cache_is_one_array_for_all_heads():
    mesh = mesh_of(2, 1, 2)
    config = mixed_config(scan_layers=True, attention=LATENT)
    layers = init_pages(config, 6, PAGE, jnp.bfloat16, mesh)
    for name, layers_of in ("0", ()), ("1:3", (2,)):
        cache = layers[name]
        assert cache.v_MPLh is None
        assert cache.k_MPLh.shape == (1, *layers_of, 6, PAGE, 8 + 4)
        assert cache.k_MPLh.dtype == jnp.bfloat16
        shards = {s.data.shape for s in cache.k_MPLh.addressable_shards}
        assert shards == {(1, *layers_of, 3, PAGE, 12)}


@pytest.mark.parametrize("heads", [2, 4])
def test_single_tokens_row_by_row_and_in_a_window(heads, rng, monkeypatch):
    """Fewer rows at once, and only a window's pages, change no result."""
    rows, pages, width, h = 4, 23, 5, 6
    k, v = (rng.normal(size=(2, pages, PAGE, h)).astype(np.float32) for _ in range(2))
    tables = rng.permutation(pages)[: rows * width].reshape(rows, width).astype(np.int32)
    lengths = np.array([0, 1, width * PAGE, rng.integers(2, width * PAGE)], np.int32)
    q = rng.normal(size=(rows, heads, h)).astype(np.float32)

    def run(window):
        options = {"scale": 0.4, "window": window}
        found = jax.jit(partial(reference.paged_attention, **options))(q, k, v, lengths, tables)
        return np.asarray(found)

    window = 2
    whole, windowed = run(None), run(window)
    assert not whole[0].any() and whole[1:].any()
    for row in range(1, rows):  # a text that begins with its window
        page, inside = np.divmod(np.arange(max(0, lengths[row] - window), lengths[row]), PAGE)
        for n in range(heads):
            text = (n // (heads // 2), tables[row, page], inside)
            score = np.exp(k[text].astype(np.float64) @ q[row, n] * 0.4)
            want = score @ v[text] / score.sum()
            np.testing.assert_allclose(windowed[row, n], want, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(reference, "GATHERED_BYTES", 2 * 2 * 2 * width * PAGE * h * 4)
    np.testing.assert_allclose(run(None), whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(window), windowed, rtol=1e-6, atol=1e-6)


def test_init_cache_gives_each_row_a_page_of_its_device():
    cache = init_cache(mixed_config(), 6, 9, jnp.float32, mesh_of(2, 1, 2))
    assert cache.max_len == 9
    np.testing.assert_array_equal(cache.tables_BN[:, 0], [0, 1, 2, 0, 1, 2])
    assert {s.data.shape for s in cache.layers["0"].k_MPLh.addressable_shards} == {(2, 3, 9, 8)}


def test_pages_that_do_not_divide_and_empty_pages_are_refused():
    with pytest.raises(UserError, match=r"pages=3.*data×expert=2"):
        init_pages(mixed_config(), 3, PAGE, jnp.float32, mesh_of(2))
    with pytest.raises(UserError, match=r"page_len=0"):
        init_pages(mixed_config(), 4, 0, jnp.float32, mesh_of(2))
