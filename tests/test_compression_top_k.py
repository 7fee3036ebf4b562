"""Top-k reduction against numpy: what is chosen, summed, left over and sent."""

import jax
import ml_dtypes
import numpy as np
import pytest
from compression_leaf_support import (
    CASES,
    counted_bytes,
    rank_sums,
    reduce_steps,
    whole_sums,
)
from jax import numpy as jnp

from moejax.errors import UserError
from sharding.compression import top_k
from sharding.compression.interface import bytes_sent
from sharding.compression.selection import largest
from sharding.compression.top_k import TopK
from sharding.mesh import DATA


def first_largest(x_GB, k):
    """By a stable sort of magnitudes; NaN above everything."""
    order = np.where(np.isnan(x_GB), np.inf, np.abs(x_GB).astype(np.float64))
    return np.sort(np.argsort(-order, axis=1, kind="stable")[:, :k], axis=1)


@pytest.mark.parametrize("k", [1, 7, 96, 97])
def test_largest(rng, k):
    """Distinct numbers, ties, zeros, subnormal ones, infinities."""
    x = rng.standard_normal((6, 97)).astype(np.float32)
    x[1] = 0
    x[2] = np.round(2 * x[2])
    x[3] = rng.integers(-200, 200, 97) * np.float32(2.0**-149)
    x[4, [3, 50]] = np.inf, -np.inf
    x[5, rng.permutation(97)[:90]] = 0
    got = np.asarray(jax.jit(largest, static_argnums=1)(jnp.asarray(x), k))
    np.testing.assert_array_equal(got, first_largest(x, k))


def test_largest_takes_nan(rng):
    x = rng.standard_normal((1, 40)).astype(np.float32)
    x[0, 7], x[0, 9] = np.nan, np.inf
    assert np.asarray(largest(jnp.asarray(x), 1)).tolist() == [[7]]


def split(x, dim, pieces):
    """[*shape] → [pieces, N], each piece of storage flat."""
    if dim is None:
        return x.reshape(1, -1)
    return np.stack([p.reshape(-1) for p in np.split(x, pieces, axis=dim)])


