"""The TPU kernels: interpreted on a CPU against float64 numpy, and lowered for TPUs.

Where the TPU compiler is installed (the package libtpu) it compiles them too; no TPU is needed.
"""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import SingleDeviceSharding
from kernel_support import (
    BFLOAT16,
    distinct_ids,
    draw,
    lowered_train_step,
    padded_layout,
    wide,
)
from oracle import mlp

from pallas_kernels import backends
from pallas_kernels.fused_experts import api as fused
from pallas_kernels.grouped_matmul import api
from pallas_kernels.tpu import tiles
from pallas_kernels.tpu.compat import interpreted, tpu_refusal
from sharding.mesh import MeshShape

BOUND = {np.float32: 2e-6, BFLOAT16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=["float32", "bfloat16"])
LEAST_TILES = 2**16  # bytes of VMEM


def run(function):
    """Compiled once, in the interpreter: what a kernel does not write is nan."""

    def call(*inputs):
        with interpreted():
            return jax.tree.map(np.asarray, compiled(*inputs))

    compiled = jax.jit(function)
    return call


def check(got, want, bound, label=""):
    assert np.isfinite(got.astype(np.float64)).all(), label
    assert np.linalg.norm(got.astype(np.float64) - want) <= bound * np.linalg.norm(want), label


def product_and_pull(**options):
    def function(lhs, rhs, ct, sizes):
        def product(lhs, rhs):
            return api.grouped_matmul(lhs, rhs, sizes, backend="mosaic_tpu", **options)

        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(ct)

    return run(function)


def check_grouped(function, lhs, rhs, ct, sizes, own=slice(None)):
    """Rows that no group has hold nan, and those of groups without a matrix here too."""
    lhs, ct, ends = lhs.copy(), ct.copy(), np.cumsum(sizes)
    spans = [slice(end - size, end) for size, end in zip(sizes, ends)][own]
    unused = np.ones(len(lhs), bool)
    unused[spans[0].start : spans[-1].stop] = False
    lhs[unused] = ct[unused] = np.nan
    out, lhs_ct, rhs_ct = function(lhs, rhs, ct, np.asarray(sizes, np.int32))
    bound = BOUND[lhs.dtype.type]
    lhs, rhs, ct = wide(lhs, rhs, ct)
    assert not out[unused].any() and not lhs_ct[unused].any()
    for g, rows in enumerate(spans):
        check(out[rows], lhs[rows] @ rhs[g], bound, f"{sizes}: group {g}")
        check(lhs_ct[rows], ct[rows] @ rhs[g].T, bound, f"{sizes}: rows of group {g}")
        check(rhs_ct[g], lhs[rows].T @ ct[rows], bound, f"{sizes}: matrix of group {g}")


@DTYPES
@pytest.mark.parametrize("least_tiles", [True, False])
def test_grouped_matmul(rng, dtype, least_tiles, monkeypatch):
    """Aligned, not aligned, empty, all rows in one, fewer rows than a tile, none; random ones."""
    if least_tiles:
        monkeypatch.setattr(tiles, "vmem_bytes", lambda: LEAST_TILES)
    lhs = draw(rng, 300, 256, dtype=dtype)
    rhs, ct = draw(rng, 5, 256, 384, dtype=dtype), draw(rng, 300, 384, dtype=dtype)
    function = product_and_pull()
    for sizes in (
        (0, 128, 0, 128, 0),
        (3, 0, 130, 64, 0),
        (0, 0, 300, 0, 0),
        (1, 1, 1, 1, 1),
        (0, 0, 0, 0, 0),
        rng.multinomial(290, np.ones(5) / 5),
    ):
        check_grouped(function, lhs, rhs, ct, sizes)


def test_some_groups_have_a_matrix(rng):
    """The others' rows and gradients are zero, whatever they hold."""
    lhs, rhs, ct = draw(rng, 300, 128), draw(rng, 2, 128, 128), draw(rng, 300, 128)
    function = product_and_pull(group_offset=jnp.int32(1))
    for sizes in ((40, 100, 30, 80), (128, 0, 0, 128)):
        check_grouped(function, lhs, rhs, ct, sizes, slice(1, 3))


def test_what_is_not_finite_stays_in_its_group(rng):
    lhs, rhs, ct = draw(rng, 40, 128), draw(rng, 3, 128, 128), draw(rng, 40, 128)
    sizes = np.array([15, 15, 10], np.int32)
    function = product_and_pull()
    clean = function(lhs, rhs, ct, sizes)
    lhs[15:30], ct[15:30], rhs[1] = np.inf, np.nan, np.nan
    dirty = function(lhs, rhs, ct, sizes)
    for a, b in zip(clean[:2], dirty[:2]):
        assert np.array_equal(a[:15], b[:15]) and np.array_equal(a[30:], b[30:])
        assert not np.isfinite(b[15:30].astype(np.float32)).any()
    assert np.array_equal(clean[2][[0, 2]], dirty[2][[0, 2]])


