"""Estimated squares of a summed gradient against numpy, and against the squares they stand for."""

import jax
import numpy as np
import pytest
from compression_leaf_support import CASES, RANKS, rank_sums, whole_sums
from jax import numpy as jnp

from sharding.compression.low_rank import Matrices
from sharding.compression.squares import crossings, squares
from sharding.mesh import AXES, make_mesh
from sharding.traffic import collectives_of, sent_bytes

FORMS = [((24, 16), None), ((2, 8, 2, 12), 1), ((3, 2, 8, 16), 3), ((8, 6, 10), 0)]


def mapped(sizes, axes, dim):
    def one(grad):
        return squares(grad.reshape(grad.shape[2:]), axes, dim)[None, None]

    mesh = make_mesh(sizes)
    return jax.shard_map(one, mesh=mesh, in_specs=RANKS, out_specs=RANKS, check_vma=False)


def estimate(sizes, axes, dim, grads):
    """[groups, *shape]"""
    piece = np.asarray(jax.jit(mapped(sizes, axes, dim))(jnp.asarray(grads)))
    return whole_sums(piece[None], axes, dim)[0]


@pytest.mark.parametrize(
    ("case", "form"), [("data", 0), ("data x expert", 1), ("experts", 2), ("data", 3)]
)
def test_equals_numpy(rng, case, form):
    (sizes, axes), (shape, dim) = CASES[case], FORMS[form]
    grads = rng.standard_normal((sizes.data, sizes.expert, *shape)).astype(np.float32)
    grads[..., 3] *= 100
    form = Matrices.of(shape)
    total = rank_sums(np.square(grads, dtype=np.float64)[None], axes)[0]
    total = total.reshape(-1, form.count, form.n, form.m)
    rows, columns = total.mean(3), total.mean(2)
    want = rows[..., None] * columns[..., None, :] / rows.mean(2)[..., None, None]
    got = estimate(sizes, axes, dim, grads)
    np.testing.assert_allclose(got, want.reshape(got.shape), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_an_outer_product_of_deviations_is_found(rng, scale):
    """Means of the square of the sum, over many draws: each draw has ranks' own chance."""
    sizes, axes = CASES["data x expert"]
    deviation = rng.uniform(0.1, 2, (16, 1)) * rng.uniform(0.1, 2, (1, 12))
    draws = rng.standard_normal((2000, 8, 16, 12)) * deviation
    measured = np.square(draws.sum(1)).mean(0)
    many = np.sqrt(np.square(draws).mean(0)).reshape(4, 2, 16, 12)
    got = estimate(sizes, axes, None, (scale * many).astype(np.float32))[0] / scale**2
    # A mean of 2000 squares deviates by 3 %: 5 deviations, of the largest of 192.
    np.testing.assert_allclose(got, measured, rtol=5 * np.sqrt(2 / 2000))


def test_zeros(rng):
    sizes, axes = CASES["data"]
    grads = rng.standard_normal((8, 1, 2, 6, 10)).astype(np.float32)
    grads[:, :, 1] = 0
    got = estimate(sizes, axes, None, grads)[0]
    assert got[0].all() and not got[1].any()
    tiny = estimate(sizes, axes, None, grads * np.float32(1e-20))
    assert np.isfinite(tiny).all() and tiny.max() < 1e-36


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("shape", "dim"), FORMS)
def test_bytes_equal_the_formula(case, shape, dim):
    sizes, axes = CASES[case]
    grad = jax.ShapeDtypeStruct((sizes.data, sizes.expert, *shape), jnp.float32)
    by_axis = {a: getattr(sizes, a) for a in axes}
    jaxpr = jax.make_jaxpr(mapped(sizes, axes, dim))(grad)
    counted = sum(c.sent for c in collectives_of(jaxpr, dict(zip(AXES, sizes.sizes))))
    ranks = int(np.prod(list(by_axis.values())))
    expected = sum(
        sent_bytes(kind, ranks, operand) for kind, _, operand in crossings(shape, by_axis)
    )
    assert counted == pytest.approx(expected)


def test_squares_beyond_float32_stay_finite(rng):
    """Else one large number of a finite gradient would make the moments NaN."""
    sizes, axes = CASES["data"]
    grads = rng.standard_normal((8, 1, 16, 12)).astype(np.float32)
    grads[3, 0, 5, 7] = 1e20
    found = estimate(sizes, axes, None, grads)
    assert np.isfinite(found).all() and (np.asarray(found) >= 0).all()
    grads[3, 0, 5, 7] = np.nan
    assert np.isnan(estimate(sizes, axes, None, grads)).any()
