"""The exchange's backends on fake devices, against loops over numpy arrays; bit for bit.

The TPU kernel runs in the interpreter, which looks for races and fills what nobody wrote with nan.
`ragged` runs on no CPU: its collective is stood in for by what JAX's documentation says it does.
"""

from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
from exchange_kernel_support import pull_through, sharded
from jax import lax
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.exchange import api, mosaic_tpu
from pallas_kernels.interpreting import interpreted, is_interpreted

BFLOAT16 = ml_dtypes.bfloat16
W = 128
KERNEL = partial(api.exchange_buckets, axis="expert", backend="mosaic_tpu")
REFERENCE = partial(api.exchange_buckets, axis="expert", backend="reference")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, capfd):
    """The interpreter only prints what it finds: races, and semaphores that are not zero."""
    set_interpreter(monkeypatch)
    yield
    said = capfd.readouterr().out
    assert "RACE" not in said and "non-zero count" not in said, said


def set_interpreter(monkeypatch, **options):
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", **options)
    monkeypatch.setattr(mosaic_tpu, "interpret_mode", lambda: is_interpreted() and params)


def run(function, *arrays):
    """Arrays and results are by device: [N, ...], that is [N·n, ...] inside."""
    with interpreted():
        out = function(*(a.reshape(-1, *a.shape[2:]) for a in arrays))
    return jax.tree.map(lambda a: np.asarray(a).reshape(len(arrays[0]), -1, *a.shape[1:]), out)


def draw_rows(rng, *shape, dtype):
    if np.issubdtype(dtype, np.integer):
        return rng.integers(np.iinfo(dtype).max, size=shape, dtype=dtype)
    return rng.normal(size=shape).astype(dtype)


def draw_counts(rng, devices, capacity):
    """Empty and full buckets among them."""
    counts = rng.integers(0, capacity + 1, (devices, devices))
    edge = rng.random(counts.shape)
    return np.where(edge < 0.2, 0, np.where(edge > 0.8, capacity, counts)).astype(np.int32)


def spoil(rows, counts):
    """What is not filled, replaced by nan or the largest integer."""
    rows, garbage = rows.copy(), np.nan
    if np.issubdtype(rows.dtype, np.integer):
        garbage = np.iinfo(rows.dtype).max
    for bucket, count in zip(rows.reshape(-1, *rows.shape[-2:]), counts.ravel()):
        bucket[count:] = garbage
    return rows


def brute(rows, counts):
    """[source, destination, C, W] → [destination, source, C, W], zero where nothing was sent."""
    out = np.zeros_like(rows)
    for source, destination in np.ndindex(counts.shape):
        filled = slice(0, counts[source, destination])
        out[destination, source, filled] = rows[source, destination, filled]
    return out


