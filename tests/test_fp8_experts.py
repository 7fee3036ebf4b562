"""The e4m3 experts for many rows: interpreted on a CPU against float64 numpy, lowered for CUDA.

On a GPU of capability 9.0 the same tests run the compiled kernels (`make test-gpu`).
"""

from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp
from kernel_support import ON_GPU, distinct_ids, draw, needs_transposes, padded_layout, run
from oracle import relative_error

from pallas_kernels.quantized_experts import prefill
from pallas_kernels.quantized_experts.format import QuantizedMatrices, quantize, quantize_rows
from pallas_kernels.quantized_experts.promoted import PromotedConfig

E4M3 = ml_dtypes.float8_e4m3fn
PADDED = BLOCK = 128
SMS = 132 if ON_GPU else 2
# e4m3 has 3 bits after the first: half a unit is 2⁻⁴ of a value, and 2⁻¹⁰ where it is subnormal.
HALF_UNIT, HALF_LEAST = 2.0**-4, 2.0**-10
# Of values spread over a binade, rms of the rounding over rms of the values: 2⁻³/√12 / √(7/3).
NOISE = 2.0**-3 / np.sqrt(12) / np.sqrt(7 / 3)
# A GPU adds up products of e4m3 with about 14 bits between promotions (arXiv 2412.19437 §3.3.2):
# hidden values are that uncertain before they are rounded to e4m3, and more of them flip.
UNCERTAIN = 1e-3 if ON_GPU else 1e-5
# Of y and of the result: rms 2⁻⁸/√12 each, and flips of hidden values.
BF16_ROUNDINGS = 5e-3 if ON_GPU else 3e-3
VARIANTS = [{}, {"share_rows": True}] + [{"zeroed": True}, {"pairs": True}] * ON_GPU


def config(**options):
    return PromotedConfig(**{"sms": SMS, "tile_n": 256, "tile_k": 128, "stages": 3} | options)


def expand(values, scales):
    """Values times their scales in float64; scales by blocks of the last one or two dimensions."""
    wide = np.repeat(np.asarray(scales, np.float64), BLOCK, axis=-1)
    if wide.shape != values.shape:
        wide = np.repeat(wide, BLOCK, axis=-2)
    return np.asarray(values, np.float64) * wide


def activation64(name, h):
    """Of float64 projections [N, rows, H]."""
    if name == "swiglu":
        return h[0] * 0.5 * (1 + np.tanh(h[0] / 2)) * h[1]
    if name == "relu2":
        return np.maximum(h[0], 0) ** 2
    half = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h[0] + 0.044715 * h[0] ** 3)))
    return h[0] * half * (h[1] if name == "geglu" else 1.0)


def requantized(a):
    """[rows, H] rounded to e4m3 by rows and blocks of 128, as float64."""
    blocks = a.reshape(a.shape[0], -1, BLOCK)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True) / 448, np.finfo(np.float32).tiny)
    return ((blocks / scale).astype(np.float32).astype(E4M3).astype(np.float64) * scale).reshape(
        a.shape
    )


def layer(rng, *, slots, tokens, copies, d_model, hidden, parts=2, ids=None, rows=1.0):
    """Random experts and assignments, and their places sorted by slot in padded groups."""
    if ids is None:
        ids = distinct_ids(rng, slots, tokens, copies)
    place, copy, sizes = padded_layout(ids, slots, PADDED, spare=PADDED)
    w_in = draw(rng, slots, parts, d_model, hidden, scale=d_model**-0.5)
    w_out = draw(rng, slots, hidden, d_model, scale=hidden**-0.5)
    quantized = jax.jit(partial(quantize, dtype=jnp.float8_e4m3fn))
    return {
        "x": draw(rng, tokens, d_model, scale=rows),
        "w_in": w_in,
        "w_out": w_out,
        "q_in": quantized(w_in),
        "q_out": quantized(w_out),
        "scores": rng.random(ids.shape).astype(np.float32) * (ids < slots),
        "place": place,
        "copy": copy,
        "sizes": sizes,
        "ids": ids,
    }


def experts(inputs, activation):
    return run(
        partial(prefill.fp8_experts, activation=activation),
        *(inputs[k] for k in ("x", "q_in", "q_out", "scores", "place", "copy", "sizes")),
    )


