"""Low-rank reduction against the power method in float64 numpy."""

import jax
import numpy as np
import pytest
from compression_leaf_support import (
    CASES,
    counted_bytes,
    mapped,
    rank_sums,
    reduce_steps,
    start,
    whole_sums,
)
from jax import numpy as jnp

from moejax.errors import UserError
from sharding.compression.interface import bytes_sent
from sharding.compression.low_rank import LowRank, Matrices, orthonormal
from sharding.mesh import make_mesh

STEPS = 3
TOLERANCE = 1e-4
"""Of the largest entry: float32 products of up to 64 terms, one step's error in the next."""


def projected(grads, axes, form, q):
    """The power method with error feedback in float64, for the summed gradients of each step.

    Only the space that Q spans decides what is applied, so the basis is LAPACK's.

    Args:
        grads: [steps, groups, *shape], already summed.
        q: [B, m, r] at the start.
    """
    applied = np.zeros(grads.shape)
    for group in range(grads.shape[1]):
        now, left = np.asarray(q, np.float64), 0.0
        for step in range(len(grads)):
            matrix = grads[step, group].reshape(form.count, form.n, form.m) + left
            p = np.linalg.qr(matrix @ now)[0]
            now = np.swapaxes(matrix, 1, 2) @ p
            got = p @ np.swapaxes(now, 1, 2)
            left = matrix - got
            applied[step, group] = got.reshape(grads.shape[2:])
    return applied


FORMS = [
    # shape, dimension that storage splits, rank
    ((24, 16), None, 2),
    ((2, 8, 2, 12), 1, 4),  # [L, D, 2, H] along rows
    ((2, 12, 2, 8), 3, 3),  # along the last of the columns
    ((8, 6, 10), 0, 2),  # along the layers
    ((3, 2, 8, 16), 2, 4),  # [L, N, h, D] along the inner rows
    ((3, 2, 8, 16), 3, 2),  # along the columns
]


@pytest.mark.parametrize(
    ("case", "form"),
    [
        ("data", 0),
        ("data x expert", 1),
        ("experts", 2),
        ("data", 3),
        ("data x expert", 4),
        ("experts", 5),
    ],
)
def test_equals_the_power_method(rng, case, form):
    (sizes, axes), (shape, dim, rank) = CASES[case], FORMS[form]
    grads = rng.standard_normal((STEPS, sizes.data, sizes.expert, *shape)).astype(np.float32)
    method = LowRank(rank)
    pieces, states = reduce_steps(method, sizes, axes, dim, grads)
    got, form = whole_sums(pieces, axes, dim), Matrices.of(shape)
    start = np.asarray(method.init(shape, jax.random.key(0))["q"])
    want = projected(rank_sums(grads, axes), axes, form, start)
    np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max())
    assert np.linalg.matrix_rank(got[0, 0].reshape(form.count, form.n, form.m)[0]) == rank
    # What was applied and what is left are all there was.
    left = rank_sums(np.stack([s["residual"] for s in states]), axes)
    meant = np.cumsum(rank_sums(grads, axes), axis=0)
    np.testing.assert_allclose(
        np.cumsum(got, axis=0) + left, meant, atol=2e-5 * np.abs(meant).max()
    )
    q = np.stack([s["q"] for s in states])
    whole_sums(q, axes, None)  # equal in every bit


@pytest.mark.parametrize("shape", [(8, 24), (2, 24, 8)], ids=["wide", "tall"])
def test_full_rank_is_exact(rng, shape):
    sizes, axes = CASES["data x expert"]
    grads = rng.standard_normal((2, 4, 2, *shape)).astype(np.float32)
    pieces, states = reduce_steps(LowRank(100), sizes, axes, None, grads)
    want = rank_sums(grads, axes)
    got = whole_sums(pieces, axes, None)
    np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max())
    # A rank may be left with what the others' gradients make up for.
    left = rank_sums(states[-1]["residual"][None], axes)
    np.testing.assert_allclose(left, 0, atol=TOLERANCE * np.abs(want).max())


def test_warm_start_finds_the_largest_directions(rng):
    sizes, axes = CASES["data"]
    u, v = (np.linalg.qr(rng.standard_normal((16, 16)))[0] for _ in range(2))
    constant = ((u * 0.5 ** np.arange(16)) @ v.T).astype(np.float32)
    grads = np.broadcast_to(constant / 8, (8, 1, 16, 16))
    method, fresh = LowRank(2), jnp.zeros((8, 1, 16, 16), jnp.float32)
    run = jax.jit(mapped(method, make_mesh(sizes), axes, None))
    state, errors = start(method, sizes, (16, 16)), []
    for number in range(6):
        got, state = jax.block_until_ready(run(jnp.asarray(grads), state, jnp.int32(number)))
        errors.append(np.linalg.norm(np.asarray(got[0, 0]) - constant))
        state["residual"] = fresh  # so that each step sees the same matrix
    best = np.linalg.norm(0.5 ** np.arange(2, 16))
    assert errors[-1] < 1.02 * best < errors[0]


@pytest.mark.parametrize("dim", [None, 0])
def test_warm_up_is_exact(rng, dim):
    """Everything is sent; then the power method begins from the start's q, with nothing left."""
    sizes, axes = CASES["data x expert"]
    shape = (8, 24)
    grads = rng.standard_normal((3, sizes.data, sizes.expert, *shape)).astype(np.float32)
    method = LowRank(2, warmup_steps=2)
    pieces, states = reduce_steps(method, sizes, axes, dim, grads)
    got, want = whole_sums(pieces, axes, dim), rank_sums(grads, axes)
    np.testing.assert_allclose(got[:2], want[:2], atol=TOLERANCE * np.abs(want).max())
    assert not states[1]["residual"].any()
    q = np.asarray(method.init(shape, jax.random.key(0))["q"])
    last = projected(want[2:], axes, Matrices.of(shape), q)
    np.testing.assert_allclose(got[2:], last, atol=TOLERANCE * np.abs(want).max())
    assert states[2]["residual"].any()