def layer(rng, *, slots, d_model, hidden, parts, ids, dtype, alignment):
    """Random experts, and the assignments' places sorted by slot in padded groups."""
    arrays = (
        draw(rng, len(ids), d_model, dtype=dtype),
        draw(rng, slots, d_model, parts, hidden, scale=d_model**-0.5, dtype=dtype),
        draw(rng, slots, hidden, d_model, scale=hidden**-0.5, dtype=dtype),
        rng.random(ids.shape).astype(np.float32) * (ids < slots),
    )
    return arrays, padded_layout(ids, slots, alignment, spare=alignment + 3)


def oracle(arrays, ids, ct, name):
    """The layer and all its gradients, one slot at a time."""
    x, w_in, w_out, scores, ct = wide(*arrays, ct)
    out, x_ct, w_in_ct, w_out_ct, scores_ct = map(np.zeros_like, (x, x, w_in, w_out, scores))
    for s in range(len(w_in)):
        rows, js = np.nonzero(ids == s)
        y, pull = mlp(x[rows], w_in[s], w_out[s], 0.0, 0.0, name)
        weight = scores[rows, js][:, None]
        np.add.at(out, rows, weight * y)
        scores_ct[rows, js] = np.sum(y * ct[rows], axis=1)
        rows_ct, w_in_ct[s], w_out_ct[s], *_ = pull(weight * ct[rows])
        np.add.at(x_ct, rows, rows_ct)
    return out, (x_ct, w_in_ct, w_out_ct, scores_ct)


def some_ids(rng, slots, tokens, copies):
    """The slot before the last one stays empty."""
    ids = distinct_ids(rng, slots, tokens, copies)
    return np.where(ids == slots - 2, slots, ids)


CASES = {
    "padded": (dict(slots=3, d_model=256, hidden=128, parts=2, alignment=128), "swiglu", False),
    "least tiles": (dict(slots=4, d_model=256, hidden=256, parts=2, alignment=1), "swiglu", True),
    "relu2": (dict(slots=3, d_model=128, hidden=256, parts=1, alignment=1), "relu2", True),
}


@pytest.mark.parametrize(
    "case,dtype",
    [("padded", np.float32), ("least tiles", BFLOAT16), ("relu2", BFLOAT16)],
)
def test_fused_experts(rng, case, dtype, monkeypatch):
    shapes, name, least_tiles = CASES[case]
    if least_tiles:
        monkeypatch.setattr(tiles, "vmem_bytes", lambda: LEAST_TILES)
    ids = some_ids(rng, shapes["slots"], 70, 2)
    arrays, maps = layer(rng, ids=ids, dtype=dtype, **shapes)
    ct = draw(rng, *arrays[0].shape, dtype=dtype)

    def function(ct, *arrays):
        def forward(*arrays):
            return fused.fused_experts(*arrays, *maps, activation=name, backend="mosaic_tpu")

        out, pull = jax.vjp(forward, *arrays)
        return out, pull(ct)

    out, gradients = run(function)(ct, *arrays)
    want, wanted = oracle(arrays, ids, ct, name)
    bound = {np.float32: 5e-6, BFLOAT16: 6e-3}[dtype]
    check(out, want, bound)
    for label, got, expected in zip(("x", "w_in", "w_out", "scores"), gradients, wanted):
        check(got, expected, bound, label)
    empty = shapes["slots"] - 2
    assert not gradients[1][empty].any() and not gradients[2][empty].any()


