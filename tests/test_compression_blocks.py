"""Numbers to bytes and back: errors, means, what is special, and how many bytes."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.errors import UserError
from pallas_kernels.quantize.reference import dither
from sharding.compression.blocks import Blocks, decode, encode
from sharding.compression.config import GradCompression

FORMATS = [Blocks(8, 256), Blocks(4, 32), Blocks(8, 128, True), Blocks(4, 128, True)]


def key_words(rng) -> jax.Array:
    return jnp.asarray(rng.integers(0, 2**32, 2, dtype=np.uint32))


def numbers(rng, rows=4, width=1024) -> np.ndarray:
    """Magnitudes from block to block over many orders."""
    x = rng.normal(size=(rows, width)) * np.exp(rng.normal(size=(rows, width // 32, 1)) * 4).repeat(
        32, axis=2
    ).reshape(rows, width)
    return x.astype(np.float32)


def scales(x: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Largest magnitude over the largest integer of each number's block, unrounded; float64."""
    parts = x.astype(np.float64).reshape(len(x), -1, blocks.block)
    if blocks.rotate:
        hadamard = np.ones((1, 1))
        while len(hadamard) < blocks.block:
            hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
        parts = parts @ hadamard / np.sqrt(blocks.block)
    most = np.abs(parts).max(2) / (2 ** (blocks.bits - 1) - 1)
    return most.repeat(blocks.block, axis=1)


@pytest.mark.parametrize("blocks", FORMATS)
def test_nearest_and_by_chance(rng, blocks):
    x = numbers(rng)
    # A scale is rounded up by less than 2^-7 of it.
    step = scales(x, blocks) * (1 + 2**-7)
    for given, steps in ((None, 0.5), (key_words(rng), 1.0)):
        sent, left = encode(jnp.asarray(x), blocks, given, residual=True)
        assert sent.dtype == jnp.uint8
        assert sent.shape == (len(x), blocks.row_bytes(x.shape[1]))
        got = np.asarray(decode(sent, blocks, x.shape[1]), np.float64)
        error = np.abs(got - x) / step
        assert np.all(np.abs(left - (x - got)) <= 2**-18 * step * 2 ** (blocks.bits - 1))
        if blocks.rotate:  # errors of a block are mixed; their length stays
            error = np.sqrt(np.square(error).reshape(-1, 128).mean(1))
        assert error.max() <= steps * 1.001
        assert error.max() > 0.2 * steps


def test_bfloat16_is_rounded_once(rng):
    x = numbers(rng)
    blocks = Blocks(16, 1)
    sent, left = encode(jnp.asarray(x), blocks, residual=True)
    assert sent.shape == (4, 2 * 1024) == (4, blocks.row_bytes(1024))
    want = x.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(decode(sent, blocks, 1024), want)
    np.testing.assert_array_equal(left, x - want)


@pytest.mark.parametrize("blocks", FORMATS)
def test_chance_is_right_on_average(rng, blocks):
    x, rounds = numbers(rng, 2, 512), 400

    def once(key: jax.Array) -> jax.Array:
        given = jnp.asarray(x)
        return decode(encode(given, blocks, key)[0], blocks, x.shape[1])

    keys = jnp.asarray(rng.integers(0, 2**32, (rounds, 2), dtype=np.uint32))
    got = np.asarray(jax.jit(jax.vmap(once))(keys), np.float64)
    # One rounding deviates by at most half a step; 6 deviations of the mean, of about 1000 numbers.
    step = scales(x, blocks) * (1 + 2**-7)
    error = (got.mean(0) - x) / step
    assert np.abs(error).max() < 6 * 0.5 / np.sqrt(rounds)
    assert abs(error.mean()) < 6 * 0.5 / np.sqrt(rounds * x.size)
    assert got.std(0).max() > 0


def test_dither_is_uniform(rng):
    key = key_words(rng)
    u = np.asarray(dither(key, (64, 1024)), np.float64) / 2**16
    assert u.min() >= 0 and u.max() < 1
    counts, _ = np.histogram(u, 64, (0, 1))
    # Chi-square of 63 degrees: mean 63, deviation 11.2.
    chi = np.sum(np.square(counts - 1024) / 1024)
    assert chi < 63 + 8 * 11.2
    other = np.asarray(dither(key ^ jnp.asarray([1, 0], jnp.uint32), (64, 1024)), np.float64)
    for left, right in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u, other)):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 6 / np.sqrt(left.size)


@pytest.mark.parametrize("blocks", [Blocks(8, 256), Blocks(4, 32)])
def test_special_numbers(rng, blocks):
    x = rng.normal(size=(1, 8 * blocks.block)).astype(np.float32).reshape(8, blocks.block)
    x[0] = 0
    x[1] *= 1e-42  # below the normal numbers
    x[2, 3], x[3, 4], x[4, 5] = np.nan, np.inf, -np.inf
    x[5] = 3e38
    for key in (None, key_words(rng)):
        sent, _ = encode(jnp.asarray(x).reshape(1, -1), blocks, key)
        got = np.asarray(decode(sent, blocks, x.size)).reshape(x.shape)
        assert not got[:2].any()
        assert np.isnan(got[2:5]).all()
        # The scale is rounded up to bf16, so the largest number lies a little below the last
        # level: nearest rounding takes that level, stochastic rounding now and then the one before.
        step = 3e38 / (2 ** (blocks.bits - 1) - 1)
        np.testing.assert_allclose(got[5], 3e38, rtol=2**-7, atol=0 if key is None else step)
        assert np.isfinite(got[5:]).all()


def test_bytes_of_a_row():
    assert Blocks(8, 256).row_bytes(512) == 512 + 2 * 2
    assert Blocks(4, 32).row_bytes(512) == 256 + 2 * 16
    assert Blocks(4, 128, True).row_bytes(512) == 256 + 2 * 4
    assert Blocks(16, 1).row_bytes(512) == 1024
    assert Blocks(4, 32).padded(33) == 64


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"block": 8}, "block=8: must be 0 or a multiple of 16"),
        ({"method": "int4", "rotate": True, "block": 256}, "block=256 with rotate=True"),
        ({"method": "bf16", "rotate": True}, "rotate=True with method=bf16"),
        ({"density": 0.0}, "density=0.0"),
        ({"hosts": 1}, "hosts=1: must be 0, or at least 2"),
        ({"method": "top_k", "hosts": 2}, "hosts=2 with method=top_k"),
        ({"rank": 0}, "rank=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_what_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        GradCompression(**wrong)


def test_blocks_by_default():
    assert GradCompression("int8").block_size == 256
    assert GradCompression("int4").block_size == 32
    assert GradCompression("int4", rotate=True).block_size == 128
    assert GradCompression("int4", block=64).block_size == 64
