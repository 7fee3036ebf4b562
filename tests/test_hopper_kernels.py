"""The Hopper kernels: interpreted on a CPU against float64 numpy, and lowered for CUDA.

On a GPU of capability 9.0 the same tests run the compiled kernels (`make test-gpu`).
"""

import dataclasses
from contextlib import nullcontext

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp
from oracle import relative_error

from moejax.presets import small
from moejax.training.state import Blueprint
from pallas_kernels.fused_experts import api as fused
from pallas_kernels.fused_experts.mosaic_gpu import up
from pallas_kernels.grouped_matmul import api, mosaic_gpu
from pallas_kernels.hopper.compat import hopper_refusal, interpreted
from pallas_kernels.hopper.config import RowsConfig
from pallas_kernels.route import api as route
from sharding.mesh import MeshShape, abstract_mesh
from sharding.planner import trace_step

BFLOAT16 = ml_dtypes.bfloat16
ON_GPU = jax.default_backend() == "gpu"
# The interpreter of 0.10 does not know transposed views of shared memory.
OLD = jax.__version_info__ < (0, 11) and not ON_GPU
needs_transposes = pytest.mark.skipif(OLD, reason="jax 0.10 cannot interpret transposed operands")
PADDED = 128


def run(function, *inputs):
    """Compiled on a GPU, interpreted elsewhere."""
    with nullcontext() if ON_GPU else interpreted():
        return jax.tree.map(np.asarray, jax.jit(function)(*inputs))


def draw(rng, *shape, scale=1.0):
    return (scale * rng.normal(size=shape)).astype(BFLOAT16)


def wide(*arrays):
    return tuple(np.asarray(a, np.float64) for a in arrays)


