"""RMSNorm's kernels and plain JAX against float64; kernels compiled on a GPU, else in numpy."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from kernel_support import BFLOAT16
from kernel_support import run as compiled

from pallas_kernels.norm import api, rows
from pallas_kernels.norm.rows import MOST_ROWS, rows_of

EPS = 1e-5
ULP = 2.0**-8  # half the distance of bfloat16 numbers, relative
SHAPES = [(5, 8), (33, 264), (70, 1024), (9, 2880), (3, 8192), (1, 4096)]


def run(backend, function, *inputs):
    """Plain JAX op by op: XLA's programs would leave out that a sum is rounded."""
    made = (compiled if backend == "mosaic_gpu" else lambda f, *xs: f(*xs))(function, *inputs)
    return jax.tree.map(np.asarray, made)


def wide(x):
    return np.asarray(x, np.float64)


def draw(rng, count, width, arrays):
    """Rows of many magnitudes, one of zeros; scale; more arrays of the rows' shape."""
    made = [rng.normal(size=(count, width)) * np.exp(3 * rng.normal(size=(count, 1)))]
    made += [rng.normal(size=(count, width)) for _ in range(arrays - 1)]
    made[0][rng.integers(count)] = 0
    scale = rng.normal(1, 0.3, width).astype(np.float32)
    return [array.astype(BFLOAT16) for array in made], scale


def close(got, want, size):
    """Rounded to bfloat16 once, after float32 sums of terms of some size."""
    np.testing.assert_array_less(np.abs(wide(got) - want), ULP * np.abs(want) + 3e-6 * size + 1e-30)


@pytest.mark.parametrize("backend", api.BACKENDS)
@pytest.mark.parametrize("count,width", SHAPES)
def test_forward(rng, backend, count, width):
    (x, other), scale = draw(rng, count, width, 2)
    added = (wide(x) + wide(other)).astype(BFLOAT16)
    for term, total in ((other, added), (None, x)):
        function = partial(api.add_and_normalize, eps=EPS, backend=backend)
        got = run(backend, lambda x, s, t=term, f=function: f(x, t, s), x, scale)
        assert got[0].dtype == got[1].dtype == BFLOAT16 and got[2].shape == (count, 1)
        assert np.array_equal(got[0], total)
        inverse = 1 / np.sqrt(np.square(wide(total)).mean(axis=1, keepdims=True) + EPS)
        np.testing.assert_allclose(got[2], inverse, rtol=1e-6)
        want = wide(total) * inverse * scale
        close(got[1], want, np.abs(want))


@pytest.mark.parametrize("backend", api.BACKENDS)
@pytest.mark.parametrize("count,width", SHAPES)
@pytest.mark.parametrize("uses,passed", [(1, False), (2, True), (3, True)])
def test_backward(rng, backend, count, width, uses, passed):
    (x, *cts), scale = draw(rng, count, width, 1 + uses + passed)
    inverse = 1 / np.sqrt(np.square(wide(x)).mean(axis=1, keepdims=True) + EPS)
    unit, ct = wide(x) * inverse, sum(map(wide, cts[:uses]))
    scaled = ct * scale
    want = inverse * (scaled - unit * (scaled * unit).mean(axis=1, keepdims=True))
    want += wide(cts[uses]) if passed else 0
    function = partial(api.normalize_backward, backend=backend)
    got, got_scale = run(
        backend,
        lambda x, i, s, *cts: function(x, i, s, cts[:uses], cts[uses] if passed else None),
        x,
        inverse.astype(np.float32),
        scale,
        *cts,
    )
    assert got.dtype == BFLOAT16 and got_scale.dtype == np.float32
    close(got, want, inverse * (np.abs(scaled) + np.abs(unit)) + np.abs(want))
    sizes = np.abs(ct * unit).sum(axis=0)
    assert (np.abs(got_scale - (ct * unit).sum(axis=0)) <= 1e-6 * sizes + 1e-30).all()


def test_the_backward_is_the_forward_s(rng):
    """Against differences in float32, of both terms and scale."""
    x, other, ct_total, ct = rng.normal(size=(4, 3, 2, 40)).astype(np.float32)
    scale = rng.normal(size=40).astype(np.float32)

    def loss(x, other, scale):
        total, normal, _ = api.add_and_normalize(x, other, scale, EPS, backend="reference")
        return jnp.sum(total * ct_total + normal * ct)

    want = jax.grad(loss, (0, 1, 2))(x, other, scale)
    total, _, inverse = api.add_and_normalize(x, other, scale, EPS)
    got, got_scale = api.normalize_backward(total, inverse, scale, [ct], ct_total)
    for a, b in zip((got, got, got_scale), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_every_row_and_column_has_one_lane(rng, monkeypatch, multiprocessors):
    monkeypatch.setattr(rows, "sm_count", lambda: multiprocessors)
    for _ in range(50):
        count, width = int(rng.integers(1, 10**5)), 8 * int(rng.integers(1, 1025))
        share = rows_of(count, width)
        assert (
            share.groups * share.each >= count > (share.blocks - 1) * share.each * 8 / share.warps
        )
        assert (
            share.warps * 32 * 8 * share.reads >= width > share.warps * 32 * 8 * (share.reads - 1)
        )
        assert 1 <= share.each <= MOST_ROWS and share.reads <= 4


def test_what_is_refused(rng):
    x = jnp.zeros((4, 12), BFLOAT16)
    with pytest.raises(NotImplementedError, match="12 columns are no multiple of 8"):
        api.add_and_normalize(x, None, jnp.ones(12), EPS, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="the registers of 8 warps hold no such row"):
        x = jnp.zeros((4, 16384), BFLOAT16)
        api.add_and_normalize(x, None, jnp.ones(16384), EPS, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="float32, not bfloat16"):
        x = jnp.zeros((4, 16), jnp.float32)
        api.add_and_normalize(x, None, jnp.ones(16), EPS, backend="mosaic_gpu")
