"""Rows to bytes and back: the Hopper kernels against plain JAX bit by bit, both against numpy."""

from contextlib import nullcontext
from functools import partial

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from kernel_support import BFLOAT16, ON_GPU

from pallas_kernels.hopper.compat import interpreted
from pallas_kernels.quantize import api
from pallas_kernels.quantize.format import Format
from sharding.compression import quantized
from sharding.compression.blocks import Blocks
from sharding.mesh import DATA, MeshShape, make_mesh

SMALL = 2.0**-90


def run(function, backend, *inputs, **static):
    """A compiled kernel on a GPU, an interpreted one elsewhere."""
    with interpreted() if backend == "mosaic_gpu" and not ON_GPU else nullcontext():
        made = jax.jit(partial(function, **static, backend=backend))(*inputs)
        return jax.tree.map(np.asarray, made)


def numbers(rng, rows, width, block, dtype):
    """Blocks of all magnitudes: zeros, some below the least, below the normal ones, not finite."""
    x = rng.normal(size=(rows, width // block, block)) * np.exp(
        8 * rng.normal(size=(rows, width // block, 1))
    )
    x = x.astype(np.float32).reshape(-1, block)
    # On a platform that drops numbers below the normal ones nothing may change.
    kinds = [0, 1e-30, 1e-39, 1.0, 3e37]
    for at, scale in zip(rng.permutation(len(x)), kinds):
        x[at] = rng.uniform(-1, 1, block) * scale
    x[rng.integers(len(x)), rng.integers(block)] = rng.choice([np.nan, np.inf, -np.inf])
    ties = x[rng.integers(len(x))]
    ties[:] = rng.integers(-127, 128, block) / 2
    return x.reshape(rows, width).astype(dtype)


def normal(x):
    """Without numbers below the normal ones, which some platforms drop."""
    return np.where(np.abs(x) < 2.0**-126, 0, x) if x.dtype == np.float32 else x


def oracle(payload, form, width):
    """What bytes mean: integers and scales, [R, blocks, block] and [R, blocks]; float64."""
    rows, count, half = len(payload), width // form.block, form.block // 2
    values, scales = payload[:, : width * form.bits // 8], payload[:, width * form.bits // 8 :]
    assert not scales[:, 2 * count :].any()
    assert payload.shape[1] == form.row_bytes(width)
    scales = np.ascontiguousarray(scales[:, : 2 * count]).view(BFLOAT16).astype(np.float64)
    if form.bits == 8:
        return values.view(np.int8).reshape(rows, count, -1).astype(np.float64), scales
    pairs = values.reshape(rows, count, half).astype(np.float64)
    return np.concatenate([pairs % 16, pairs // 16], axis=2) - 8, scales


def check(x, payload, form, by_chance):
    """Scales are the smallest that clip nothing, integers next to the number or the nearest."""
    whole, scale = oracle(payload, form, x.shape[1])
    x = x.astype(np.float64).reshape(whole.shape)
    most = np.abs(x).max(axis=2)
    bad = ~np.isfinite(x).all(axis=2)
    assert np.isnan(scale[bad]).all() and not whole[bad].any()
    little = most < SMALL
    assert (scale[little] == 1).all() and not whole[little].any()
    normal = ~bad & ~little
    x, whole, scale, most = x[normal], whole[normal], scale[normal], most[normal]
    assert np.abs(whole).max() <= form.largest
    above = scale * form.largest / most
    assert above.min() > 1 - 2**-23 and above.max() < 1 + 2**-7 + 2**-23
    error = np.abs(whole - x / scale[:, None])
    # An inverse of a scale is good to 2⁻²³, and no number is more than 127 of its scale.
    assert error.max() <= (1 if by_chance else 0.5) + 2.0**-15


CASES = [
    # bits, block, rows, blocks of a row: tails of spans, odd numbers of blocks, several warps
    (8, 256, 3, 7),
    (8, 16, 2, 77),
    (8, 1024, 1, 5),
    (4, 32, 4, 35),
    (4, 128, 2, 9),
    (4, 512, 1, 3),
]


@pytest.mark.parametrize(("bits", "block", "rows", "blocks"), CASES)
def test_equal_bits(rng, bits, block, rows, blocks):
    """Encoding, decoding, adding up, and adding up to encode again; of either dtype."""
    form, width = Format(bits, block), block * blocks
    me = jnp.int32(rng.integers(rows))
    for dtype, chance in ((np.float32, True), (BFLOAT16, False)):
        x = jnp.asarray(numbers(rng, rows, width, block, dtype))
        key = jnp.asarray(rng.integers(0, 2**32, 2, dtype=np.uint32)) if chance else None
        keep = bool(rng.integers(2))
        noise = rng.integers(0, 256, 2 * width, dtype=np.uint8)
        found = []
        for backend in api.BACKENDS:
            sent, left = run(api.encode, backend, x, form=form, key=key, residual=keep)
            check(np.asarray(x), sent, form, chance)
            back = run(api.decode, backend, sent, form=form, width=width)
            whole, scale = oracle(sent, form, width)
            np.testing.assert_array_equal(back, (whole * scale[..., None]).reshape(rows, width))
            received = sent.copy()  # what a rank sends to itself nobody looks at
            received[me] = noise[: sent.shape[1]]
            total = run(api.add_up, backend, received, x, me, form=form)
            terms = back.copy()
            terms[me] = x[me].astype(jnp.float32)
            with np.errstate(all="ignore"):
                want = sum(terms[1:], start=terms[0])
            np.testing.assert_array_equal(normal(total), normal(want))
            again = run(
                *(api.add_up_and_encode, backend, received, x, me),
                form=form, key=key, residual=True,
            )  # fmt: skip
            found.append((sent, left, back, total, *again))
        for want, got in zip(*found, strict=True):
            assert (want is None) == (got is None)
            if want is not None:
                np.testing.assert_array_equal(normal(want), normal(got))


@pytest.mark.parametrize("backend", api.BACKENDS)
def test_nearest_is_even(backend):
    """Halves go to the even integer, so that weights do not drift."""
    x = np.zeros((1, 256), np.float32)
    x[0, 0], x[0, 1:9] = 127, [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5]
    sent, left = run(api.encode, backend, jnp.asarray(x), form=Format(8, 256), residual=True)
    whole, scale = oracle(sent, Format(8, 256), 256)
    assert scale == 1
    np.testing.assert_array_equal(whole[0, 0, :9], [127, 0, 2, 2, 4, 0, -2, -2, 126])
    np.testing.assert_array_equal(left, x - whole[0])


@pytest.mark.parametrize("backend", api.BACKENDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_chance_is_right_on_average(rng, backend, bits):
    """A number that is repeated has its mean; the residual is what is missing."""
    form = Format(bits, 64)
    want = rng.uniform(-1, 1, 64).astype(np.float32)
    x = jnp.asarray(np.tile(want, (1, 200)))
    key = jnp.asarray(rng.integers(0, 2**32, 2, dtype=np.uint32))
    sent, left = run(api.encode, backend, x, form=form, key=key, residual=True)
    whole, scale = oracle(sent, form, x.shape[1])
    got = whole * scale[..., None]
    np.testing.assert_array_equal(left, x - got.reshape(1, -1).astype(np.float32))
    # One rounding deviates by at most half a step.
    assert np.abs(got[0].mean(axis=0) - want).max() < 6 * 0.5 * scale.max() / np.sqrt(200)
    assert got[0].std(axis=0).max() > 0.2 * scale.max()


@pytest.mark.skipif(ON_GPU, reason="the mesh is of fake devices")
@pytest.mark.parametrize("dim", [None, 0])
def test_sums_over_ranks_have_equal_bits(rng, dim):
    """The reduction of a gradient with a tail, with and without the kernels."""
    mesh = make_mesh(MeshShape(2))
    grads = jnp.asarray(rng.normal(size=(2, 6, 301)).astype(BFLOAT16))

    def reduce(grad, *, backend):
        blocks = Blocks(8, 256, backend=backend)
        key = jax.random.fold_in(jax.random.key(3), lax.axis_index(DATA))
        held = None if dim is None else jnp.ones_like(grad[0], jnp.float32)
        made = quantized.reduce(grad[0], held, (DATA,), dim, key=key, blocks=blocks)
        return jax.tree.map(lambda a: a[None], made)

    sharded = partial(
        jax.shard_map, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA), check_vma=False
    )
    want, got = (
        run(lambda g, backend: sharded(partial(reduce, backend=backend))(g), backend, grads)
        for backend in ("reference", "mosaic_gpu")
    )
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", [Format(8, 256), Format(4, 32)])
def test_lowering_for_cuda(form):
    """Three kernels for an all-reduce, and nothing of the size of the numbers beside them."""
    rows, width = 2, 2**16

    def both(x, payload, key, me):
        sent, _ = api.encode(x, form, key, backend="mosaic_gpu")
        again, _ = api.add_up_and_encode(payload, x, me, form, key, backend="mosaic_gpu")
        return sent, again, api.decode(payload, form, width, backend="mosaic_gpu")

    shapes = (
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, form.row_bytes(width)), jnp.uint8),
        jax.ShapeDtypeStruct((2,), jnp.uint32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    lowered = jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu") == 3
    assert not any(word in lowered for word in ("concatenate", "stablehlo.pad", "transpose"))


def test_what_is_refused():
    x = jnp.zeros((2, 96), jnp.float32)
    with pytest.raises(NotImplementedError, match="blocks of 48; the kernels take powers of 2"):
        api.encode(x, Format(8, 48), backend="mosaic_gpu")
    sent, _ = api.encode(x, Format(8, 48))
    assert not np.asarray(api.decode(sent, Format(8, 48), 96)).any()
    assert "not mosaic_gpu: 65 rows" in api.explain(Format(8, 256), 65, 256)
    assert "2³¹" in api.explain(Format(8, 256), 2, 2**30)
