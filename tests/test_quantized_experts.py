"""Experts with 8-bit weights: format, chunks, and the kernel for few rows against float64 numpy.

On a GPU of capability 9.0 the same tests run the compiled kernels (`make test-gpu`).
"""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp
from kernel_support import BFLOAT16, ON_GPU, layer, needs_transposes, oracle, run, wide
from oracle import relative_error

from pallas_kernels.fused_experts.activations import ACTIVATIONS
from pallas_kernels.grouped_matmul import blocks
from pallas_kernels.quantized_experts import api, convert, dequantized
from pallas_kernels.quantized_experts.chunks import list_chunks
from pallas_kernels.quantized_experts.decode import product
from pallas_kernels.quantized_experts.decode_config import DecodeConfig, choose_decode
from pallas_kernels.quantized_experts.format import (
    QuantizedMatrices,
    dequantize,
    quantize,
    quantize_rows,
)

E4M3 = ml_dtypes.float8_e4m3fn
DTYPES = {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}
BLOCK = 128


def expand(q):
    """w[..., k, n] = values[..., n, k] · scales[..., n // 128, k // 128], in float64."""
    values = np.asarray(q.values).astype(np.float64)
    n, k = values.shape[-2:]
    at_n, at_k = np.arange(n) // BLOCK, np.arange(k) // BLOCK
    scales = np.asarray(q.scales, np.float64)[..., at_n[:, None], at_k[None, :]]
    return np.swapaxes(values * scales, -1, -2)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("k,n", [(16, 32), (256, 160)])
def test_values_do_not_depend_on_the_program(rng, name, k, n):
    """Weights half way between two steps: the same bits operation by operation and compiled."""
    largest = 127 if name == "int8" else 448
    steps = rng.integers(0, largest, size=(64, k, n)) + 0.5
    steps[:, ::BLOCK, ::BLOCK] = largest
    w = jnp.asarray(steps * rng.uniform(0.1, 1, size=(64, 1, 1)), jnp.float32)
    want = quantize(w, DTYPES[name])
    got = jax.jit(lambda w: quantize(w, DTYPES[name]))(w)
    np.testing.assert_array_equal(got.scales, want.scales)
    np.testing.assert_array_equal(*(q.values.astype(jnp.float32) for q in (got, want)))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("k,n", [(256, 128), (160, 320)])
