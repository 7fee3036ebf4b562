"""The Hopper kernels: interpreted on a CPU against float64 numpy, and lowered for CUDA.

On a GPU of capability 9.0 the same tests run the compiled kernels (`make test-gpu`).
"""

import jax
import numpy as np
import pytest
from backend_cases import fused_problem
from jax import numpy as jnp
from kernel_support import (
    ON_GPU,
    distinct_ids,
    draw,
    layer,
    lowered_train_step,
    needs_transposes,
    oracle,
    run,
    wide,
)
from oracle import relative_error

from pallas_kernels import backends
from pallas_kernels.fused_experts import api as fused
from pallas_kernels.fused_experts.mosaic_gpu import up
from pallas_kernels.grouped_matmul import api, mosaic_gpu
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.hopper.config import RowsConfig
from pallas_kernels.route import api as route
from sharding.mesh import MeshShape


@needs_transposes
@pytest.mark.parametrize("k,n", [(192, 320)])
def test_grouped_matmul(rng, k, n):
    """With empty groups and rows past the last one, which come out zero."""
    sizes = np.array([0, 128, 0, 256, 0], np.int32)
    lhs, rhs, ct = draw(rng, 640, k), draw(rng, 5, k, n), draw(rng, 640, n)
    lhs[384:] = ct[384:] = 0

    def function(lhs, rhs, ct):
        def product(lhs, rhs):
            return api.grouped_matmul(lhs, rhs, sizes, alignment=128, backend="mosaic_gpu")

        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(ct)

    out, lhs_ct, rhs_ct = run(function, lhs, rhs, ct)
    lhs, rhs, ct = wide(lhs, rhs, ct)
    for g, rows in ((1, slice(0, 128)), (3, slice(128, 384))):
        assert relative_error(out[rows], lhs[rows] @ rhs[g]) < 5e-3
        assert relative_error(lhs_ct[rows], ct[rows] @ rhs[g].T) < 5e-3
        assert relative_error(rhs_ct[g], lhs[rows].T @ ct[rows]) < 5e-3
    assert not rhs_ct[[0, 2, 4]].any() and not out[384:].any() and not lhs_ct[384:].any()


def test_gather_out_of_range_is_zero(rng):
    lhs, rhs = draw(rng, 7, 64), draw(rng, 1, 64, 64)
    index = rng.integers(0, 7, 128).astype(np.int32)
    index[[3, 127]] = 7, -1
    sizes = np.array([128], np.int32)

    def function(lhs, rhs):
        return mosaic_gpu.grouped_matmul(lhs, rhs, jnp.asarray(sizes), index_M=jnp.asarray(index))

    out = run(function, lhs, rhs)
    assert not out[[3, 127]].any()
    keep = (index >= 0) & (index < 7)
    lhs, rhs = wide(lhs, rhs)
    assert relative_error(out[keep], lhs[index[keep]] @ rhs[0]) < 5e-3


@pytest.mark.parametrize(
    "d_model,hidden,activation",
    [(2048, 1408, "swiglu"), (192, 320, "gelu"), (64, 64, "geglu"), (128, 64, "swiglu_oai")],
)
def test_lowering_for_cuda(d_model, hidden, activation):
    """Forward and backward become CUDA programs on a machine without a GPU."""
    parts = fused.ACTIVATIONS[activation].parts
    bf16, i32 = jnp.bfloat16, jnp.int32
    shape = jax.ShapeDtypeStruct
    args = (
        shape((1000, d_model), bf16),
        shape((16, d_model, parts, hidden), bf16),
        shape((16, hidden, d_model), bf16),
        shape((1000, 8), jnp.float32),
        shape((1000, 8), i32),
        shape((10112,), i32),
        shape((16,), i32),
    )

    def loss(x, w_in, w_out, scores, place, copy, sizes):
        out = fused.fused_experts(
            x,
            w_in,
            w_out,
            scores,
            place,
            copy,
            sizes,
            activation=activation,
            backend="mosaic_gpu",
        )
        return jnp.sum(out.astype(jnp.float32))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    text = jax.export.export(gradient, platforms=["cuda"])(*args).mlir_module()
    assert text.count("mosaic_gpu") >= 6
    assert "multimem" not in text


@needs_transposes
def test_rows_gathered_beforehand(rng, monkeypatch):
    monkeypatch.setattr(fused, "WIDE", 64)
    case = fused_problem(rng, distinct_ids(rng, 3, 40, 2), slots=3, d_model=128, hidden=128)
    case.check(case.run("mosaic_gpu"))


