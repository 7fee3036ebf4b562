"""The router's product: of float32 accuracy, whichever backend makes it.

On a GPU of capability 9.0 the same tests run the compiled kernel (`make test-gpu`).
"""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from kernel_support import ON_GPU, run, wide
from oracle import relative_error

from pallas_kernels.hopper.simt import emulate
from pallas_kernels.hopper.simt_multiply import load_words, multiply_add
from pallas_kernels.precision import float32_dot
from pallas_kernels.route.router_product import explain_router_product, router_product
from pallas_kernels.route.warp_product import ProductConfig, choose_config, product
from pallas_kernels.route.warp_sums import Sums

MODELS = [  # T, D, E
    (1, 4096, 8),
    (3, 32, 8),
    (16, 2048, 128),
    (65, 512, 48),
    (100, 2880, 24),
    (256, 2048, 128),
]


def draw_factors(rng, tokens, d_model, experts):
    scales = np.exp(rng.normal(size=d_model))  # some of w's parts matter more than others
    x = jnp.asarray(rng.normal(size=(tokens, d_model)) * scales, jnp.bfloat16)
    return x, jnp.asarray(rng.normal(size=(d_model, experts)), jnp.float32)


def kernel(x, w):
    return router_product(x, w, backend="mosaic_gpu")