def test_quantized_matrices(rng, name, k, n):
    """Each value is within half a unit of its block's grid; zero blocks and small sizes, too."""
    w = (rng.normal(size=(2, k, n)) * np.exp(rng.normal(size=(2, 1, 1)))).astype(np.float32)
    w[0, :BLOCK, :BLOCK] = 0
    w[1, :, 0] *= 1e-30
    q = jax.jit(lambda w: quantize(w, DTYPES[name]))(w)
    blocks = (2, -(-n // BLOCK), -(-k // BLOCK))
    assert q.values.shape == (2, n, k) and q.scales.shape == blocks
    assert q.scales[0, 0, 0] == 1 and np.isfinite(q.scales).all()
    got = expand(q)
    for (e, i, j), scale in np.ndenumerate(np.asarray(q.scales, np.float64)):
        columns, rows = (slice(b * BLOCK, (b + 1) * BLOCK) for b in (i, j))
        block, error = w[e, rows, columns], np.abs(got - w)[e, rows, columns]
        if name == "int8":
            assert error.max() <= 0.5001 * scale
        else:  # 3 bits after the first, and multiples of 2⁻⁹ below the smallest normal
            assert (error <= np.maximum(np.abs(block) * 2.0**-4, scale * 2.0**-10) * 1.001).all()
        if block.any():
            most = np.abs(np.asarray(q.values).astype(np.float64)[e, columns, rows]).max()
            assert most == (127 if name == "int8" else 448)
    np.testing.assert_allclose(dequantize(q, jnp.float32), got, rtol=1e-6)
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16


def test_quantized_rows(rng):
    x = rng.normal(size=(5, 300)).astype(np.float32)
    x[2] = 0
    x[3, 256:] *= 1e6
    values, scales = quantize_rows(jnp.asarray(x))
    assert values.shape == (5, 300) and values.dtype == E4M3 and scales.shape == (5, 3)
    scale = np.repeat(np.asarray(scales, np.float64), BLOCK, axis=1)[:, :300]
    error = np.abs(np.asarray(values).astype(np.float64) * scale - x)
    assert (error <= np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10) * 1.001).all()
    assert (np.asarray(scales)[2] == 1).all()


def test_not_a_number_is_seen():
    """One in a block is in its scale, and so in all of the block; others keep theirs."""
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        for bad in (np.nan, np.inf):
            w = np.ones((128, 256), np.float32)
            w[3, 200] = bad
            q = quantize(jnp.asarray(w), dtype)
            assert np.isfinite(np.asarray(q.values).astype(np.float32)).all()
            assert np.isfinite(q.scales[0]).all() and np.isnan(q.scales[1]).all()
            back = np.asarray(dequantize(q, jnp.float32))
            assert np.isnan(back[:, 128:]).all() and np.allclose(back[:, :128], 1)
    values, scales = quantize_rows(jnp.ones((2, 256)).at[1, 3].set(jnp.nan))
    assert np.isfinite(np.asarray(values).astype(np.float32)).all()
    assert np.array_equal(np.isnan(scales), [[False, False], [True, False]])
    with pytest.raises(ValueError, match="dtype=int4: quantized values are int8 or float8_e4m3fn"):
        quantize(jnp.zeros((128, 128)), jnp.int4)


def test_bits_of_e4m3_become_bfloat16():
    """What the registers do, on all values but NaN, which `quantize` has in scales only."""
    byte = np.arange(256, dtype=np.uint32)
    for spread in convert.SPREAD:  # prmt: nibbles name bytes, 4 is a zero
        assert [spread >> 4 * i & 0xF for i in (0, 2)] == [4, 4]
    assert [s >> 4 * i & 0xF for s in convert.SPREAD for i in (1, 3)] == [0, 1, 2, 3]
    word = byte << 8 | byte << 24
    moved = (word >> 4) & convert.REST | word & convert.SIGN
    rebias = np.array([convert.REBIAS], np.uint32).view(BFLOAT16).astype(np.float64)
    halves = moved.astype(np.uint32).view(BFLOAT16).astype(np.float64).reshape(256, 2) * rebias
    want = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(halves[number], np.stack([want, want], 1)[number])


@pytest.mark.parametrize("columns", [8, 32, 64])
def test_chunks(rng, columns):
    counts = rng.permutation([0, 1, 130, 8, 0, 64, int(rng.integers(2, 100))])
    sizes = -(-counts // 128) * 128
    starts = np.cumsum(sizes) - sizes
    wanted = np.zeros(sizes.sum() + 128, bool)
    for start, count in zip(starts, counts):
        wanted[start : start + count] = True
    chunks = jax.jit(
        lambda w, s: list_chunks(w, s, assignments=int(counts.sum()), columns=columns)
    )(wanted, sizes.astype(np.int32))
    want = [
        (s, (starts[s] + done) // columns, min(columns, count - done))
        for s, count in enumerate(counts)
        for done in range(0, count, columns)
    ]
    (count,) = chunks.count
    assert count == len(want) <= chunks.slot.size
    got = np.stack([chunks.slot, chunks.first, chunks.wanted], 1)
    np.testing.assert_array_equal(got[:count], want)
    assert ((got[count:, 1] + 1) * columns <= wanted.size).all()


def quantized_layer(rng, name, **shapes):
    """Inputs, with weights that the oracle reads as float64."""
    inputs = layer(rng, **shapes)
    w_in = quantize(jnp.swapaxes(jnp.asarray(inputs["w_in"]), 1, 2), DTYPES[name])
    w_out = quantize(jnp.asarray(inputs["w_out"]), DTYPES[name])
    inputs |= {"w_in": np.swapaxes(expand(w_in), 1, 2), "w_out": expand(w_out)}
    return inputs, w_in, w_out


def call(inputs, w_in, w_out, **options):
    maps = (inputs["place"], inputs["copy"], inputs["sizes"])

    def function(x, w_in, w_out, scores):
        return api.quantized_experts(x, w_in, w_out, scores, *maps, **options)

    return run(function, inputs["x"], w_in, w_out, inputs["scores"])


@needs_transposes
@pytest.mark.parametrize(
    "name,shapes,activation",
    [
        ("e4m3", dict(slots=3, tokens=40, copies=2, d_model=128, hidden=256, parts=2), "geglu"),
        ("e4m3", dict(slots=2, tokens=3, copies=1, d_model=128, hidden=128, parts=1), "relu2"),
        ("e4m3", dict(slots=2, tokens=9, copies=2, d_model=128, hidden=128, parts=2), "swiglu_oai"),
    ],
)
def test_few_rows(rng, name, shapes, activation):
    inputs, w_in, w_out = quantized_layer(rng, name, **shapes)
    out = call(inputs, w_in, w_out, activation=activation, backend="mosaic_gpu")
    want = oracle(inputs, inputs["x"], activation)[0]
    assert np.linalg.norm(out - want) <= 5e-3 * np.linalg.norm(want)


@needs_transposes
@pytest.mark.parametrize("name", DTYPES)
def test_many_rows(rng, monkeypatch, name):
    """All matrices converted first: as near as the kernel that converts while it multiplies."""
    shapes = dict(slots=3, tokens=40, copies=2, d_model=128, hidden=128, parts=2)
    inputs, w_in, w_out = quantized_layer(rng, name, **shapes)
    monkeypatch.setattr(dequantized, "MANY_ROWS", 80 // 3)
    monkeypatch.setattr(api, "product", None)  # the other way is not gone
    out = call(inputs, w_in, w_out, activation="swiglu", backend="mosaic_gpu")
    want = oracle(inputs, inputs["x"], "swiglu")[0]
    assert np.linalg.norm(out - want) <= 8e-3 * np.linalg.norm(want)


@needs_transposes
@pytest.mark.parametrize(
    "cut",
    [
        dict(columns=8, row_parts=1, phases=1),
        dict(columns=16, row_parts=2, phases=2),
        dict(columns=64, stages=2),
    ],
)
@pytest.mark.parametrize("gather", [True, False])
def test_cuts_of_a_product(rng, cut, gather):
    """Whatever the sizes, with an odd number of steps; places that hold no row stay as they are."""
    wanted = np.zeros(384, bool)
    wanted[:3] = wanted[256 : 256 + 70] = True
    sizes = np.array([128, 0, 256], np.int32) * [1, 1, 0] + [0, 128, 128]
    slot = np.where(np.arange(384) < 128, 0, 2)
    w = quantize(jnp.asarray(rng.normal(size=(3, 2, 384, 128)), jnp.float32), jnp.int8)
    x = rng.normal(size=(20, 384)).astype(BFLOAT16)
    index = np.where(wanted, rng.integers(0, 20, 384), 20).astype(np.int32)

    def function(x, w):
        config = choose_decode(73, 3, 2, **cut)
        chunks = list_chunks(
            jnp.asarray(wanted),
            jnp.asarray(sizes, jnp.int32),
            assignments=73,
            columns=config.columns,
        )
        rows = x if gather else x.at[index].get(mode="fill", fill_value=0)
        return product(
            rows,
            w,
            chunks,
            jnp.asarray(index) if gather else None,
            places=384,
            finish=lambda parts: parts[0] - 2.0 * parts[1],
            name="product",
            config=config,
        )

    out = run(function, x, w)
    w, (x,) = expand(w), wide(x)
    w = w[:, 0] - 2 * w[:, 1]
    want = np.einsum("ak,akn->an", x[index[wanted]], w[slot[wanted]])
    assert relative_error(out[wanted], want) < 5e-3


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("rows", ["bfloat16", "float8"])
@pytest.mark.parametrize("name", DTYPES)
def test_in_float32(rng, name, rows, backend):
    """Float8 rows cost what their rounding costs."""
    shapes = dict(slots=3, tokens=12, copies=2, d_model=160, hidden=72, parts=2)
    inputs, w_in, w_out = quantized_layer(rng, name, **shapes)
    inputs["x"] = inputs["x"].astype(np.float32)
    out = call(inputs, w_in, w_out, activation="swiglu", rows=rows, backend=backend)
    error = relative_error(out, oracle(inputs, inputs["x"], "swiglu")[0])
    assert error < 2e-6 if rows == "bfloat16" else 0.01 < error < 0.06


def test_blocks_in_batches(rng, monkeypatch):
    """Where copies of all blocks' matrices were too much."""
    shapes = dict(slots=3, tokens=24, copies=2, d_model=160, hidden=72, parts=2)
    inputs, w_in, w_out = quantized_layer(rng, "int8", **shapes)
    inputs["x"] = inputs["x"].astype(np.float32)
    how = {"activation": "swiglu", "rows": "bfloat16", "backend": "blocked"}
    whole = call(inputs, w_in, w_out, **how)
    monkeypatch.setattr(blocks, "MOST_COPIED", 2 * 3 * 160 * 72 * 4)
    some = call(inputs, w_in, w_out, **how)
    assert relative_error(some, whole) < 1e-6
    monkeypatch.setattr(blocks.lax, "map", None)
    with pytest.raises(TypeError, match="not callable"):  # so it was in batches
        call(inputs, w_in, w_out, **how)


def abstract(slots, tokens, copies, d_model, hidden, parts, dtype):
    shape = jax.ShapeDtypeStruct
    places = (tokens * copies // 128 + slots) * 128

    def matrices(*lead, n, k):
        return QuantizedMatrices(
            shape((*lead, n, k), dtype),
            shape((*lead, -(-n // BLOCK), -(-k // BLOCK)), jnp.float32),
        )

    return (
        shape((tokens, d_model), jnp.bfloat16),
        matrices(slots, parts, n=hidden, k=d_model),
        matrices(slots, n=d_model, k=hidden),
        shape((tokens, copies), jnp.float32),
        shape((tokens, copies), jnp.int32),
        shape((places,), jnp.int32),
        shape((slots,), jnp.int32),
    )


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    "shapes,activation",
    [((8, 1, 2, 4096, 14336, 2), "swiglu"), ((128, 256, 8, 2048, 768, 2), "swiglu")]
    + [((4, 1024, 2, 256, 384, 1), "gelu"), ((4, 64, 2, 256, 128, 2), "swiglu_oai")],
)
def test_lowering_for_cuda(name, shapes, activation):
    def function(*args):
        return api.quantized_experts(*args, activation=activation, backend="mosaic_gpu")

    exported = jax.export.export(jax.jit(function), platforms=["cuda"])
    text = exported(*abstract(*shapes, DTYPES[name])).mlir_module()
    assert text.count("quantized_up") and text.count("quantized_down")


def test_many_rows_take_the_kernels_for_bfloat16():
    shapes = (2, 768, 2, 256, 128, 2)  # 768 assignments a slot

    def function(*args):
        return api.quantized_experts(*args, activation="swiglu", backend="mosaic_gpu")

    exported = jax.export.export(jax.jit(function), platforms=["cuda"])
    text = exported(*abstract(*shapes, jnp.int8)).mlir_module()
    assert "quantized_up" not in text and "experts_up" in text


def test_explanations():
    def case(**changes):
        fields = dict(d_model=256, hidden=128, activation="swiglu")
        return api.Case(**(fields | dict(dtype=jnp.bfloat16, weights=jnp.int8) | changes))

    if not ON_GPU:
        assert api.explain(case()) == (
            "quantized_experts: blocked; not mosaic_gpu: the device is 'cpu', no NVIDIA GPU of "
            "capability 9.0"
        )
    for changes, reason in (
        (dict(d_model=192), "d_model=192 is no multiple of 128"),
        (dict(hidden=64), "hidden=64 is no multiple of 128"),
        (dict(dtype=jnp.float32), "operands are float32, not bfloat16"),
        (dict(activation="mish"), "activation 'mish' is none of swiglu"),
        (dict(rows="float8"), "weights are int8, which float8 rows are not multiplied with"),
        (dict(rows="int8"), "rows='int8' is neither 'bfloat16' nor 'float8'"),
        (dict(weights=jnp.bfloat16), "weights are bfloat16, which bfloat16 rows are not"),
    ):
        assert reason in api.refusal("mosaic_gpu", case(**changes), forced=True)
    assert api.refusal("mosaic_gpu", case(), forced=True) is None
    assert sorted(ACTIVATIONS) == ["geglu", "gelu", "relu2", "swiglu", "swiglu_oai"]


def test_gradients_are_refused(rng):
    shapes = dict(slots=2, tokens=3, copies=1, d_model=128, hidden=128, parts=2)
    inputs, w_in, w_out = quantized_layer(rng, "int8", **shapes)
    maps = (inputs["scores"], inputs["place"], inputs["copy"], inputs["sizes"])

    def loss(x):
        out = api.quantized_experts(x, w_in, w_out, *maps, activation="swiglu", backend="reference")
        return jnp.sum(out.astype(jnp.float32))

    with pytest.raises(NotImplementedError, match="quantized_experts has no gradient"):
        jax.grad(loss)(jnp.asarray(inputs["x"]))


def test_nothing_to_compute():
    x, w_in, w_out, scores, place, copy, sizes = (
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), array)
        for array in abstract(1, 0, 2, 128, 128, 2, jnp.int8)
    )
    out = api.quantized_experts(x, w_in, w_out, scores, place, copy, sizes, activation="swiglu")
    assert out.shape == (0, 128) and out.dtype == jnp.bfloat16


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="columns=24 is none of"):
        DecodeConfig(24, 1, 2, 4, 1)
    with pytest.raises(ValueError, match="phases=3 is none of"):
        DecodeConfig(8, 1, 3, 4, 1)
    with pytest.raises(ValueError, match="lag=4 with stages=2: must be from 1 to 2"):
        DecodeConfig(8, 1, 2, 2, 1, lag=4)
    for assignments, slots, columns in ((2, 8, 8), (32, 8, 16), (128, 8, 32), (10**6, 8, 64)):
        assert choose_decode(assignments, slots, 2).columns == columns