def same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert np.array_equal(got.view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize(
    "devices,dtype,capacity,piece_rows,options",
    [
        (2, np.uint8, 160, 128, {}),  # a piece, a tile
        (3, np.float32, 40, 16, {"dma_execution_mode": "eager"}),  # two pieces, a tile
        (3, np.int32, 5, 128, {}),  # padded
        (4, BFLOAT16, 48, 32, {"dma_execution_mode": "eager"}),
        (8, np.uint8, 64, 32, {}),
        (1, np.float32, 16, 128, {}),
    ],
)
def test_rows_arrive(rng, monkeypatch, devices, dtype, capacity, piece_rows, options):
    monkeypatch.setattr(mosaic_tpu, "PIECE_ROWS", piece_rows)
    set_interpreter(monkeypatch, **options)
    kernel, reference = (sharded(f, expert=devices) for f in (KERNEL, REFERENCE))
    all_full = np.full((devices, devices), capacity, np.int32)
    for counts in (0 * all_full, all_full, *(draw_counts(rng, devices, capacity) for _ in "12")):
        rows = draw_rows(rng, devices, devices, capacity, W, dtype=dtype)
        for function in (kernel, reference):
            received, arrived = run(function, spoil(rows, counts), counts)
            same_bits(received, brute(rows, counts))
            same_bits(arrived, counts.T.copy())


def test_what_travels(rng):
    """Filled rows, those in a tile with the last one, and nothing else: the kernel as it is."""
    devices, capacity = 3, 48
    tile = mosaic_tpu.tile_rows(BFLOAT16)
    rows = draw_rows(rng, devices, devices, capacity, W, dtype=BFLOAT16)
    counts = np.array([[0, 1, tile], [tile + 1, 48, 5], [47, 0, 3 * tile]], np.int32)
    kernel = sharded(partial(mosaic_tpu.exchange_buckets, axis="expert"), expert=devices)
    received, _ = run(kernel, rows, counts)
    for source, destination in np.ndindex(counts.shape):
        sent = -(-counts[source, destination] // tile) * tile
        same_bits(received[destination, source, :sent], rows[source, destination, :sent])
        assert np.isnan(received[destination, source, sent:].astype(np.float32)).all()


def test_counts_are_clamped(rng):
    rows = draw_rows(rng, 2, 2, 8, W, dtype=np.float32)
    counts = np.array([[-3, 9], [2**31 - 1, -(2**31)]], np.int32)
    clamped = np.clip(counts, 0, 8)
    for function in (KERNEL, REFERENCE):
        received, arrived = run(sharded(function, expert=2), rows, counts)
        same_bits(received, brute(rows, clamped))
        same_bits(arrived, clamped.T.copy())


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32])
def test_gradients(rng, dtype):
    """They travel back; what they hold for rows that were not received does not matter."""
    devices, capacity = 4, 32
    kernel, reference = (
        sharded(partial(pull_through, f), expert=devices) for f in (KERNEL, REFERENCE)
    )
    for _ in range(2):
        rows = draw_rows(rng, devices, devices, capacity, W, dtype=dtype)
        ct = draw_rows(rng, devices, devices, capacity, W, dtype=dtype)
        counts = draw_counts(rng, devices, capacity)
        inputs = spoil(rows, counts), counts, spoil(ct, counts.T)
        back = brute(ct, counts.T)
        assert back.any()
        for function in (kernel, reference):
            received, rows_ct, _ = run(function, *inputs)
            same_bits(received, brute(rows, counts))
            same_bits(rows_ct, back)


def test_integers_have_no_gradient(rng):
    """Beside what has one, as scores beside a payload."""
    rows = draw_rows(rng, 2, 2, 32, W, dtype=np.uint8)

    def body(rows, counts, scale):
        def loss(scale):
            received, arrived = KERNEL(rows, counts)
            return jnp.sum(received.astype(jnp.float32)) * scale[0, 0], arrived

        return jax.grad(loss, has_aux=True)(scale)[0]

    counts = draw_counts(rng, 2, 32)
    gradient = run(sharded(body, expert=2), rows, counts, np.ones((2, 1, 1), np.float32))
    want = brute(rows, counts).sum(axis=(1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(gradient[:, 0, 0], want, rtol=1e-6)


def test_many_in_a_row(rng):
    """Layers in a scan, with other counts each, differentiated; beside them one that is free."""
    devices, capacity, layers = 3, 16, 3
    rows, ct, other = (
        draw_rows(rng, devices, devices, capacity, W, dtype=np.float32) for _ in "123"
    )
    counts = np.stack([draw_counts(rng, devices, capacity) for _ in range(layers)], axis=1)

    def body(rows, counts_LG, ct, other):
        counts_LG = counts_LG.reshape(layers, devices)

        def forward(rows):
            return lax.scan(lambda r, counts: (KERNEL(r, counts)[0], None), rows, counts_LG)[0]

        free, arrived = KERNEL(other, counts_LG[0])
        received, pull = jax.vjp(forward, rows)
        return received, pull(ct)[0], free, KERNEL(free, arrived)[0]

    got = run(sharded(body, expert=devices), rows, counts.reshape(devices, -1), ct, other)
    want, back, free = rows, ct, brute(other, counts[:, 0])
    for layer in range(layers):
        want = brute(want, counts[:, layer])
        back = brute(back, counts[:, layers - 1 - layer].T)
    for a, b in zip(got, (want, back, free, brute(free, counts[:, 0].T))):
        same_bits(a, b)


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "expert": 4},
        {"expert": 4, "data": 2},
        {"data": 2, "expert": 2, "tensor": 2},
    ],
    ids=str,
)
def test_meshes_of_several_axes(rng, axes):
    """Groups along `expert` have their own rows each; then the same along `data`."""
    sizes, names = tuple(axes.values()), tuple(axes)
    first = {"data": "expert", "expert": "data"}
    capacity, kernels = 16, {}
    rows = {n: draw_rows(rng, 8, axes[n], capacity, W, dtype=np.float32) for n in first}
    counts = {n: rng.integers(0, capacity + 1, (8, axes[n])).astype(np.int32) for n in first}

    def body(*inputs):
        for n, rows, counts in zip(first, inputs[::2], inputs[1::2]):
            kernels[n] = api.exchange_buckets(rows, counts, n, backend="mosaic_tpu")
        return kernels

    got = run(sharded(body, **axes), *(a[n] for n in first for a in (rows, counts)))
    ids = np.arange(8).reshape(sizes)
    for n in first:
        received, arrived = got[n]
        for group in np.moveaxis(ids, names.index(n), -1).reshape(-1, axes[n]):
            same_bits(received[group], brute(rows[n][group], counts[n][group]))
            same_bits(arrived[group], counts[n][group].T.copy())