def layer(rng, *, slots, tokens, copies, d_model, hidden, parts, ids=None):
    """Random experts and assignments, and their places sorted by slot in padded groups."""
    if ids is None:  # a slot more than there are stands for none
        ids = np.stack([rng.permutation(slots + 1)[:copies] for _ in range(tokens)])
    sizes = np.array([-(-np.sum(ids == s) // PADDED) * PADDED for s in range(slots)], np.int32)
    total = int(sizes.sum()) + PADDED  # a tile that no group has
    place, copy = np.full(ids.shape, total, np.int32), np.full(total, ids.size, np.int32)
    for s, start in enumerate(np.cumsum(sizes) - sizes):
        rows, js = np.nonzero(ids == s)
        place[rows, js] = start + np.arange(rows.size)
        copy[place[rows, js]] = rows * ids.shape[1] + js
    return {
        "x": draw(rng, tokens, d_model),
        "w_in": draw(rng, slots, d_model, parts, hidden, scale=d_model**-0.5),
        "w_out": draw(rng, slots, hidden, d_model, scale=hidden**-0.5),
        "scores": rng.random(ids.shape).astype(np.float32) * (ids < slots),
        "place": place,
        "copy": copy,
        "sizes": sizes,
        "ids": ids,
    }


def activation64(name, h):
    """Value [H] and derivatives [N, H] of the projections, by JAX in float64."""
    function = {
        "swiglu": lambda h: jax.nn.silu(h[0]) * h[1],
        "geglu": lambda h: jax.nn.gelu(h[0], approximate=True) * h[1],
        "gelu": lambda h: jax.nn.gelu(h[0], approximate=True),
        "relu2": lambda h: jax.nn.relu(h[0]) ** 2,
    }[name]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        value, pull = jax.vjp(function, jnp.asarray(h))
        return np.asarray(value), np.asarray(pull(jnp.ones_like(value))[0])


def oracle(inputs, ct, name):
    """The layer and all its gradients, one assignment at a time."""
    x, w_in, w_out, scores, ct = wide(*(inputs[k] for k in ("x", "w_in", "w_out", "scores")), ct)
    out, x_ct, w_in_ct, w_out_ct, scores_ct = map(np.zeros_like, (x, x, w_in, w_out, scores))
    for (r, j), s in np.ndenumerate(inputs["ids"]):
        if s >= len(w_in):
            continue
        a, slope = activation64(name, np.einsum("d,dnh->nh", x[r], w_in[s]))
        out[r] += scores[r, j] * (a @ w_out[s])
        a_ct = w_out[s] @ ct[r]
        scores_ct[r, j] = a @ a_ct
        h_ct = slope * (scores[r, j] * a_ct)
        x_ct[r] += np.einsum("nh,dnh->d", h_ct, w_in[s])
        w_in_ct[s] += np.einsum("d,nh->dnh", x[r], h_ct)
        w_out_ct[s] += np.outer(scores[r, j] * a, ct[r])
    return out, (x_ct, w_in_ct, w_out_ct, scores_ct)


CASES = {
    "gated": (dict(slots=3, tokens=40, copies=2, d_model=128, hidden=128, parts=2), "swiglu"),
    "geglu": (dict(slots=2, tokens=20, copies=2, d_model=128, hidden=64, parts=2), "geglu"),
    "plain": (dict(slots=2, tokens=30, copies=1, d_model=64, hidden=192, parts=1), "relu2"),
    "gelu": (dict(slots=1, tokens=9, copies=1, d_model=192, hidden=64, parts=1), "gelu"),
}


@needs_transposes
@pytest.mark.parametrize("case", CASES)
def test_fused_experts(rng, case):
    shapes, name = CASES[case]
    inputs = layer(rng, **shapes)
    ct = draw(rng, *inputs["x"].shape)

    def function(x, w_in, w_out, scores, ct):
        def forward(x, w_in, w_out, scores):
            maps = (inputs["place"], inputs["copy"], inputs["sizes"])
            return fused.fused_experts(
                x, w_in, w_out, scores, *maps, activation=name, backend="mosaic_gpu"
            )

        out, pull = jax.vjp(forward, x, w_in, w_out, scores)
        return out, pull(ct)

    args = (inputs["x"], inputs["w_in"], inputs["w_out"], inputs["scores"], ct)
    out, gradients = run(function, *args)
    want, wanted = oracle(inputs, ct, name)
    assert relative_error(out, want) < 5e-3
    for label, got, expected in zip(("x", "w_in", "w_out", "scores"), gradients, wanted):
        assert relative_error(got, expected) < 6e-3, label
    empty = inputs["sizes"] == 0
    assert not gradients[1][empty].any() and not gradients[2][empty].any()


@pytest.mark.parametrize("ids", [[[2]] * 5, [[0]], [[3]] * 4], ids=["one slot", "one row", "none"])
def test_forward_of_lopsided_assignments(rng, ids):
    """All rows in one slot, one row, no row at all: 3 slots, id 3 is none."""
    inputs = layer(
        rng,
        slots=3,
        tokens=len(ids),
        copies=1,
        d_model=64,
        hidden=64,
        parts=2,
        ids=np.asarray(ids),
    )
    maps = (inputs["place"], inputs["copy"], inputs["sizes"])
    out = run(
        lambda *a: fused.fused_experts(*a, *maps, activation="swiglu", backend="mosaic_gpu"),
        *(inputs[k] for k in ("x", "w_in", "w_out", "scores")),
    )
    want = oracle(inputs, inputs["x"], "swiglu")[0]
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.linalg.norm(out - want) <= 5e-3 * np.linalg.norm(want)


@needs_transposes
@pytest.mark.parametrize("k,n", [(64, 64), (192, 320), (128, 256)])
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
    "d_model,hidden,activation", [(2048, 1408, "swiglu"), (192, 320, "gelu"), (64, 64, "geglu")]
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


@pytest.mark.parametrize("tokens,copies,popular", [(3, 2, False), (40, 1, False), (150, 1, True)])
def test_few_rows_without_gradient(rng, tokens, copies, popular):
    """Tiles that are nearly empty are neither loaded nor stored whole; a popular slot's are."""
    ids = np.zeros((tokens, 1), np.int64) if popular else None
    shapes = dict(slots=3, tokens=tokens, copies=copies, d_model=128, hidden=128, parts=2)
    inputs = layer(rng, **shapes, ids=ids)
    maps = (inputs["place"], inputs["copy"], inputs["sizes"])
    assert inputs["place"].size <= fused.FEW_ROWS * 3
    out = run(
        lambda *a: fused.fused_experts(*a, *maps, activation="swiglu", backend="mosaic_gpu"),
        *(inputs[k] for k in ("x", "w_in", "w_out", "scores")),
    )
    want = oracle(inputs, inputs["x"], "swiglu")[0]
    assert np.linalg.norm(out - want) <= 5e-3 * np.linalg.norm(want)


@needs_transposes
def test_rows_gathered_beforehand(rng, monkeypatch):
    monkeypatch.setattr(fused, "WIDE", 64)
    test_fused_experts(rng, "gated")


def test_explanations():
    case = fused.Case(128, 64, "swiglu", jnp.bfloat16)
    if not ON_GPU:
        assert fused.explain(case) == (
            "fused_experts: not mosaic_gpu: the device is 'cpu', no NVIDIA GPU of capability 9.0; "
            "not mosaic_tpu: hidden=64 is no multiple of 128; grouped products and gathers instead"
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


def test_reference_of_fused_experts(rng):
    """The plain twin on any platform, in float32, with its gradients."""
    inputs = layer(rng, slots=3, tokens=12, copies=2, d_model=16, hidden=8, parts=2)
    arrays = [np.asarray(inputs[k], np.float32) for k in ("x", "w_in", "w_out", "scores")]
    ct = rng.normal(size=inputs["x"].shape).astype(np.float32)

    @jax.jit
    def function(*arrays):
        def forward(*arrays):
            maps = (inputs["place"], inputs["copy"], inputs["sizes"])
            return fused.fused_experts(*arrays, *maps, activation="swiglu", backend="reference")

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
            None,
            jnp.array([128], jnp.int32),
            activation="swiglu",
            keep=False,
            config=RowsConfig(tile_n=256, sms=1),
        )


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(1, 2, 2)], ids=str)
def test_train_step_with_the_kernels_lowers(mesh, monkeypatch):
    """Scanned, recomputed layers inside the shard_map, as the presets for GPUs have them."""
    for module in (api, fused, route):
        monkeypatch.setattr(
            module, "hopper_refusal", lambda dtype, forced: hopper_refusal(dtype, forced=True)
        )
    config = small()
    model = dataclasses.replace(config.model, num_layers=2)
    config = dataclasses.replace(config, model=model)
    traced = trace_step(Blueprint(model, abstract_mesh(mesh)), config)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own lowering of attention mixes dtypes
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("experts_up", "experts_down_backward", "rows_gradient", "w_in_gradient"):
        assert name in text
    assert "top_k" in text and "sorted_places" in text
