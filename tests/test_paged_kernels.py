"""Attention of single tokens to pages: every backend against loops in float64, and lowered.

On a CPU the kernels are interpreted. Where the TPU compiler is installed (the package libtpu) the
one for TPUs is compiled too.
"""

import dataclasses
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import SingleDeviceSharding
from kernel_support import BFLOAT16, ON_GPU
from model_support import mixed_config

from moejax.config import AttentionConfig, LatentConfig
from moejax.model.cache import LayerCache
from moejax.model.cached_attention import (
    append,
    attend_cached,
    explain_decode,
    flatten_layers,
    layer_tables,
)
from pallas_kernels.interpreting import interpreted
from pallas_kernels.paged_attention import api, mosaic_tpu, triton

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
TARGETS = {"mosaic_tpu": ("tpu", "tpu_custom_call"), "triton": ("cuda", "xla.gpu.triton")}


def context(backend):
    compiled = backend == "reference" or (ON_GPU and backend == "triton")
    return nullcontext() if compiled else interpreted()


def problem(rng, heads, kv_heads, h, page_len, table, dtype=BFLOAT16, behind=1e3):
    """Queries, keys, values, lengths, tables; what is not the rows' text is no number.

    Rows see all their pages, nothing, one position, whole pages, a part of one; with room for more,
    and without pages. What is behind a row's text in its last page is `behind`.
    """
    whole = table * page_len
    within = int(rng.integers(1, page_len))
    last = int(rng.integers(table)) * page_len
    lengths = np.array([whole, 0, 1, page_len, last + within, 0, whole - within], np.int32)
    held = -(-lengths // page_len)
    held[5] = 1  # a page and no text
    rows = len(lengths)
    pages = rows * table + 3
    ids = rng.permutation(pages)[: rows * table].reshape(rows, table)
    none = rng.choice([-1, -7, pages, pages + 3], size=(rows, table))
    tables = np.where(np.arange(table) < held[:, None], ids, none).astype(np.int32)
    asked = lengths.copy()
    asked[1] = 5  # of which no page holds any

    store = np.full((2, kv_heads, pages, page_len, h), np.nan, np.float32)
    for row, length in enumerate(lengths):
        store[:, :, tables[row, : held[row]]] = behind
        page, inside = np.divmod(np.arange(length), page_len)
        text = (slice(None), slice(None), tables[row, page], inside)
        store[text] = rng.normal(size=store[text].shape)
    q = rng.normal(size=(rows, heads, h)).astype(dtype)
    return (q, *store.astype(dtype), asked, tables), lengths


def exact(q, k, v, lengths, tables, *, scale, window=None, sinks=None):
    """Loops over rows and heads, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        page, inside = np.divmod(np.arange(first, length), k.shape[2])
        for n in range(q.shape[1]):
            m = n // (q.shape[1] // len(k))
            keys, values = (a[m, tables[row, page], inside] for a in (k, v))
            score = np.exp(keys @ q[row, n] * scale)
            sink = 0.0 if sinks is None else np.exp(np.float64(sinks[n]))
            if length:
                out[row, n] = score @ values / (score.sum() + sink)
    return out


def run(backend, arrays, **options):
    def function(*arrays):
        return api.paged_attention(*arrays, backend=backend, **options)

    with context(backend):
        return np.asarray(jax.jit(function)(*arrays), np.float64)


# heads, key-value heads, width, positions of a page, pages of a table
SIZES = {
    "mosaic_tpu": [(4, 2, 128, 16, 5), (16, 1, 128, 64, 9), (4, 4, 256, 32, 3)],
    "triton": [(4, 2, 16, 16, 5), (24, 1, 64, 8, 9), (4, 4, 128, 64, 3), (8, 2, 32, 2, 7)],
}
KERNELS = [(backend, sizes) for backend in SIZES for sizes in SIZES[backend]]


@pytest.mark.parametrize(("backend", "sizes"), KERNELS, ids=str)
def test_kernels_equal_float64(backend, sizes, rng):
    """No page of another row is touched, and rows that see nothing give zeros."""
    arrays, lengths = problem(rng, *sizes)
    scale = 1.3 * sizes[2] ** -0.5
    want = exact(*arrays[:3], lengths, arrays[4], scale=scale)
    got = run(backend, arrays, scale=scale)
    assert not got[[1, 5]].any()
    for row in np.flatnonzero(lengths):
        error = np.linalg.norm(got[row] - want[row]) / np.linalg.norm(want[row])
        assert error < 1e-2, (row, error)


def test_a_row_is_split_over_blocks_of_the_grid(rng, monkeypatch):
    monkeypatch.setattr(triton, "sm_count", lambda: 100)
    monkeypatch.setattr(triton, "POSITIONS", 64)
    sizes = (4, 2, 32, 16, 21)
    assert triton.splits(7 * 2, 21 * 16) == 4
    arrays, lengths = problem(rng, *sizes)
    want = exact(*arrays[:3], lengths, arrays[4], scale=0.2)
    got = run("triton", arrays, scale=0.2)
    assert not got[[1, 5]].any()
    for row in np.flatnonzero(lengths):
        assert np.linalg.norm(got[row] - want[row]) < 1e-2 * np.linalg.norm(want[row]), row


@pytest.mark.parametrize("window", [None, 7], ids=["all", "window"])
@pytest.mark.parametrize("kind", ["grouped", "sinks", "latent"])
def test_reference_equals_float64(kind, window, rng):
    """It looks at nothing behind a row's length, either."""
    (q, k, v, asked, tables), lengths = problem(
        rng, 6, 1 if kind == "latent" else 2, 5, 3, 4, np.float32, behind=np.nan
    )
    sinks = rng.normal(size=6).astype(np.float32) if kind == "sinks" else None
    values = None if kind == "latent" else v
    got = run("reference", (q, k, values, asked, tables), scale=0.7, window=window, sinks_N=sinks)
    want = exact(
        q, k, k if values is None else v, lengths, tables, scale=0.7, window=window, sinks=sinks
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", TARGETS)
def test_a_cached_token_is_served_by_the_kernel(backend, rng, monkeypatch):
    """As on a device that has it: the kernel is chosen, and gives what the twin gives."""
    module = api._KERNELS[backend]
    refusal = module.device_refusal
    q, k, v = (
        rng.normal(size=s).astype(BFLOAT16) for s in [(2, 1, 4, 128), *[(2, 5, 16, 128)] * 2]
    )
    at = np.array([[20], [3]], np.int32)
    tables = np.array([[4, 1, -1], [2, -1, -1]], np.int32)

    def attend(q, k, v):
        return attend_cached(q, LayerCache(k, v), at, tables, scale=0.1)

    twin = np.asarray(jax.jit(attend)(q, k, v), np.float32)
    calls = []
    kernel = module.paged_attention
    monkeypatch.setattr(module, "paged_attention", lambda *a: calls.append(a) or kernel(*a))
    monkeypatch.setattr(module, "device_refusal", lambda dtype, forced: refusal(dtype, forced=True))
    with context(backend):
        got = np.asarray(jax.jit(lambda *a: attend(*a))(q, k, v), np.float32)
    assert len(calls) == 1
    np.testing.assert_allclose(got, twin, rtol=2e-2, atol=2e-2)


def operands(page_len=64):
    shape = jax.ShapeDtypeStruct
    pages = shape((8, 500, page_len, 128), jnp.bfloat16)
    q = shape((16, 32, 128), jnp.bfloat16)
    return q, pages, pages, shape((16,), jnp.int32), shape((16, 40), jnp.int32)


def on(platform):
    """What newer versions of JAX want to know of a GPU that is not there."""
    if platform == "tpu" or ON_GPU or not hasattr(jax.sharding, "AbstractDevice"):
        return nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), axis_types=(), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("page_len", [16, 64])
@pytest.mark.parametrize("backend", TARGETS)
def test_lowering(backend, page_len):
    platform, target = TARGETS[backend]

    def function(*arrays):
        return api.paged_attention(*arrays, scale=0.1, backend=backend)

    with on(platform):
        lowered = jax.jit(function).trace(*operands(page_len)).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count(f"@{target}") + lowered.as_text().count(f"@__gpu${target}") == 1


def test_compiling_for_tpus_moves_no_pages(monkeypatch):
    """Scanned layers write into one store in place, and the kernel reads it there."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    here = SingleDeviceSharding(topology.devices[0])
    layers, pages = 3, 500
    shape = jax.ShapeDtypeStruct
    stored = shape((8, layers, pages, 64, 128), jnp.bfloat16)

    def step(cache, q, k, at, tables):
        def layer(carry, index):
            q, pages_of_all = carry
            mine = layer_tables(tables, index, pages)
            pages_of_all = append(pages_of_all, k, k, at, mine)
            arrays = (q, pages_of_all.k_MPLh, pages_of_all.v_MPLh, at[:, 0] + 1, mine)
            q = api.paged_attention(*arrays, scale=0.1, backend="mosaic_tpu")
            return (q, pages_of_all), None

        carry = (q, flatten_layers(cache))
        (q, new), _ = lax.scan(layer, carry, jnp.arange(layers, dtype=jnp.int32))
        return jax.tree.map(lambda new, old: new.reshape(old.shape), new, cache), q

    program = jax.jit(step, donate_argnums=0, in_shardings=here, out_shardings=here)
    q, _, _, _, tables = operands()
    new = shape((16, 1, 8, 128), jnp.bfloat16)
    at = shape((16, 1), jnp.int32)
    compiled = program.lower(LayerCache(stored, stored), q, new, at, tables).compile()
    assert "tpu_custom_call" in compiled.as_text()
    memory, size = compiled.memory_analysis(), 2 * stored.size
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < size / layers / 4


FITS = api.Case(16, 32, 8, 128, 64, 40, jnp.bfloat16, jnp.bfloat16)


def test_refusals():
    both = ("mosaic_tpu", "triton")
    for backend in api.BACKENDS:
        assert api.refusal(backend, FITS, forced=True) is None
    for changes, backends, reason in (
        ({"values": False}, both, "no values beside its keys"),
        ({"sinks": True}, both, "heads have sinks"),
        ({"window": 100}, both, "a window of 100 of up to 2560 positions"),
        ({"cache_dtype": jnp.float32}, both, "queries are bfloat16, the cache is float32"),
        ({"dtype": jnp.float32, "cache_dtype": jnp.float32}, both, "float32, not bfloat16"),
        ({"head_dim": 64}, ("mosaic_tpu",), "head_dim=64 is no multiple of 128"),
        ({"page_len": 8}, ("mosaic_tpu",), "page_len=8 is no multiple of 16"),
        ({"page_len": 1024}, ("mosaic_tpu",), "more than the 512 positions"),
        ({"rows": 2**12}, ("mosaic_tpu",), "4096 tables of 40 pages"),
        ({"head_dim": 96}, ("triton",), "head_dim=96 is no power of 2"),
        ({"page_len": 48}, ("triton",), "page_len=48 is no power of 2"),
        ({"head_dim": 8}, ("triton",), "head_dim=8 is less than 16"),
        ({"page_len": 256}, ("triton",), "a page of 256 × 128 numbers"),
    ):
        case = dataclasses.replace(FITS, **changes)
        assert api.refusal("reference", case) is None
        for backend in backends:
            assert reason in api.refusal(backend, case, forced=True), (backend, changes)
    assert api.refusal("triton", dataclasses.replace(FITS, window=2560), forced=True) is None


def test_a_refusal_by_name_says_why(rng):
    (q, k, v, *rest), _ = problem(rng, 4, 2, 24, 16, 3)
    with pytest.raises(NotImplementedError, match="triton: head_dim=24 is no power of 2"):
        api.paged_attention(q, k, v, *rest, scale=1.0, backend="triton")
    with pytest.raises(NotImplementedError, match="unknown backend 'cudnn'; there are mosaic_tpu"):
        api.paged_attention(q, k, v, *rest, scale=1.0, backend="cudnn")


def test_without_the_library_the_backend_refuses(monkeypatch):
    monkeypatch.setattr(triton, "_library", lambda: None)
    assert "JAX does not have the kernel" in api.refusal("triton", FITS, forced=True)


@pytest.mark.skipif(ON_GPU, reason="is about a CPU")
def test_explain():
    device = jax.devices()[0].device_kind
    assert api.explain(FITS) == (
        f"paged_attention: reference; not mosaic_tpu: the device is {device!r}, no TPU; "
        f"not triton: the device is {device!r}, no NVIDIA GPU of capability 8.0 or more"
    )


def test_explain_decode_has_a_line_for_each_kind_of_layer(monkeypatch):
    monkeypatch.setattr(triton, "device_refusal", lambda dtype, forced: None)
    config = mixed_config(compute_dtype="bfloat16", attention=AttentionConfig(8, 4, 32))
    sizes = {"rows": 4, "table": 8, "page_len": 16}
    (line,) = explain_decode(config, **sizes, tensor=2)
    assert line.startswith("paged_attention: triton; not mosaic_tpu: head_dim=32")
    windows = dataclasses.replace(config, window_by_layer=(0, 100, 0, 100))
    full, window = explain_decode(windows, **sizes)
    assert full == line
    assert window.startswith("paged_attention: reference;")
    assert "not triton: a window of 100 of up to 128 positions" in window
    latent = AttentionConfig(4, 4, 12, latent=LatentConfig(8, 4, 6))
    (line,) = explain_decode(dataclasses.replace(config, attention=latent), **sizes, tensor=2)
    assert "not triton: the cache has no values beside its keys" in line


def test_blocks_of_pages():
    assert mosaic_tpu.pages_of_block(64, 40) == 8
    assert mosaic_tpu.pages_of_block(16, 5) == 5
    assert triton.pages_of_block(128, 16) == 4
    assert triton.pages_of_block(128, 128) == 1
    assert triton.pages_of_block(1024, 1) == 16  # a product has no fewer positions