def oracle(inputs, activation, *, quantized):
    """float64, of the quantized operands with the hidden activations rounded, or of the plain."""
    if quantized:
        x = expand(*quantize_rows(inputs["x"]))
        w_in, w_out = (expand(q.values, q.scales) for q in (inputs["q_in"], inputs["q_out"]))
        w_in, w_out = w_in.swapaxes(-1, -2), w_out.swapaxes(-1, -2)
    else:
        x, w_in, w_out = (np.asarray(inputs[k], np.float64) for k in ("x", "w_in", "w_out"))
    out = np.zeros(x.shape)
    for s in range(w_in.shape[0]):
        rows, js = np.nonzero(inputs["ids"] == s)
        a = activation64(activation, x[rows] @ w_in[s])
        a = requantized(a) if quantized and rows.size else a
        scores = np.asarray(inputs["scores"][rows, js], np.float64)
        np.add.at(out, rows, scores[:, None] * (a @ w_out[s]))
    return out


CASES = {
    "gated, an empty expert, tails": dict(slots=3, tokens=130, copies=2, d_model=256, hidden=256),
    "plain, one block": dict(slots=2, tokens=5, copies=1, d_model=384, hidden=128, parts=1),
    "plain, two blocks": dict(slots=2, tokens=5, copies=2, d_model=128, hidden=256, parts=1),
}

IDS = {"gated, an empty expert, tails": np.tile([[0, 2], [2, 3]], (65, 1))}  # 3: of no expert


@needs_transposes
@pytest.mark.parametrize("name", CASES)
def test_matches_float64_of_the_quantized_and_of_the_plain(rng, name):
    inputs = layer(rng, **CASES[name], ids=IDS.get(name))
    activation = "relu2" if CASES[name].get("parts") == 1 else "swiglu"
    out = experts(inputs, activation)
    assert out.dtype == ml_dtypes.bfloat16
    exact = oracle(inputs, activation, quantized=True)
    few = out.shape[0] < 10  # then errors are of few values, of which one flip is a percent
    assert relative_error(out, exact) < (2e-2 if ON_GPU and few else BF16_ROUNDINGS)
    # Each projection has the noise of two operands. silu(g)·u doubles their squares (relative to
    # its own square, over normal g and u), relu(g)² quadruples them; then its own noise and
    # w_out's. √(2·2 + 2) = 2.4 and √(4·2 + 2) = 3.2 times NOISE: 6 and 7.5 %.
    expected = NOISE * np.sqrt(10 if activation == "relu2" else 6)
    plain = oracle(inputs, activation, quantized=False)
    assert relative_error(out, plain) < expected * (1.5 if few else 1.2)


@needs_transposes
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_hidden_activations_are_the_nearest_e4m3(rng, options):
    inputs = layer(rng, slots=2, tokens=100, copies=1, d_model=256, hidden=256)

    def project(x, w_in, copy, sizes):
        rows, scales = prefill.rows_of_places(x, copy)
        return prefill.up(rows, scales, w_in, sizes, activation="geglu", config=config(**options))

    a, scales = run(project, inputs["x"], inputs["q_in"], inputs["copy"], inputs["sizes"])
    assert a.dtype == E4M3
    assert scales.shape == (2, a.shape[0])
    got = expand(a, scales.T)
    x, w_in = expand(*quantize_rows(inputs["x"])), inputs["q_in"]
    w_in = expand(w_in.values, w_in.scales).swapaxes(-1, -2)
    for place in range(int(inputs["sizes"].sum())):
        source, slot = inputs["copy"][place], int(place >= inputs["sizes"][0])
        if source == inputs["ids"].size:
            np.testing.assert_array_equal(got[place], 0)
            continue
        exact = activation64("geglu", (x[source] @ w_in[slot])[:, None])[0]
        blocks = np.abs(exact).reshape(-1, BLOCK).max(axis=1)
        np.testing.assert_allclose(scales[:, place], blocks / 448, rtol=UNCERTAIN)
        slack = np.repeat(blocks, BLOCK) * (HALF_LEAST / 448 + 0.3 * UNCERTAIN)
        assert np.all(np.abs(got[place] - exact) <= HALF_UNIT * np.abs(exact) * 1.0001 + slack)


