"""Layers whose experts have 8-bit weights, over meshes of fake devices."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from kernel_support import OLD, ON_GPU
from oracle import relative_error

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig
from moejax.errors import UserError
from moejax.placement.arrays import from_slots
from moejax.standalone import ShardedMoELayer
from pallas_kernels import backends
from pallas_kernels.fused_experts import grouped
from pallas_kernels.hopper.compat import interpreted
from pallas_kernels.quantized_experts import api as quantized
from pallas_kernels.quantized_experts import blocked
from pallas_kernels.quantized_experts.format import dequantize, quantize
from sharding.mesh import MeshShape, make_mesh

CONFIG = MoEConfig(router=RouterConfig(num_experts=6, top_k=2), experts=ExpertsConfig(hidden=256))


def build(mesh=None, config=CONFIG, d_model=128):
    mesh = make_mesh(MeshShape()) if mesh is None else mesh
    return ShardedMoELayer(d_model, config, mesh=mesh, rngs=nnx.Rngs(3))


several_devices = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")


def output(moe, x, *placement, **options):
    """Compiled as one: an eager call compiles each of its operations."""
    return jax.jit(lambda x: moe(x, *placement, **options)[0])(x)


def rounded(moe, dtype):
    """The same layer with the weights that quantizing leaves, in float32."""
    bank = moe.layer.bank
    w_in = jnp.swapaxes(bank.w_in[...], 1, 2)
    w_in = jnp.swapaxes(dequantize(quantize(w_in, dtype), jnp.float32), 1, 2)
    bank.w_in.set_value(w_in)
    bank.w_out.set_value(dequantize(quantize(bank.w_out[...], dtype), jnp.float32))
    return moe


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "mesh", [{}, pytest.param({"data": 2, "expert": 2, "tensor": 2}, marks=several_devices)]
)
def test_layer_equals_its_dequantized_weights(rng, dtype, mesh):
    x = jnp.asarray(rng.normal(size=(24, 128)), jnp.float32)
    mesh = make_mesh(MeshShape(**mesh))
    moe = build(mesh)
    plain = output(moe, x)
    moe.layer.quantize_experts(dtype, tensor=mesh.shape["tensor"])
    got = output(moe, x)
    want = output(rounded(build(mesh), jnp.dtype(dtype)), x)
    assert relative_error(got, want) < 1e-6
    # A block's step is its largest magnitude / 127, or an e4m3 value's 1/16 at most.
    assert 1e-4 < relative_error(got, plain) < (0.02 if dtype == "int8" else 0.06)


@several_devices
@pytest.mark.parametrize("rows", ["compute", "float8"])
def test_gaps_between_rows_are_not_read(rng, rows):
    """What nobody sent is nan there: outputs are those of a ring."""
    x = jnp.asarray(rng.normal(size=(32, 128)), jnp.float32)
    found = []
    for mode in ("ring", "remote"):
        config = replace(CONFIG, exchange=ExchangeConfig(mode))
        moe = build(make_mesh(MeshShape(expert=3)), config)
        moe.layer.quantize_experts("float8_e4m3fn", rows=rows)
        found.append(output(moe, x[:30]))
    # Two programs: a product may be rounded before it is added in one, and not in the other.
    np.testing.assert_allclose(*found, rtol=0, atol=2.0**-21 * np.abs(found[0]).max())
    assert np.isfinite(found[1]).all()


def test_float8_rows(rng):
    x = jnp.asarray(rng.normal(size=(24, 128)), jnp.float32)
    moe = build()
    plain = output(moe, x)
    moe.layer.quantize_experts("float8_e4m3fn", rows="float8")
    assert 0.01 < relative_error(output(moe, x), plain) < 0.07


@several_devices
def test_with_copies_of_experts(rng):
    """Quantized weights are gathered like others."""
    mesh = make_mesh(MeshShape(expert=2))
    x = jnp.asarray(rng.normal(size=(16, 128)), jnp.float32)
    moe = build(mesh)
    moe.layer.quantize_experts("int8")
    slots = np.array([0, 1, 2, 0, 3, 4, 5, 3], np.int32)
    got = output(moe, x, from_slots(slots, 6))
    assert relative_error(got, output(moe, x)) < 1e-6


def test_it_has_no_parameters_but_the_routers():
    moe = build()
    moe.layer.quantize_experts("int8")
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(moe, nnx.Param))}
    assert names == {"layer/router/w_DE"}


@pytest.mark.skipif(OLD, reason="jax 0.10 cannot interpret the kernels")
@pytest.mark.parametrize(
    "dtype,rows", [("int8", "compute"), ("float8_e4m3fn", "float8"), (None, "")]
)
def test_layer_on_its_kernels(rng, monkeypatch, dtype, rows):
    """The whole layer with Hopper kernels, with masked tokens that hold NaN, against without."""
    x = rng.normal(size=(24, 128)).astype(np.float32)
    mask = rng.random(24) < 0.8
    x[~mask] = np.nan
    x = jnp.asarray(x, jnp.bfloat16)

    def run():
        moe = build()
        if dtype is not None:
            moe.layer.quantize_experts(dtype, rows=rows)
        return np.asarray(output(moe, x, token_mask=jnp.asarray(mask)), np.float32)

    with nullcontext() if ON_GPU else interpreted(), monkeypatch.context() as patch:
        for module in (backends, quantized):
            patch.setattr(module, "hopper_refusal", lambda *_, **__: None)
        patch.setattr(grouped, "fused_experts", None)  # nothing else is called
        patch.setattr(blocked, "quantized_experts", None)
        got = run()
    if ON_GPU:
        monkeypatch.setattr(backends, "hopper_refusal", lambda *_, **__: "forced")
        monkeypatch.setattr(quantized, "hopper_refusal", lambda *_, **__: "forced")
    want = run()
    assert not got[~mask].any() and np.isfinite(got).all()
    assert relative_error(got[mask], want[mask]) < 1e-2


def test_refusals():
    with pytest.raises(UserError, match="bias=True: only experts without biases"):
        build(config=MoEConfig(experts=ExpertsConfig(bias=True))).layer.quantize_experts("int8")
    with pytest.raises(UserError, match="hidden=256 over tensor=4 devices"):
        build().layer.quantize_experts("int8", tensor=4)
    with pytest.raises(UserError, match="rows='float8' with int8 weights"):
        build().layer.quantize_experts("int8", rows="float8")
    for dtype, rows in (("float8_e4m3fn", "float8"), ("int8", "compute")):
        moe = build()
        moe.layer.quantize_experts(dtype, rows=rows)
        with pytest.raises(NotImplementedError, match="no gradient"):
            jax.grad(lambda x, moe=moe: jnp.sum(output(moe, x)))(jnp.ones((4, 128)))
        with pytest.raises(UserError, match="quantized already"):
            moe.layer.quantize_experts("int8")


@several_devices
def test_a_mesh_that_they_were_not_quantized_for():
    split = build(make_mesh(MeshShape(tensor=2)))
    split.layer.quantize_experts("int8")
    with pytest.raises(UserError, match="quantized for tensor=1 on a mesh of tensor=2: pass"):
        split(jnp.ones((4, 128)))