def test_visits(rng):
    """Against a walk over rows, with groups that are not the first ones and end before the rows."""
    make = jax.jit(tiles.visits_of, static_argnums=(1, 2), static_argnames="empty")
    for _ in range(20):
        sizes = rng.multinomial(rng.integers(0, 60), rng.dirichlet(np.ones(6) / 3))
        ends = (np.cumsum(sizes) + rng.integers(0, 4)).astype(np.int32)
        spans = np.stack([ends - sizes, ends]).astype(np.int32)
        for empty in (False, True):
            visits = make(spans, 64, 8, empty=empty)
            count = int(visits.count)
            got = list(zip(visits.group[:count].tolist(), visits.tile[:count].tolist()))
            want = []
            for g, (start, end) in enumerate(spans.T):
                pairs = sorted({(g, row // 8) for row in range(start, end)})
                want += pairs or ([(g, min(start // 8, 7))] if empty else [])
            # A list of nothing has one visit, which has no rows.
            assert got == (want or [(5, got[0][1])])
            assert visits.bounds.tolist() == [*spans[0], spans[1][-1]]


@pytest.mark.parametrize("mebibytes", [16, 64, 128])
@DTYPES
def test_tiles_fit(mebibytes, dtype, monkeypatch):
    """They divide the matrices, and two of each block with the sums fit VMEM."""
    monkeypatch.setattr(tiles, "vmem_bytes", lambda: mebibytes * 2**20)
    size = np.dtype(dtype).itemsize
    for rows, groups, k, n in (
        (32768, 8, 4096, 14336),
        (262144, 128, 2048, 768),
        (64, 8, 14336, 4096),
        (1, 1, 128, 128),
        (5000, 64, 2816, 1408),
    ):
        cut = tiles.choose_tiles(rows, groups, k, n, dtype, parts=2, blocks=3)
        assert k % cut.contraction == 0 and n % cut.columns == 0 and cut.rows % 128 == 0
        m, tk, tn = cut.rows, cut.contraction, cut.columns
        assert 2 * size * (m * tk + 2 * tk * tn + 3 * m * tn) + 8 * m * tn < mebibytes * 2**20
        cut = tiles.choose_weight_tiles(rows, groups, k, 2 * n, dtype, np.float32, planes=2)
        assert k % cut.contraction == 0 and n % cut.columns == 0
        m, tk, tn = cut.rows, cut.contraction, cut.columns
        assert 2 * (size * m * (tk + tn) + 4 * tk * tn) + 4 * tk * tn < mebibytes * 2**20


def loss(activation):
    def function(x, w_in, w_out, scores, *maps):
        out = fused.fused_experts(
            x, w_in, w_out, scores, *maps, activation=activation, backend="mosaic_tpu"
        )
        return jnp.sum(out.astype(jnp.float32))

    return jax.value_and_grad(function, argnums=(0, 1, 2, 3))


def layer_shapes(d_model, hidden, activation, dtype):
    parts, shape, i32 = fused.ACTIVATIONS[activation].parts, jax.ShapeDtypeStruct, jnp.int32
    return (
        shape((1000, d_model), dtype),
        shape((16, d_model, parts, hidden), dtype),
        shape((16, hidden, d_model), dtype),
        shape((1000, 8), jnp.float32),
        shape((1000, 8), i32),
        shape((10112,), i32),
        shape((16,), i32),
    )


PROGRAMS = pytest.mark.parametrize(
    "d_model,hidden,activation,dtype",
    [
        (2048, 1408, "swiglu", jnp.bfloat16),
        (256, 384, "gelu", jnp.bfloat16),
        (128, 128, "geglu", jnp.float32),
        (128, 256, "swiglu_oai", jnp.bfloat16),
    ],
)
NAMES = (
    "experts_up",
    "experts_down",
    "experts_down_backward",
    "rows_gradient",
    "w_in_gradient",
    "w_out_gradient",
)


@PROGRAMS
def test_lowering(d_model, hidden, activation, dtype):
    """Forward and backward become TPU programs on a machine without a TPU."""
    shapes = layer_shapes(d_model, hidden, activation, dtype)
    text = jax.export.export(jax.jit(loss(activation)), platforms=["tpu"])(*shapes).mlir_module()
    assert text.count("tpu_custom_call") == len(NAMES)
    assert all(f'"{name}"' in text for name in NAMES)


@PROGRAMS
def test_compiling(d_model, hidden, activation, dtype, monkeypatch):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    here = SingleDeviceSharding(topology.devices[0])
    shapes = layer_shapes(d_model, hidden, activation, dtype)
    program = jax.jit(loss(activation), in_shardings=here, out_shardings=here)
    assert "tpu_custom_call" in program.lower(*shapes).compile().as_text()


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(1, 2, 2)], ids=str)
def test_train_step_lowers(mesh, monkeypatch):
    """A whole step with the kernels, as a TPU would choose them."""
    monkeypatch.setattr(
        backends, "tpu_refusal", lambda dtype, forced: tpu_refusal(dtype, forced=True)
    )
    text = lowered_train_step(mesh, "tpu")
    for name in NAMES:
        assert f'"{name}"' in text


def test_refusals():
    fits = fused.Case(256, 128, "swiglu", jnp.bfloat16)
    assert fused.refusal("mosaic_tpu", fits, forced=True) is None
    assert "the device is 'cpu', no TPU" in fused.explain(fits)
    for changed, reason in (
        (dataclasses.replace(fits, d_model=192), "d_model=192 is no multiple of 128"),
        (dataclasses.replace(fits, hidden=64), "hidden=64 is no multiple of 128"),
        (dataclasses.replace(fits, dtype=jnp.float16), "float16, not bfloat16 or float32"),
        (dataclasses.replace(fits, bias=True), "the experts have biases"),
    ):
        assert reason in fused.refusal("mosaic_tpu", changed, forced=True)
    case = api.Case(300, 256, 192, 1, jnp.float32)
    assert "not mosaic_tpu: columns=192 is no multiple of 128" in api.explain(case)
    with pytest.raises(NotImplementedError, match="mosaic_tpu: contraction=64 is no multiple"):
        api.grouped_matmul(
            jnp.zeros((8, 64)), jnp.zeros((1, 64, 128)), jnp.array([8]), backend="mosaic_tpu"
        )
