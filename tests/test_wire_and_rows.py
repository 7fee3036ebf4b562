"""What a row looks like on the wire, and moving rows by gathers, against numpy loops."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp
from wire_support import large_rows_alone, run_sharded  # noqa: F401 (a fixture)

from moejax.config import EXACT_WIRE
from moejax.exchange.wire import exchange_rows, pack, row_bytes, unpack
from pallas_kernels.row_map import RowMap, gather_rows, sum_rows
from sharding.mesh import EXPERT

# ---- the wire ---------------------------------------------------------------------------------

WIRE_TYPES = [
    np.float32,
    ml_dtypes.bfloat16,
    np.float16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int32,
    np.int8,
    np.uint8,
]


def test_pack_round_trip(rng):
    """Any bits of any dtype survive, NaNs with payloads among them."""
    widths = rng.integers(1, 6, len(WIRE_TYPES)).tolist()
    parts = [
        rng.integers(0, 256, (7, n * np.dtype(t).itemsize), np.uint8).view(t)
        for n, t in zip(widths, WIRE_TYPES)
    ]
    payload = jax.jit(pack)(parts)
    assert payload.dtype == jnp.uint8
    assert payload.shape == (7, sum(n * np.dtype(t).itemsize for n, t in zip(widths, WIRE_TYPES)))
    layout = list(zip(widths, map(jnp.dtype, WIRE_TYPES)))
    for part, back in zip(parts, jax.jit(lambda p: unpack(p, layout))(payload)):
        assert back.dtype == part.dtype and back.shape == part.shape
        assert np.array_equal(np.asarray(back).view(np.uint8), part.view(np.uint8))


@pytest.mark.usefixtures("large_rows_alone")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_exchange_rows_and_its_gradient(rng, dtype):
    """Bits arrive as they were; cotangents go the same way back, the scores' in float32."""
    devices, rows, width, copies = 4, 3, 5, 2
    shape = (devices, devices, rows)  # source, target, row
    x = rng.normal(size=(*shape, width)).astype(dtype)
    scores = rng.normal(size=(*shape, copies)).astype(np.float32)
    ids = rng.integers(0, 2**31 - 1, (*shape, copies)).astype(np.int32)
    x_ct = rng.normal(size=x.shape).astype(dtype)
    scores_ct = rng.normal(size=scores.shape).astype(np.float32)

    def body(x, scores, ids, x_ct, scores_ct):
        def send(x, scores):
            *sent, received_ids = exchange_rows(x, scores, ids, EXPERT, EXACT_WIRE)
            return tuple(sent), received_ids

        out, pull, received_ids = jax.vjp(send, x, scores, has_aux=True)
        return *out, received_ids, *pull((x_ct, scores_ct))

    flat = [a.reshape(-1, a.shape[-1]) for a in (x, scores, ids, x_ct, scores_ct)]
    got = run_sharded(body, *flat, devices=devices)
    for back, sent in zip(got, (x, scores, ids, x_ct, scores_ct)):
        assert back.dtype == sent.dtype
        want = np.swapaxes(sent, 0, 1).reshape(-1, sent.shape[-1])
        assert np.any(want) and np.array_equal(back, want)

    forward, back, backward, again = row_bytes(width, dtype, copies, EXACT_WIRE)
    assert forward == pack([x[0, 0], scores[0, 0], ids[0, 0]]).shape[1]
    assert back == again == pack([x[0, 0]]).shape[1]
    assert backward == pack([x[0, 0], scores[0, 0]]).shape[1]


# ---- row maps ---------------------------------------------------------------------------------


def draw_map(rng, sources=6, copies=3, num_rows=11):
    """A partial one-to-one map; entries ≥ num_rows are copies that lie nowhere."""
    spots = rng.permutation(np.r_[np.arange(num_rows), np.full(20, num_rows)])
    return spots[: sources * copies].reshape(sources, copies).astype(np.int32), num_rows