def test_explanations():
    case = fused.Case(128, 64, "swiglu", jnp.bfloat16)
    if not ON_GPU:
        assert fused.explain(case) == (
            "fused_experts: grouped; not mosaic_gpu: the device is 'cpu', no NVIDIA GPU of "
            "capability 9.0; not mosaic_tpu: hidden=64 is no multiple of 128"
        )
    for changed, reason in (
        (fused.Case(160, 64, "swiglu", jnp.bfloat16), "d_model=160 is no multiple of 64"),
        (fused.Case(128, 44, "swiglu", jnp.bfloat16), "hidden=44 is no multiple of 64"),
        (fused.Case(128, 64, "swiglu", jnp.float32), "operands are float32, not bfloat16"),
        (fused.Case(128, 64, "swiglu", jnp.bfloat16, bias=True), "the experts have biases"),
        (fused.Case(128, 64, "mish", jnp.bfloat16), "activation 'mish' is none of swiglu"),
    ):
        assert reason in fused.refusal("mosaic_gpu", changed, forced=True)
    with pytest.raises(NotImplementedError, match="unknown backend 'triton'"):
        zeros = jnp.zeros((1, 1), jnp.int32)
        bf16 = jnp.zeros((1, 64), jnp.bfloat16)
        fused.fused_experts(
            bf16,
            jnp.zeros((1, 64, 2, 64), jnp.bfloat16),
            jnp.zeros((1, 64, 64), jnp.bfloat16),
            jnp.ones((1, 1)),
            zeros,
            zeros[0],
            zeros[0],
            activation="swiglu",
            backend="triton",
        )


@pytest.mark.parametrize("backend", ["grouped", "reference"])
def test_in_float32(rng, backend):
    """What serves any platform, with its gradients."""
    inputs = layer(rng, slots=3, tokens=12, copies=2, d_model=16, hidden=8, parts=2)
    arrays = [np.asarray(inputs[k], np.float32) for k in ("x", "w_in", "w_out", "scores")]
    ct = rng.normal(size=inputs["x"].shape).astype(np.float32)

    @jax.jit
    def function(*arrays):
        def forward(*arrays):
            maps = (inputs["place"], inputs["copy"], inputs["sizes"])
            return fused.fused_experts(*arrays, *maps, activation="swiglu", backend=backend)

        out, pull = jax.vjp(forward, *arrays)
        return out, *pull(ct)

    want, wanted = oracle(inputs, ct, "swiglu")
    for got, expected in zip(function(*arrays), (want, *wanted)):
        assert relative_error(got, expected) < 2e-6


def test_nothing_to_compute():
    bf16, none = jnp.bfloat16, jnp.zeros((0, 2), jnp.int32)
    weights = jnp.ones((1, 64, 2, 64), bf16), jnp.ones((1, 64, 64), bf16)
    maps = jnp.zeros((0, 2)), none, jnp.zeros((128,), jnp.int32), jnp.zeros((1,), jnp.int32)
    out = fused.fused_experts(jnp.zeros((0, 64), bf16), *weights, *maps, activation="swiglu")
    assert out.shape == (0, 64) and out.dtype == bf16


@pytest.mark.parametrize(
    "w_in,w_out,dtype,message",
    [
        ((1, 64, 2, 64), (1, 128, 64), "bfloat16", r"must be \[R, D\], \[S, D, 2, H\]"),
        ((1, 128, 2, 64), (1, 64, 128), "bfloat16", r"rows \[4, 64\] with projections"),
        ((1, 64, 1, 64), (1, 64, 64), "bfloat16", "for swiglu"),
        ((1, 64, 2, 64), (1, 64, 64), "float32", "must be of one dtype"),
        ((2, 64, 2, 64), (2, 64, 64), "bfloat16", "sizes of 1 slots for 2 matrices"),
    ],
)
def test_operands_that_do_not_match(w_in, w_out, dtype, message):
    place = jnp.zeros((4, 1), jnp.int32)
    with pytest.raises(ValueError, match=message):
        fused.fused_experts(
            jnp.zeros((4, 64), jnp.bfloat16),
            jnp.zeros(w_in, dtype),
            jnp.zeros(w_out, dtype),
            jnp.ones((4, 1)),
            place,
            jnp.zeros((128,), jnp.int32),
            jnp.array([128], jnp.int32),
            activation="swiglu",
        )


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="stages=1"):
        RowsConfig(tile_n=64, sms=1, stages=1)
    with pytest.raises(ValueError, match="tiles of 128 columns do not divide the hidden width 192"):
        up(
            jnp.zeros((128, 64), jnp.bfloat16),
            jnp.zeros((1, 64, 2, 192), jnp.bfloat16),
            jnp.array([128], jnp.int32),
            activation="swiglu",
            keep=False,
            config=RowsConfig(tile_n=256, sms=1),
        )


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(1, 2, 2)], ids=str)
def test_train_step_with_the_kernels_lowers(mesh, monkeypatch):
    """A whole step with the kernels, as a GPU would choose them."""
    for module in (backends, route):
        monkeypatch.setattr(
            module, "hopper_refusal", lambda dtype, forced: hopper_refusal(dtype, forced=True)
        )
    text = lowered_train_step(mesh, "cuda")
    for name in ("experts_up", "experts_down_backward", "rows_gradient", "w_in_gradient"):
        assert name in text
    assert "top_k" in text and "sorted_places" in text