@pytest.mark.parametrize("tokens,d_model,experts", MODELS if ON_GPU else MODELS[:2] + MODELS[3:5])
def test_product(rng, tokens, d_model, experts):
    """One row and many, a tail of rows, slices past the end; as good as float32, the same bits."""
    got, want = [], []
    # Of 8 logits the error is chance: of one draw in 400 it is beyond the limit, so there are more.
    for _ in range(-(-256 // (tokens * experts))):
        x, w = draw_factors(rng, tokens, d_model, experts)
        out = run(kernel, x, w)
        x64, w64 = wide(x, w)
        assert out.dtype == np.float32 and out.shape == (tokens, experts)
        got.append(out)
        want.append(x64 @ w64)
        # Of each logit, against what float32 may lose of its terms.
        assert (np.abs(out - want[-1]) < 2e-6 * (np.abs(x64) @ np.abs(w64))).all()
    assert relative_error(np.concatenate(got), np.concatenate(want)) < 3e-7
    for _ in range(5 if ON_GPU else 1):
        assert (out == run(kernel, x, w)).all()


def test_gradients(rng):
    """Those of `float32_dot`, in the factors' dtypes."""
    x, w = draw_factors(rng, 65, 64, 16)
    ct = jnp.asarray(rng.normal(size=(65, 16)), jnp.float32)
    x_ct, w_ct = run(lambda x, w, ct: jax.vjp(kernel, x, w)[1](ct), x, w, ct)
    x64, w64, ct64 = wide(x, w, ct)
    assert w_ct.dtype == np.float32 and x_ct.dtype == jnp.bfloat16
    assert relative_error(w_ct, x64.T @ ct64) < 1e-6
    assert relative_error(x_ct, ct64 @ w64.T) < 3e-3
    wanted = run(lambda x, w, ct: jax.vjp(float32_dot, x, w)[1](ct), x, w, ct)
    assert (x_ct == wanted[0]).all() and (w_ct == wanted[1]).all()


@pytest.mark.parametrize(
    "config",
    [
        ProductConfig(16, 8, 4, 2, 1),
        ProductConfig(32, 32, 4, 2),
        ProductConfig(64, 16, 8, 1, 3),
        ProductConfig(48, 64, 4, 1),
    ],
)
def test_every_cut(rng, config):
    """Tiles of other sizes give the same product; 5 depths of 32 divide by none of the slices."""
    x, w = draw_factors(rng, 50, 160, 64)
    out = run(lambda x, w: product(x, w, config), x, w)
    assert relative_error(out, np.matmul(*wide(x, w))) < 3e-7


def test_past_the_end_nothing_counts(rng):
    """A slice past the end reads from elsewhere, where an infinite row must not spoil others."""
    x, w = draw_factors(rng, 3, 96, 8)
    out = run(kernel, x.at[1, 0].set(jnp.inf), w)
    assert not np.isfinite(out[1]).any()
    assert relative_error(out[[0, 2]], np.matmul(*wide(x, w))[[0, 2]]) < 3e-7


@pytest.mark.skipif(ON_GPU, reason="what is tested is the emulation")
def test_emulated_multiply(rng):
    """Fragments as the PTX ISA draws them, element by element."""
    left, right = (rng.normal(size=shape).astype(jnp.bfloat16) for shape in ((16, 16), (16, 8)))
    start = rng.normal(size=(16, 8)).astype(np.float32)
    a, b = np.empty((4, 32, 2), left.dtype), np.empty((2, 32, 2), left.dtype)
    c = np.empty((4, 32), np.float32)
    for lane in range(32):
        group, quad = divmod(lane, 4)
        for word, (row, depth) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            at = quad * 2 + depth
            a[word, lane] = left[group + row, at : at + 2]
        for word in range(2):
            at = quad * 2 + word * 8
            b[word, lane] = right[at : at + 2, group]
        for word in range(4):
            c[word, lane] = start[group + word // 2 * 8, quad * 2 + word % 2]

    def program(m, a, b, c, out, _block):
        words = (
            [load_words(m, ref, m.thread + i * 32, 1)[0] for i in range(count)]
            for ref, count in ((a, 4), (b, 2), (c, 4))
        )
        for i, word in enumerate(multiply_add(m, *words)):
            m.store(out, m.thread + i * 32, word)

    out_type = [jax.ShapeDtypeStruct((128,), jnp.float32)]
    (out,) = emulate(program, 1, 32, [array.reshape(-1) for array in (a, b, c)], out_type)
    wanted = start + np.matmul(*wide(left, right))
    for lane in range(32):
        for word in range(4):
            place = lane // 4 + word // 2 * 8, lane % 4 * 2 + word % 2
            assert abs(out[word * 32 + lane] - wanted[place]) < 1e-5


@pytest.mark.parametrize("height,columns,blocks,deep", [(16, 8, 8, 4), (32, 32, 4, 8)])
def test_sums_of_a_cluster(rng, height, columns, blocks, deep):
    """What warps send comes to one word each, and blocks add it up into rows that there are.

    Sending itself needs a GPU.
    """
    sums = Sums(height, columns, blocks, deep)
    rows, experts = height + height // 2 + 1, 2 * columns
    parts = rng.normal(size=(blocks * deep, height, columns)).astype(np.float32)
    slice_, row, column = np.indices(parts.shape)
    block, word = sums.place(slice_, row, column)
    received = np.full((blocks, sums.words), np.nan, np.float32)
    received[block, word] = parts
    assert np.isfinite(received).sum() == parts.size, "two came to the same word"
    out = np.zeros((rows, experts), np.float32)
    for rank in range(blocks):

        def program(m, received, out, _block, rank=rank):
            first = height + rank * sums.rows
            sums.add_up(m, received, out, first, columns, rows=rows, experts=experts)

        types = [jax.ShapeDtypeStruct((rows * experts,), jnp.float32)]
        (words,) = emulate(program, 1, deep * 32, [received[rank]], types)
        mine = slice(height + rank * sums.rows, height + (rank + 1) * sums.rows)
        out[mine] = words.reshape(rows, experts)[mine]
    expected = parts.astype(np.float64).sum(axis=0)[: rows - height]
    np.testing.assert_allclose(out[height:, columns:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens,d_model,experts", MODELS)
def test_lowers_for_cuda(tokens, d_model, experts):
    """Forward and gradients, for another machine than this one."""
    x = jax.ShapeDtypeStruct((tokens, d_model), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((d_model, experts), jnp.float32)
    loss = jax.jit(jax.value_and_grad(lambda x, w: kernel(x, w).sum(), argnums=(0, 1)))
    text = jax.export.export(loss, platforms=["cuda"])(x, w).mlir_module()
    assert "mosaic_gpu" in text and "router_product" in text


def test_cut_by_the_number_of_rows():
    """Few rows have small tiles, so that their blocks are many."""
    assert choose_config(1, 2048, 128) == choose_config(16, 2048, 128) == ProductConfig(16, 8, 4)
    assert choose_config(17, 2048, 128) == ProductConfig(32, 16, 4)
    assert choose_config(256, 2048, 128) == ProductConfig(64, 16, 4)
    assert choose_config(256, 2048, 40).columns == 8
    assert choose_config(16, 4096, 8).slices == 64


def test_explanations():
    def explained(tokens, d_model, experts, dtype=jnp.bfloat16):
        return explain_router_product(tokens, d_model, experts, dtype)

    plain = "router_product: reference; not mosaic_gpu: "
    for case, reason in {
        (0, 2048, 128): "0 rows; the kernel takes 1 to 512",
        (513, 2048, 128): "513 rows; the kernel takes 1 to 512",
        (64, 2040, 128): "rows of 2040; the kernel takes multiples of 32 up to 16384",
        (64, 32768, 8): "rows of 32768; the kernel takes multiples of 32 up to 16384",
        (64, 2048, 60): "60 experts; the kernel takes multiples of 8",
        (512, 2048, 256): "512 × 2048 × 256 products; the kernel takes up to 134217728",
        (64, 2048, 64, jnp.float32): "operands are float32, not bfloat16",
    }.items():
        assert explained(*case) == plain + reason
    if ON_GPU:
        assert explained(64, 2048, 64) == "router_product: mosaic_gpu"
    else:
        assert explained(64, 2048, 64).endswith("no NVIDIA GPU of capability 9.0")


def test_refusals(rng):
    x, w = jnp.zeros((2, 64), jnp.bfloat16), jnp.zeros((64, 8), jnp.float32)
    for rows, weights, reason in (
        (x.astype(jnp.float32), w, "operands are float32, not bfloat16"),
        (x, w.astype(jnp.bfloat16), "the weights are bfloat16, the kernel takes float32"),
        (jnp.zeros((2000, 64), jnp.bfloat16), w, "2000 rows"),
        (x[:0], w, "0 rows"),
    ):
        with pytest.raises(NotImplementedError, match=f"router_product: mosaic_gpu: {reason}"):
            router_product(rows, weights, backend="mosaic_gpu")
    x = jnp.asarray(rng.normal(size=(5, 33)), jnp.float32)  # served all the same
    w = jnp.asarray(rng.normal(size=(33, 3)), jnp.float32)
    assert relative_error(np.asarray(router_product(x, w)), np.matmul(*wide(x, w))) < 3e-7