def test_row_map_is_its_own_inverse(rng):
    row_NJ, num_rows = draw_map(rng)
    rows = RowMap.from_rows(jnp.asarray(row_NJ), num_rows)
    for row in range(num_rows):
        holders = np.flatnonzero(row_NJ.reshape(-1) == row)
        expected = holders[0] if len(holders) else row_NJ.size
        assert rows.copy_M[row] == expected and rows.source_M[row] == expected // 3
    assert np.array_equal(rows.row_NJ, row_NJ)


@jax.jit
def _gather_and_pull(x, rows, ct):
    y, pull = jax.vjp(lambda x: gather_rows(x, rows), x)
    return y, pull(ct)[0]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_gather_rows(rng, dtype):
    row_NJ, num_rows = draw_map(rng)
    x = rng.normal(size=(6, 4)).astype(dtype)
    ct = rng.normal(size=(num_rows, 4)).astype(dtype)
    want, want_ct = np.zeros((num_rows, 4)), np.zeros((6, 4))
    for n, j in np.argwhere(row_NJ < num_rows):
        want[row_NJ[n, j]] = x[n]
        want_ct[n] += ct[row_NJ[n, j]].astype(np.float64)
    ct[[m for m in range(num_rows) if m not in row_NJ]] = np.nan  # not read
    y, x_ct = _gather_and_pull(x, RowMap.from_rows(jnp.asarray(row_NJ), num_rows), ct)
    assert y.dtype == x_ct.dtype == dtype
    assert np.array_equal(np.asarray(y, np.float64), want)
    tolerance = 1e-6 if dtype == np.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(x_ct, np.float64), want_ct, tolerance, tolerance / 8)


@jax.jit
def _sum_and_pull(y, weights, rows, ct):
    if weights is None:
        out, pull = jax.vjp(lambda y: sum_rows(y, None, rows), y)
        return out, pull(ct)[0], None
    out, pull = jax.vjp(lambda y, w: sum_rows(y, w, rows), y, weights)
    return out, *pull(ct)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_sum_rows(rng, dtype, weighted):
    """Rows that hold no copy may hold anything: they are not read, and get no gradient."""
    row_NJ, num_rows = draw_map(rng)
    y = rng.normal(size=(num_rows, 4)).astype(dtype)
    y[[m for m in range(num_rows) if m not in row_NJ]] = np.nan
    weights = rng.normal(size=(6, 3)).astype(np.float32)
    ct = rng.normal(size=(6, 4)).astype(np.float32)
    want, y_ct, weights_ct = np.zeros((6, 4)), np.zeros((num_rows, 4)), np.zeros((6, 3))
    for n, j in np.argwhere(row_NJ < num_rows):
        weight, row = (weights[n, j] if weighted else 1.0), y[row_NJ[n, j]].astype(np.float64)
        want[n] += weight * row
        y_ct[row_NJ[n, j]] = weight * ct[n]
        weights_ct[n, j] = (row * ct[n]).sum()
    rows = RowMap.from_rows(jnp.asarray(row_NJ), num_rows)
    got = _sum_and_pull(y, weights if weighted else None, rows, ct)
    assert got[0].dtype == jnp.float32 and got[1].dtype == dtype
    np.testing.assert_allclose(got[0], want, 1e-5, 1e-6)
    tolerance = 1e-6 if dtype == np.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(got[1], np.float64), y_ct, tolerance)
    if weighted:
        np.testing.assert_allclose(got[2], weights_ct, 1e-5, 1e-6)


def test_gathers_only():
    """Neither direction scatters activations: only int32 indices are ever scattered."""
    rows = RowMap.from_rows(jnp.arange(6, dtype=jnp.int32).reshape(3, 2), 6)
    x, ct = jnp.ones((3, 4)), jnp.ones((6, 4))
    text = jax.jit(_gather_and_pull).lower(x, rows, ct).as_text()
    text += jax.jit(_sum_and_pull).lower(ct, jnp.ones((3, 2)), rows, x).as_text()
    assert "stablehlo.gather" in text and "stablehlo.scatter" not in text
