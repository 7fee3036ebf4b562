"""The backends of the grouped matmul for any platform against float64 numpy, both directions.

The Hopper kernels, which want larger shapes, are in test_hopper_kernels.py.
"""

from dataclasses import replace
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from oracle import relative_error

from pallas_kernels.grouped_matmul import api, blocked, blocks
from pallas_kernels.grouped_matmul.api import Case, explain, grouped_matmul, row_alignment

BFLOAT16 = ml_dtypes.bfloat16
BACKENDS = ("blocked", "reference")
BOUND = {np.float32: 1e-6, BFLOAT16: 1e-2}


@partial(jax.jit, static_argnames=("alignment", "backend"))
def run_and_pull(lhs, rhs, sizes, ct, alignment, backend):
    def product(lhs, rhs):
        return grouped_matmul(lhs, rhs, sizes, alignment=alignment, backend=backend)

    out, pull = jax.vjp(product, lhs, rhs)
    return out, *pull(ct)


def numpy_grouped(lhs, rhs, sizes, ct):
    lhs, rhs, ct = (a.astype(np.float64) for a in (lhs, rhs, ct))
    out, lhs_ct, rhs_ct = np.zeros_like(ct), np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for g, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = lhs[rows] @ rhs[g]
        lhs_ct[rows] = ct[rows] @ rhs[g].T
        rhs_ct[g] = lhs[rows].T @ ct[rows]
        start += size
    return out, lhs_ct, rhs_ct


def draw(rng, rows, groups, sizes, dtype=np.float32, width=6, out=5):
    """Rows past the last group are zero, as the contract asks."""
    lhs = rng.normal(size=(rows, width)).astype(dtype)
    lhs[sum(sizes) :] = 0
    rhs = rng.normal(size=(groups, width, out)).astype(dtype)
    ct = rng.normal(size=(rows, out)).astype(dtype)
    ct[sum(sizes) :] = 0
    return lhs, rhs, np.asarray(sizes, np.int32), ct


def check(inputs, alignment, backend):
    got = run_and_pull(*inputs, alignment=alignment, backend=backend)
    sizes, dtype = inputs[2], inputs[0].dtype.type
    for name, value, want in zip(("out", "lhs", "rhs"), got, numpy_grouped(*inputs)):
        assert value.dtype == dtype
        error = relative_error(value, want)
        assert error <= BOUND[dtype], f"{name} is off by {error:.1e} of its norm"
    out, lhs_ct, rhs_ct = map(np.asarray, got)
    assert not rhs_ct[sizes == 0].any(), "an empty group's gradient is exactly zero"
    assert not out[sizes.sum() :].any() and not lhs_ct[sizes.sum() :].any()


