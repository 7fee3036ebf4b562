"""The weighted sum of a row's places against numpy; compiled on a GPU, in numpy elsewhere."""

from contextlib import nullcontext
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.fused_experts import api, weighted_sum
from pallas_kernels.hopper.compat import interpreted

ON_GPU = jax.default_backend() == "gpu"


def case(rng, count, copies, width, spare, none=0.3):
    """Rows, places and weights; what no assignment has is poisoned."""
    limit = count * copies + spare
    place = rng.permutation(limit)[: count * copies].reshape(count, copies).astype(np.int32)
    place[rng.random(place.shape) < none] = limit
    rows = np.full((limit, width), np.nan, np.float32)
    own = place[place < limit]
    rows[own] = rng.normal(size=(own.size, width))
    weights = rng.normal(size=place.shape).astype(np.float32)
    return jnp.asarray(rows, jnp.bfloat16), weights, place


def in_order(rows, weights, place):
    """float32, j after j; a product and a sum each rounded, as it may be, or not."""
    rows = np.concatenate([np.asarray(rows, np.float32), np.zeros((1, rows.shape[1]), np.float32)])
    total = np.zeros((place.shape[0], rows.shape[1]), np.float32)
    for j in range(place.shape[1]):
        taken = rows[place[:, j]]
        total = total + (taken if weights is None else taken * weights[:, j : j + 1])
    return total.astype(jnp.bfloat16)


def run(function, *arrays):
    with nullcontext() if ON_GPU else interpreted():
        return np.asarray(jax.jit(function)(*arrays))


SHAPES = [(5, 2, 64, 1), (33, 8, 192, 100), (1, 1, 8, 0), (3, 32, 64, 7), (70, 3, 264, 40)]


@pytest.mark.parametrize("count,copies,width,spare", SHAPES)
def test_sums(rng, count, copies, width, spare):
    rows, weights, place = case(rng, count, copies, width, spare)
    for of_rows in (weights, None):
        kernel = partial(weighted_sum.sum_places, weights_RJ=of_rows, place_RJ=place)
        got = run(lambda rows, kernel=kernel: kernel(rows), rows)
        wanted = in_order(rows, of_rows, place)
        assert got.dtype == jnp.bfloat16
        if ON_GPU:  # which may join a product and a sum
            got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
            np.testing.assert_allclose(got, wanted, rtol=8e-3, atol=1e-6)
        else:
            assert np.array_equal(got.view(np.uint16), wanted.view(np.uint16))


def test_rows_without_a_place(rng):
    """Exactly zero, though all memory is poisoned."""
    rows, weights, place = case(rng, 6, 4, 64, 3, none=1.1)
    got = run(lambda rows: weighted_sum.sum_places(rows, weights, jnp.asarray(place)), rows)
    assert not got.view(np.uint16).any()


@pytest.mark.parametrize("backend", ["mosaic_gpu", "reference"])
@pytest.mark.parametrize("count", [6, api.FEW_COPIES // 2 + 1])
def test_backends_agree(rng, backend, count):
    """With float64, where few and where many are summed."""
    rows, weights, place = case(rng, count, 2, 64, 9)
    call = partial(api.sum_places, weights_RJ=weights, place_RJ=jnp.asarray(place))
    got = run(lambda rows: call(rows, dtype=jnp.bfloat16, backend=backend), rows)
    padded = np.concatenate([np.asarray(rows, np.float64), np.zeros((1, 64))])
    wanted = np.sum(padded[place] * weights[..., None].astype(np.float64), axis=1)
    error = np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < 3e-3


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("count,copies,width", [(256, 8, 2048), (1, 2, 4096), (77, 3, 320)])
def test_lowering_for_cuda(count, copies, width, weighted):
    def function(rows, weights, place):
        return weighted_sum.sum_places(rows, weights if weighted else None, place)

    arguments = (
        jax.ShapeDtypeStruct((count * copies + 128, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((count, copies), jnp.float32),
        jax.ShapeDtypeStruct((count, copies), jnp.int32),
    )
    text = jax.export.export(jax.jit(function), platforms=["cuda"])(*arguments).mlir_module()
    assert text.count("mosaic_gpu") >= 1
    assert "stablehlo.gather" not in text and "bitcast_convert" not in text


def test_refusals():
    rows, place = jnp.zeros((9, 64), jnp.bfloat16), jnp.zeros((4, 2), jnp.int32)
    refusal = partial(weighted_sum.refusal, dtype=jnp.bfloat16)
    assert refusal(rows, place) is None
    assert refusal(rows[:, :60], place) == "60 columns are no multiple of 8"
    assert refusal(rows[:0], place) == "no rows or no places"
    assert "33 places of a row" in refusal(rows, jnp.zeros((4, 33), jnp.int32))
    assert "rows are float32" in refusal(rows.astype(jnp.float32), place)
    large = jax.ShapeDtypeStruct((2**20, 2**13), jnp.bfloat16)
    assert "positions of pairs are int32" in refusal(large, place)