def test_bytes_with_a_warm_up_are_those_of_the_larger_branch():
    shape, sizes = (512, 512), {"data": 4}
    thin = LowRank(4).crossings(shape, sizes, None)
    assert [operand for _, _, operand in thin] == [4 * 512 * 4] * 2
    warm = LowRank(4, warmup_steps=1)
    assert warm.crossings(shape, sizes, None) == [("all-reduce", ("data",), 4 * 512 * 512)]
    assert warm.crossings(shape, sizes, 0)[0] == ("reduce-scatter", ("data",), 4 * 512 * 512)


def test_zero_and_late_experts(rng):
    """Experts that no token reached give zero, and learn as the others when one does."""
    sizes, axes = CASES["data"]
    shape = (3, 8, 12)
    grads = rng.standard_normal((3, 8, 1, *shape)).astype(np.float32)
    grads[:2, :, :, 1] = 0
    grads[0, :, :, 2] = 0
    pieces, states = reduce_steps(LowRank(2), sizes, axes, None, grads)
    got, want = whole_sums(pieces, axes, None)[:, 0], rank_sums(grads, axes)[:, 0]
    assert not got[:2, 1].any() and not got[0, 2].any() and not states[1]["residual"][:, :, 1].any()
    for step, expert in ((2, 1), (1, 2)):
        s = np.linalg.svd(want[step, expert], compute_uv=False)
        assert np.linalg.matrix_rank(got[step, expert], tol=1e-3) == 2
        assert np.linalg.norm(got[step, expert]) > 0.3 * np.linalg.norm(s[:2])


def test_gradients_of_lower_rank_and_of_any_size(rng):
    """Columns that depend on others are dropped; neither small nor large numbers are lost."""
    sizes, axes = CASES["data"]
    ones = rng.standard_normal((16, 1)) * rng.standard_normal((1, 24))
    for scale in (1e-30, 1.0, 1e15):
        grads = np.broadcast_to(scale * ones / 8, (2, 8, 1, 16, 24)).astype(np.float32)
        pieces, states = reduce_steps(LowRank(4), sizes, axes, None, grads)
        want = np.broadcast_to(scale * ones, (2, 16, 24))
        np.testing.assert_allclose(pieces[:, 0, 0], want, atol=TOLERANCE * np.abs(want).max())
        assert np.isfinite(states[-1]["q"]).all()


def test_orthonormal(rng):
    x = rng.standard_normal((3, 40, 4)).astype(np.float32)
    x[1, :, 2] = x[1, :, 0] - 2 * x[1, :, 1]
    x[2] = 0
    # Nearly dependent columns: once would leave them far from orthogonal.
    x[0, :, 1] = x[0, :, 0] + 1e-3 * x[0, :, 1]
    p = np.asarray(orthonormal(jnp.asarray(x)), np.float64)
    gram = np.swapaxes(p, 1, 2) @ p
    alive = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(gram, np.stack([np.diag(a) for a in alive]), atol=1e-6)
    for k in range(2):
        outside = x[k] - p[k] @ (p[k].T @ x[k])
        assert np.abs(outside).max() < 1e-5 * np.abs(x[k]).max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("shape", "dim", "rank"), FORMS)
def test_bytes_equal_the_formula(case, shape, dim, rank):
    sizes, axes = CASES[case]
    by_axis = {a: getattr(sizes, a) for a in axes}
    method = LowRank(rank)
    expected = bytes_sent(method.crossings(shape, by_axis, dim), by_axis)
    assert counted_bytes(method, sizes, axes, dim, shape) == pytest.approx(expected)
    form, ranks = Matrices.of(shape), np.prod(list(by_axis.values()))
    numbers = form.count * rank * (form.n + form.m)
    assert expected == pytest.approx(2 * (1 - 1 / ranks) * 4 * numbers)


@pytest.mark.parametrize(
    ("shape", "stacked", "batch", "n", "m"),
    [
        ((24, 512, 2, 256), None, (24,), 512, 512),  # gate and up together
        ((2, 64, 256, 2, 44), None, (2, 64), 256, 88),  # layers and experts
        ((2, 256, 4, 64), None, (2,), 256, 256),  # queries
        ((2, 4, 64, 256), None, (2,), 256, 256),  # outputs
        ((64, 44, 256), None, (64,), 44, 256),
        ((8, 64, 512), None, (), 512, 512),  # ambiguous: who knows, says
        ((8, 64, 512), 1, (8,), 64, 512),
        ((3, 5), None, (), 3, 5),
    ],
)
def test_matrices(shape, stacked, batch, n, m):
    form = Matrices.of(shape, stacked)
    assert (form.batch, form.n, form.m) == (batch, n, m)


def test_refused():
    with pytest.raises(UserError, match=r"rank=0: must be at least 1"):
        LowRank(0)
    with pytest.raises(UserError, match="warmup_steps=-1"):
        LowRank(warmup_steps=-1)
    with pytest.raises(UserError, match=r"shape=\(7,\).*two dimensions"):
        LowRank(4).init((7,), jax.random.key(0))
    with pytest.raises(UserError, match=r"shape=\(3, 7\) with stacked=1"):
        LowRank(4, stacked=1).init((3, 7), jax.random.key(0))