def merge(rows, shape, dim):
    """The inverse of `split`."""
    if dim is None:
        return rows.reshape(shape)
    each = (*shape[:dim], shape[dim] // len(rows), *shape[dim + 1 :])
    return np.concatenate([r.reshape(each) for r in rows], axis=dim)


def sent_by(whole, dim, pieces, method, group):
    """What one rank sends, in place, zero elsewhere."""
    rows = split(whole, dim, pieces)
    out = np.zeros_like(rows)
    count = -(-rows.shape[1] // group)
    size = -(-rows.shape[1] // count)
    for row, kept in zip(rows, out):
        padded = np.pad(row, (0, count * size - len(row))).reshape(count, size)
        k = max(1, round(method.density * size))
        at = (first_largest(padded, k) + size * np.arange(count)[:, None]).reshape(-1)
        at = at[at < len(row)]
        values = row[at]
        if method.values == "bfloat16":
            values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        kept[at] = values
    return merge(out, whole.shape, dim)


FORMS = [
    # shape, dimension that storage splits
    ((37, 21), None),
    ((2, 24, 5), 1),
    ((16, 33), 0),
    ((3, 5, 2, 8), 3),
]


@pytest.mark.parametrize(
    ("case", "form", "values"),
    [
        ("data", 0, "bfloat16"),
        ("data x expert", 1, "bfloat16"),
        ("experts", 2, "float32"),
        ("data", 3, "float32"),
        ("data x expert", 0, "float32"),
    ],
)
def test_equals_numpy(rng, monkeypatch, case, form, values):
    """Three steps: sums, and what is left on each rank; groups are cut small, one ends early."""
    group = 100
    monkeypatch.setattr(top_k, "LARGEST_GROUP", group)
    (sizes, axes), (shape, dim) = CASES[case], FORMS[form]
    method = TopK(0.1, values=values)
    grads = rng.standard_normal((3, sizes.data, sizes.expert, *shape)).astype(np.float32)
    pieces, states = reduce_steps(method, sizes, axes, dim, grads)
    got = whole_sums(pieces, axes, dim)
    left = np.zeros(grads.shape[1:], np.float32)
    for step, grad in enumerate(grads):
        sent = np.zeros_like(left)
        for rank in np.ndindex(*left.shape[:2]):
            whole = grad[rank] + left[rank]
            sent[rank] = sent_by(whole, dim, sizes.data, method, group)
            left[rank] = whole - sent[rank]
        want = rank_sums(sent[None], axes)[0]
        np.testing.assert_allclose(got[step], want, atol=1e-6 * np.abs(want).max())
        np.testing.assert_array_equal(states[step]["residual"], left)
    meant = rank_sums(grads.sum(0)[None], axes)[0]
    there = got.sum(0) + rank_sums(left[None], axes)[0]
    np.testing.assert_allclose(there, meant, atol=1e-5)


@pytest.mark.parametrize("dim", [None, 1])
def test_all_are_sent(rng, dim):
    sizes, axes = CASES["data x expert"]
    grads = rng.standard_normal((2, 4, 2, 6, 12)).astype(np.float32)
    pieces, states = reduce_steps(TopK(1.0, values="float32"), sizes, axes, dim, grads)
    np.testing.assert_allclose(whole_sums(pieces, axes, dim), rank_sums(grads, axes), atol=1e-5)
    assert not states[-1]["residual"].any()


def test_zeros_ties_and_experts_without_tokens(rng):
    """Equal numbers: the first are sent, the others wait their turn; nothing comes of nothing."""
    sizes, axes = CASES["data"]
    grads = np.zeros((6, 8, 1, 4, 5), np.float32)
    grads[0, :, :, 2] = 1.0
    pieces, states = reduce_steps(TopK(0.05), sizes, axes, None, grads)  # one number a step
    got = whole_sums(pieces, axes, None)[:, 0]
    for step in range(5):
        want = np.zeros((4, 5))
        want[2, step] = 8
        np.testing.assert_array_equal(got[step], want)
    assert not got[5].any() and not states[-1]["residual"].any()


def test_ranks_choose_different_numbers(rng):
    """Few places named by all ranks, and each rank's own: sums are over whoever sent."""
    sizes, axes = CASES["experts"]
    grads = np.zeros((1, 4, 2, 8, 8), np.float32)
    grads[..., 0, 0] = 5
    for data in range(4):
        grads[:, data, :, 7, data] = 1 + data
    pieces, _ = reduce_steps(TopK(2 / 64), sizes, axes, None, grads)
    want = np.zeros((8, 8))
    want[0, 0], want[7, :4] = 20, [1, 2, 3, 4]
    np.testing.assert_array_equal(whole_sums(pieces, axes, None)[0], np.stack([want, want]))


@pytest.mark.parametrize("dim", [None, 0])
def test_warm_up_is_exact(rng, dim):
    sizes, axes = CASES["data x expert"]
    grads = rng.standard_normal((3, 4, 2, 8, 9)).astype(np.float32)
    pieces, states = reduce_steps(TopK(0.1, warmup_steps=2), sizes, axes, dim, grads)
    got, want = whole_sums(pieces, axes, dim), rank_sums(grads, axes)
    np.testing.assert_allclose(got[:2], want[:2], atol=1e-5)
    assert not states[1]["residual"].any() and states[2]["residual"].any()
    assert np.count_nonzero(got[2]) < want[2].size


@pytest.mark.parametrize("values", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("shape", "dim"), [*FORMS, ((1, 300, 1000), 2)])
def test_bytes_equal_the_formula(case, shape, dim, values):
    sizes, axes = CASES[case]
    by_axis = {a: getattr(sizes, a) for a in axes}
    method = TopK(0.02, values=values)
    expected = bytes_sent(method.crossings(shape, by_axis, dim), by_axis)
    assert counted_bytes(method, sizes, axes, dim, shape) == pytest.approx(expected)
    assert expected == pytest.approx(_bytes_by_hand(shape, dim, by_axis, values))


def _bytes_by_hand(shape, dim, by_axis, values):
    rows, ranks = (1 if dim is None else by_axis[DATA]), np.prod(list(by_axis.values()))
    numbers = np.prod(shape) // rows
    groups = -(-numbers // 65536)
    size = -(-numbers // groups)
    whole = rows * groups * max(1, round(0.02 * size)) * (4 if values == "bfloat16" else 6)
    if dim is None:
        return (ranks - 1) * whole
    return (1 - 1 / rows + ranks / rows - 1) * whole


def test_bytes_with_a_warm_up_are_those_of_the_larger_branch():
    sizes, axes = CASES["data"]
    method = TopK(0.01, warmup_steps=5)
    for dim in (None, 0):
        expected = bytes_sent(method.crossings((64, 64), {DATA: 8}, dim), {DATA: 8})
        assert counted_bytes(method, sizes, axes, dim, (64, 64)) == pytest.approx(expected)
        assert expected == (1 if dim == 0 else 2) * 7 / 8 * 4 * 64 * 64


@pytest.mark.parametrize("warmup", [0, 1])
def test_momentum(rng, warmup):
    """Velocities pile up, and start anew where they are sent; the warm-up sends and keeps all."""
    sizes, axes, shape, dim = *CASES["data x expert"], (8, 12), 0
    b = 0.75
    method = TopK(0.1, momentum=b, warmup_steps=warmup, values="float32")
    grads = rng.standard_normal((4, 4, 2, *shape)).astype(np.float32)
    pieces, states = reduce_steps(method, sizes, axes, dim, grads)
    got = whole_sums(pieces, axes, dim)
    u, v = np.zeros(grads.shape[1:]), np.zeros(grads.shape[1:])
    for step, grad in enumerate(grads):
        u = b * u + (1 - b) * grad
        v = v + u
        sent = v.copy()
        for rank in np.ndindex(4, 2) if step >= warmup else ():
            sent[rank] = sent_by(v[rank], dim, 4, method, 1 << 16)
        v = v - sent
        u = u if step < warmup else np.where(sent != 0, 0, u)
        np.testing.assert_allclose(got[step], rank_sums(sent[None], axes)[0], atol=2e-5)
        np.testing.assert_allclose(states[step]["residual"], v, atol=1e-5)
        np.testing.assert_allclose(states[step]["momentum"], u, atol=1e-5)


def test_refused():
    for density in (0.0, 1.5):
        with pytest.raises(UserError, match=f"density={density}: must be greater than 0"):
            TopK(density)
    with pytest.raises(UserError, match=r"momentum=1\.0: must be at least 0"):
        TopK(momentum=1.0)
    with pytest.raises(UserError, match="values='int8'"):
        TopK(values="int8")
    with pytest.raises(UserError, match="warmup_steps=-1"):
        TopK(warmup_steps=-1)