CASES = {  # rows, sizes, alignment
    "even": (12, (4, 4, 4), 4),
    "empty groups": (20, (0, 8, 0, 0, 12, 0), 4),
    "all rows in one": (16, (0, 16, 0), 8),
    "all rows in the last": (16, (0, 0, 16), 2),
    "one group": (9, (9,), 1),
    "one row": (1, (0, 1), 1),
    "no row at all": (8, (0, 0, 0), 4),
    "trailing unused": (24, (2, 0, 6), 2),
    "nothing but padding after": (256, (128, 0), 128),
    "unaligned": (17, (3, 0, 5, 9), 1),
    "more groups than rows": (4, (0, 1, 0, 0, 2, 0, 0, 1, 0), 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_against_numpy(rng, case, backend):
    rows, sizes, alignment = CASES[case]
    check(draw(rng, rows, len(sizes), sizes), alignment, backend)


@pytest.mark.parametrize("alignment", [16, 32, 64])
def test_alignments(rng, alignment):
    """Those of `row_alignment` that no case above has, with random sizes."""
    blocks = rng.integers(0, 3, 5)
    rows = (int(blocks.sum()) + 1) * alignment
    check(draw(rng, rows, 5, blocks * alignment), alignment, "blocked")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_any_sizes(blocks, seed):
    """One compiled function for each backend; the sizes are data."""
    inputs = draw(np.random.default_rng(seed), 32, 4, [2 * b for b in blocks])
    for backend in BACKENDS:
        check(inputs, 2, backend)


def test_float32_accumulation(rng):
    """4096 bfloat16 rows of one sign: a bfloat16 sum would stop growing at 256 times a term."""
    lhs, rhs, sizes, ct = draw(rng, 4096, 1, (4096,), BFLOAT16)
    lhs, ct = np.abs(lhs), np.abs(ct)
    for backend in BACKENDS:
        check((lhs, rhs, sizes, ct), 128, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_do_not_touch(rng, backend):
    """What is not finite in one group stays there: rows, cotangents and matrices."""
    inputs = draw(rng, 24, 3, (8, 8, 8))
    clean = run_and_pull(*inputs, alignment=8, backend=backend)
    lhs, rhs, sizes, ct = (a.copy() for a in inputs)
    lhs[8:16], ct[8:16], rhs[1] = np.nan, np.inf, np.nan
    dirty = run_and_pull(lhs, rhs, sizes, ct, alignment=8, backend=backend)
    for a, b in zip(clean[:2], dirty[:2]):
        assert np.array_equal(a[:8], b[:8]) and np.array_equal(a[16:], b[16:])
        assert not np.isfinite(b[8:16]).any()
    assert np.array_equal(clean[2][0], dirty[2][0]) and np.array_equal(clean[2][2], dirty[2][2])


def test_choice_and_explanation():
    case = Case(64, 6, 5, 8, jnp.float32)
    assert explain(case).startswith("grouped_matmul: blocked; not mosaic_gpu: contraction=6 is")
    assert explain(replace(case, rows=63)) == explain(case), "any number of rows"
    fits = Case(256, 64, 128, 128, jnp.bfloat16)
    if jax.default_backend() == "cpu":
        assert "not mosaic_gpu: the device is 'cpu', no NVIDIA GPU of capability 9.0" in explain(
            fits
        )
    for changed, reason in (
        (replace(fits, dtype=jnp.float32), "operands are float32, not bfloat16"),
        (replace(fits, columns=160), "columns=160 is no multiple of 64"),
        (replace(fits, contraction=32), "contraction=32 is no multiple of 64"),
    ):
        assert reason in explain(changed)


def test_refusals(rng):
    lhs, rhs, sizes, _ = draw(rng, 6, 2, (4, 0))
    with pytest.raises(NotImplementedError, match="mosaic_gpu: contraction=6 is no multiple of"):
        grouped_matmul(lhs, rhs, sizes, alignment=4, backend="mosaic_gpu")
    with pytest.raises(
        NotImplementedError, match=r"unknown backend 'cutlass'; there are mosaic_gpu"
    ):
        grouped_matmul(lhs, rhs, sizes, backend="cutlass")
    out = grouped_matmul(lhs, rhs, jnp.asarray(sizes), alignment=4)  # falls through to blocked
    assert relative_error(out, numpy_grouped(lhs, rhs, sizes, np.zeros((6, 5)))[0]) < 1e-6


@pytest.mark.parametrize("rows,groups", [(1, 1), (7, 8), (64, 8), (4096, 8), (10**6, 64), (3, 264)])
def test_row_alignment(rows, groups):
    """A power of two, at most 128, whose padding stays below the rows themselves."""
    alignment = row_alignment(rows, groups, 64, 64, jnp.bfloat16)
    assert alignment in (1, 2, 4, 8, 16, 32, 64, 128)
    assert groups * (alignment - 1) < max(rows, 2)


@pytest.mark.parametrize("popular", [0, 3, None])
def test_gradient_of_skewed_groups(rng, popular):
    """All rows in one group, or most of them in three."""
    sizes = np.zeros(16, np.int32)
    if popular is None:
        sizes[[2, 9, 10]] = 700, 250, 50
    else:
        sizes[popular] = 1000
    lhs, ct = (rng.normal(size=(1010, n)).astype(np.float32) for n in (24, 8))
    gradient = jax.jit(lambda *a: blocked.weights_gradient(*a, 4, np.float32))
    got = gradient(jnp.asarray(lhs), jnp.asarray(ct), jnp.asarray(sizes))
    want = np.zeros((16, 24, 8))
    for g, (start, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes)):
        rows = slice(start, start + size)
        want[g] = lhs[rows].astype(np.float64).T @ ct[rows]
    assert relative_error(got, want) < 1e-6
    assert not np.asarray(got)[sizes == 0].any()


def test_operands_that_do_not_match():
    f32 = jnp.float32
    sizes = jnp.array([4], jnp.int32)
    for lhs, rhs, message in (
        ((4, 8), (1, 16, 2), r"rows \[4, 8\] with matrices \[1, 16, 2\]"),
        ((4, 8), (8, 2), r"must be \[M, K\] and \[G, K, N\]"),
    ):
        with pytest.raises(ValueError, match=message):
            api.grouped_matmul(jnp.zeros(lhs, f32), jnp.zeros(rhs, f32), sizes)
    with pytest.raises(ValueError, match="float32 with matrices of bfloat16"):
        api.grouped_matmul(jnp.zeros((4, 8)), jnp.zeros((1, 8, 2), jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match="alignment=0"):
        api.grouped_matmul(jnp.zeros((4, 8)), jnp.zeros((1, 8, 2)), sizes, alignment=0)
    for offset in (np.int32(-1), np.int32(1), jnp.int32(7)):
        with pytest.raises(ValueError, match=r"group_offset .* it can be from 0 to 0"):
            api.grouped_matmul(jnp.zeros((4, 8)), jnp.zeros((1, 8, 2)), sizes, group_offset=offset)
    assert api.grouped_matmul(jnp.ones((4, 0)), jnp.ones((1, 0, 2)), sizes).shape == (4, 2)


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_blocks_in_batches(rng, monkeypatch, alignment, batch):
    """Where copies of all blocks' matrices were too much: some at a time, the last ones fewer."""
    rows, sizes, width, out = 64, [24, 0, 8, 16], 128, 96
    inputs = draw(rng, rows, len(sizes), sizes, width=width, out=out)

    def product(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, alignment=alignment, backend="blocked")

    def made():
        lhs, rhs, sizes, ct = map(jnp.asarray, inputs)
        out, pull = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)
        compiled = jax.jit(lambda *args: product(*args)).lower(*inputs[:3]).compile()
        return (out, *pull(ct)), compiled.memory_analysis().temp_size_in_bytes

    whole, many_bytes = made()
    monkeypatch.setattr(blocks, "MOST_COPIED", batch * width * out * 4)
    some, few_bytes = made()
    for got, want in zip(some, whole, strict=True):
        assert relative_error(got, want) < 1e-6
    assert few_bytes < 0.7 * many_bytes