@needs_transposes
@pytest.mark.parametrize(
    "options", [{"tile_n": 128}, {"share_rows": True}, {"band": 1, "stages": 2}], ids=str
)
def test_tiles_do_not_change_the_second_product(rng, options):
    rows, sizes = 512, np.array([128, 0, 256], np.int32)
    a, scales = quantize_rows(draw(rng, rows, 256))
    w_out = quantize(draw(rng, 3, 256, 512), jnp.float8_e4m3fn)
    y = run(partial(prefill.down, config=config(**options)), a, scales.T, w_out, sizes)
    a, w = expand(a, scales), expand(w_out.values, w_out.scales).swapaxes(-1, -2)
    exact = np.concatenate([a[:128] @ w[0], a[128:384] @ w[2]])
    assert relative_error(y[:384], exact) < 2.0**-8 / np.sqrt(3)


@needs_transposes
def test_magnitudes_and_padding(rng):
    """Huge, tiny and zero rows, a block of zeros, and NaN in a row that nobody wants."""
    ids = np.array([[0], [0], [0], [1], [1], [2]])
    inputs = layer(rng, slots=2, tokens=6, copies=1, d_model=256, hidden=128, ids=ids)
    x = np.asarray(inputs["x"], np.float64) * [[1e15], [1e-15], [0], [1], [1], [1]]
    x[3, :128], x[4, 7] = 0, 1e4
    inputs["x"] = x.astype(ml_dtypes.bfloat16)
    exact = oracle(inputs, "swiglu", quantized=True)
    inputs["x"][5] = np.nan
    out = np.asarray(experts(inputs, "swiglu"), np.float64)
    np.testing.assert_array_equal(out[[2, 5]], 0)
    for row in (0, 1, 3, 4):
        assert relative_error(out[row], exact[row]) < 2 * BF16_ROUNDINGS, row


def test_nothing_to_do(rng):
    inputs = layer(rng, slots=2, tokens=3, copies=1, d_model=128, hidden=128)
    inputs |= {k: inputs[k][:0] for k in ("x", "scores", "place")}
    assert experts(inputs, "swiglu").shape == (0, 128)


def test_refuses_other_weights(rng):
    inputs = layer(rng, slots=1, tokens=1, copies=1, d_model=128, hidden=128)
    wrong = inputs | {"q_in": quantize(inputs["w_in"], jnp.int8)}
    with pytest.raises(ValueError, match="w_in is int8, not float8_e4m3fn"):
        experts(wrong, "swiglu")
    wrong = inputs | {"q_out": quantize(inputs["w_out"][:, :64], jnp.float8_e4m3fn)}
    with pytest.raises(ValueError, match="w_out has a dimension of 64, no multiple of 128"):
        experts(wrong, "swiglu")


@pytest.mark.parametrize("options", [{}, {"share_rows": True}, {"zeroed": True}, {"pairs": True}])
def test_lowers_for_cuda(options):
    """Every version of JAX compiles the kernels as far as that goes without a GPU."""
    places, d_model, hidden = 256, 512, 512
    sizes = PromotedConfig(sms=132, tile_n=256, tile_k=128, stages=4, **options)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def matrices(*shape):
        scales = (*shape[:-2], shape[-2] // BLOCK, shape[-1] // BLOCK)
        return QuantizedMatrices(array(shape, jnp.float8_e4m3fn), array(scales, jnp.float32))

    def both(x, scales, w_in, w_out, sizes_S):
        a, a_scales = prefill.up(x, scales, w_in, sizes_S, activation="swiglu", config=sizes)
        return prefill.down(a, a_scales, w_out, sizes_S, config=sizes)

    lowered = jax.export.export(jax.jit(both), platforms=["cuda"])(
        array((places, d_model), jnp.float8_e4m3fn),
        array((d_model // BLOCK, places), jnp.float32),
        matrices(2, 2, hidden, d_model),
        matrices(2, d_model, hidden),
        array((2,), jnp.int32),
    )
    text = lowered.mlir_module()
    assert "mosaic_gpu" in text
    assert "multimem" not in text