def documented_ragged_all_to_all(operand, output, *offsets_and_sizes, axis_name):
    """What `lax.ragged_all_to_all` is documented to do, by gathering everything."""
    rows, first, sizes, theirs = (
        lax.all_gather(a, axis_name) for a in (operand, *offsets_and_sizes[:3])
    )
    me = lax.axis_index(axis_name)
    arriving = offsets_and_sizes[3]
    index = jnp.arange(len(output), dtype=jnp.int32)
    for source in range(len(rows)):
        start, size = theirs[source, me], sizes[source, me]
        here = (start <= index) & (index < start + size) & (arriving[source] == size)
        taken = rows[source, jnp.where(here, index - start + first[source, me], 0)]
        output = jnp.where(here[:, None], taken, output)
    return output


def test_ragged(rng, monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", documented_ragged_all_to_all)
    exchange = partial(api.exchange_buckets, axis="expert", backend="ragged")
    function = sharded(partial(pull_through, exchange), data=2, expert=4)
    rows, ct = (draw_rows(rng, 2, 4, 4, 16, W, dtype=np.float32) for _ in "12")
    counts = np.stack([draw_counts(rng, 4, 16) for _ in range(2)])
    received, rows_ct, arrived = run(
        function, *(a.reshape(8, *a.shape[2:]) for a in (spoil(rows, counts), counts, ct))
    )
    for d, group in enumerate((slice(0, 4), slice(4, 8))):
        same_bits(received[group], brute(rows[d], counts[d]))
        same_bits(rows_ct[group], brute(ct[d], counts[d].T))
        same_bits(arrived[group], counts[d].T.copy())


def test_choice(rng):
    """On a CPU the reference, also where it is not asked for by name."""
    said = api.explain(jnp.uint8)
    assert said.startswith("exchange_buckets: reference; not mosaic_tpu: the device is 'cpu'")
    assert "not ragged: the device is 'cpu', no TPU" in said
    assert "not mosaic_tpu: rows are float16, not one of uint8" in api.explain(jnp.float16)
    rows, counts = draw_rows(rng, 2, 2, 8, W, dtype=np.float16), draw_counts(rng, 2, 8)
    function = sharded(partial(api.exchange_buckets, axis="expert"), expert=2)
    same_bits(run(function, rows, counts)[0], brute(rows, counts))
    with pytest.raises(NotImplementedError, match="mosaic_tpu: rows are float16"):
        run(sharded(KERNEL, expert=2), rows, counts)


def test_errors():
    rows, counts = jnp.zeros((4, 8, W)), jnp.zeros((4,), jnp.int32)
    for arrays, reason in (
        ((rows, counts[:2]), r"rows \[2, 8, 128\] with counts \[1\] along 'expert'"),
        ((rows[:2], counts), r"rows \[1, 8, 128\] with counts \[2\].*must be \[2, C, W\] and"),
        ((rows[:, 0], counts), r"rows \[2, 128\]"),
        ((rows[:, :0], counts), r"rows \[2, 0, 128\]: there must be some"),
        ((rows, counts.astype(jnp.float32)), "counts of float32: must be int32"),
    ):
        with pytest.raises(ValueError, match=reason):
            sharded(REFERENCE, expert=2)(*arrays)
