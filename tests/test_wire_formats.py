"""Rounding on the wire, against numpy: values, gradients, bytes, and whole layers."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from oracle import relative_error
from standalone_support import output_and_gradients
from wire_support import large_rows_alone, run_sharded  # noqa: F401 (a fixture)

from moejax.config import (
    EXACT_WIRE,
    ExchangeConfig,
    ExpertsConfig,
    MoEConfig,
    RouterConfig,
    WireConfig,
)
from moejax.errors import UserError
from moejax.exchange.codec import decode, encode, encoded_bytes
from moejax.exchange.wire import exchange_rows, gather_tokens, return_rows, row_bytes
from moejax.standalone import ShardedMoELayer
from sharding.mesh import EXPERT, MeshShape, make_mesh

LOSSY = ("int8", "float8", "int4")
LARGEST = {"int8": 127, "float8": 448, "int4": 7}


def through(x, form, rotate=False):
    """What arrives, in x's dtype."""
    x = jnp.asarray(x)
    return np.asarray(
        decode(encode(x, form, rotate=rotate), form, x.shape[1], x.dtype, rotate=rotate)
    )


def numpy_through(x, form):
    """Block by block in float64; scales as float32, the nearest value by trying all of them."""
    values = np.arange(-LARGEST[form], LARGEST[form] + 1.0)
    if form == "float8":
        everything = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        values = np.unique(everything[np.isfinite(everything.astype(np.float32))].astype(float))
    out = np.zeros(x.shape)
    for row in range(x.shape[0]):
        for first in range(0, x.shape[1], 128):
            block = x[row, first : first + 128].astype(np.float64)
            scale = float(np.float32(np.abs(block).max()) / np.float32(LARGEST[form])) or 1.0
            nearest = np.abs(block[:, None] / scale - values).argmin(axis=1)
            out[row, first : first + 128] = values[nearest] * scale
    return out


@pytest.mark.parametrize("form", LOSSY)
@pytest.mark.parametrize("width", [128, 300, 7])
def test_rounding(rng, form, width):
    """To the nearest value of each block; ties may go either way."""
    x = rng.normal(size=(5, width)).astype(np.float32) * np.array([[1e-20, 1, 3, 1e20, 0]]).T
    got, want = through(x.astype(np.float32), form), numpy_through(x.astype(np.float32), form)
    distance, least = np.abs(got - x), np.abs(want - x)
    assert np.all(distance <= least * (1 + 1e-5) + 1e-6 * np.abs(x))
    assert not got[4].any() and got[:4].any(axis=1).all()
    parts = encode(jnp.asarray(x, jnp.float32), form)
    assert sum(p.dtype.itemsize * p.shape[1] for p in parts) == encoded_bytes(
        width, jnp.float32, form
    )


@pytest.mark.parametrize("form", LOSSY)
def test_rotation_spreads_an_outlier(rng, form):
    x = rng.normal(size=(8, 256)).astype(np.float32)
    x[:, 5] = 30.0
    plain, rotated = (
        np.linalg.norm((through(x, form, rotate) - x)[:, 6:]) for rotate in (False, True)
    )
    assert np.allclose(
        np.linalg.norm(x, axis=1), np.linalg.norm(through(x, form, True), axis=1), rtol=0.03
    )
    if form != "float8":  # whose steps are fine near zero
        assert rotated < 0.5 * plain


@pytest.mark.parametrize("form", LOSSY)
def test_not_finite_stays_in_its_block(rng, form):
    x = rng.normal(size=(3, 256)).astype(np.float32)
    clean = through(x, form)
    x[1, 3], x[2, 200] = np.nan, np.inf
    got = through(x, form)
    assert np.isnan(got[1, :128]).all() and np.isnan(got[2, 128:]).all()
    assert np.array_equal(got[0], clean[0])
    assert np.array_equal(got[1, 128:], clean[1, 128:])
    assert np.array_equal(got[2, :128], clean[2, :128])


WIRE = WireConfig("int8", "float8", "int4", "int8")


def swapped(x, devices=4):
    """Bucket g of device d ↔ bucket d of device g."""
    return np.swapaxes(x.reshape(devices, devices, -1, x.shape[1]), 0, 1).reshape(x.shape)


@pytest.mark.usefixtures("large_rows_alone")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_each_way_has_its_format(rng, dtype):
    """Rounded as by the codec alone, backwards too; scores and ids exactly."""
    x, x_ct, y, y_ct = (rng.normal(size=(48, 130)).astype(dtype) for _ in range(4))
    scores, scores_ct = (rng.normal(size=(48, 2)).astype(np.float32) for _ in range(2))
    ids = rng.integers(0, 9, (48, 2)).astype(np.int32)
    y_ct = y_ct.astype(np.float32)  # what was rounded arrives in float32

    def body(x, scores, ids, y, x_ct, scores_ct, y_ct):
        def send(x, scores):
            *sent, got = exchange_rows(x, scores, ids, EXPERT, WIRE)
            return tuple(sent), got

        out, pull, got = jax.vjp(send, x, scores, has_aux=True)
        home, pull_home = jax.vjp(lambda y: return_rows(y, EXPERT, WIRE), y)
        return *out, got, *pull((x_ct, scores_ct)), home, *pull_home(y_ct)

    got = run_sharded(body, x, scores, ids, y, x_ct, scores_ct, y_ct)
    want = [
        swapped(through(x, "int8")),
        swapped(scores),
        swapped(ids),
        swapped(through(x_ct, "int4")),
        swapped(scores_ct),
        swapped(through(y.astype(np.float32), "float8")),
        swapped(through(y_ct, "int8").astype(dtype)),
    ]
    for value, expected in zip(got, want):
        assert value.dtype == expected.dtype and value.any()
        assert np.array_equal(value, expected)


@pytest.mark.usefixtures("large_rows_alone")
def test_gathered_tokens(rng):
    x, ct = rng.normal(size=(12, 130)).astype(np.float32), rng.normal(size=(48, 130))
    ct = ct.astype(np.float32)

    def body(x, ct):
        out, pull = jax.vjp(lambda x: gather_tokens(x, EXPERT, WIRE), x)
        return out, *pull(ct)

    out, x_ct = run_sharded(body, x, ct)
    assert np.array_equal(out.reshape(4, 12, 130), np.stack([through(x, "int8")] * 4))
    shares = through(ct, "int4").reshape(4, 4, 3, 130)  # device, token's home, token
    assert np.allclose(x_ct.reshape(4, 3, 130), shares.sum(axis=0), rtol=1e-6, atol=1e-6)


def build(mesh, wire, mode):
    config = MoEConfig(
        RouterConfig(8, 3), ExpertsConfig(32), ExchangeConfig(mode, bucket_rows=4, wire=wire)
    )
    return ShardedMoELayer(128, config, mesh=mesh, rngs=nnx.Rngs(5))


# Norm-relative errors of a round trip of normal blocks: a step is the largest of 128 magnitudes
# (2.8 σ) over the largest value, over √12; e4m3 loses 2.4 %. Two ways, and the products between.
BOUNDS = {"int8": 0.02, "float8": 0.07, "int4": 0.35}


# Every mode and every format in the first tier, every pair of them in the second.
PAIRS = [
    pytest.param(mode, form, marks=() if j == i else pytest.mark.slow)
    for i, mode in enumerate(("all_to_all", "ring", "remote"))
    for j, form in enumerate(BOUNDS)
]


@pytest.mark.parametrize(("mode", "form"), PAIRS)
def test_a_layer(rng, mode, form):
    """Output and gradients are off by rounding, not more, and nothing is zero; several waves."""
    mesh = make_mesh(MeshShape(data=2, expert=4))
    x = jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)
    ct = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def gradients(wire):
        return output_and_gradients(build(mesh, wire, mode), x, ct)

    exact = gradients(EXACT_WIRE)
    for wire in (WireConfig(form, form, form, form), WireConfig(form, form, form, form, True)):
        for got, want in zip(gradients(wire), exact, strict=True):
            assert 1e-4 < relative_error(got, want) < BOUNDS[form]
    forward = WireConfig(form, form)
    assert relative_error(gradients(forward)[0], exact[0]) > 1e-4
    backward = gradients(WireConfig(dispatch_grad=form, combine_grad=form))
    assert np.array_equal(backward[0], exact[0])
    assert all(
        1e-5 < relative_error(g, w) < BOUNDS[form]
        for g, w in zip(backward[1:], exact[1:])
        if np.any(w)
    )


def test_bytes_of_a_token():
    """8 bits and a row a device: 2.5 times fewer bytes than K bfloat16 copies, both directions."""
    d_model, top_k, devices_of_a_token = 2048, 8, 3.66  # 8 of 64 experts on 4 devices
    copies = top_k / devices_of_a_token
    plain = sum(row_bytes(d_model, jnp.bfloat16, 1, EXACT_WIRE)) * top_k
    wire = WireConfig("int8", "int8", "int8", "int8")
    rounded = sum(row_bytes(d_model, jnp.bfloat16, int(np.ceil(copies)), wire))
    assert plain / (rounded * devices_of_a_token) > 4
    # The same rows, 8 or 4 bits: a scale is 3 % of 8 bits.
    same = sum(row_bytes(d_model, jnp.bfloat16, 2, EXACT_WIRE)) / rounded
    four = WireConfig("int4", "int4", "int4", "int4")
    less = plain / top_k * 1.0 / sum(row_bytes(d_model, jnp.bfloat16, 1, four))
    assert 1.9 < same < 2 and 3.7 < less < 4


def test_refusals():
    with pytest.raises(UserError, match="rotate=True: nothing is rounded"):
        WireConfig(rotate=True)
    config = MoEConfig(exchange=ExchangeConfig(wire=WireConfig("int8", rotate=True)))
    with pytest.raises(UserError, match="rows of 64 columns with rotate=True: a rotated"):
        ShardedMoELayer(64, config, mesh=make_mesh(MeshShape()), rngs=nnx.Rngs(0))
    assert dataclasses.asdict(EXACT_WIRE)["dispatch"] == "compute"
