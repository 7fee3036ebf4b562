"""Where a method would send as much as float32 the gradient is summed exactly, and it is told."""

import dataclasses

import jax
import numpy as np
import pytest
from compression_leaf_support import CASES, counted_bytes
from compression_support import (
    exact_sums,
    local_gradients,
    make_reducer,
    pieces_of,
    program,
    start,
)
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from planner_support import assert_columns, run_config

from sharding import zero
from sharding.compression import squares
from sharding.compression.config import GradCompression
from sharding.compression.hosts import crossings as crossings_between
from sharding.compression.interface import bytes_sent
from sharding.compression.methods import make_method
from sharding.compression.savings import compressed_bytes, exact_bytes, explain_larger
from sharding.mesh import AXES, DATA, EXPERT, MeshShape, make_mesh
from sharding.plan_text import format_plan
from sharding.planner import plan
from sharding.traffic import collectives_of


class Exact:
    """The exact sum as a method, so that its bytes are counted in the same way."""

    def init(self, shape, key):
        return {}

    def reduce(self, grad, state, axes, dim, *, key, step):
        return zero.sum_to_piece(grad, axes, dim), state


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(zero, "SMALLEST", 2)


@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("case", CASES)
def test_bytes_of_the_exact_sum(case, dim):
    sizes, axes = CASES[case]
    by_axis = {a: getattr(sizes, a) for a in axes}
    counted = counted_bytes(Exact(), sizes, axes, dim, (6, 16))
    assert exact_bytes((6, 16), by_axis, dim) == pytest.approx(counted) and counted > 0


@pytest.mark.parametrize("hosts", [2, 4, 8])
@pytest.mark.parametrize("dim", [None, 1])
def test_bytes_between_hosts(hosts, dim):
    """Of a ring one of the links from a host's ranks leaves it; sums in two levels are like it."""
    sizes, shape = {DATA: 8, EXPERT: 2}, (64, 64)
    numbers, near = 64 * 64, 8 // hosts
    if dim is None:  # one ring over all 16
        ring = 2 * 15 / 16 * 4 * numbers / (16 // hosts)
    else:  # two rings over 8
        ring = 7 / 8 * 4 * numbers / near
    assert exact_bytes(shape, sizes, dim, hosts) == pytest.approx(ring)
    blocks = make_method(GradCompression("int8")).blocks
    found = crossings_between(shape, sizes, dim, blocks, hosts)
    row = 260  # 64 · 64 / 16 numbers, a block: its bytes, a scale, rounded up to words
    ours = (hosts - 1) * row * (2 if dim is None else 1)
    assert compressed_bytes(found, sizes, hosts) == pytest.approx(ours)
    assert compressed_bytes(found, sizes) >= ours


MESHES = [(8, 1, 1), (4, 2, 1), (2, 4, 1)]
ASKED = {
    "bf16": GradCompression("bf16"),
    "int8, blocks as large as all": GradCompression("int8", block=1024),
    "int4": GradCompression("int4"),
    "a third of the numbers": GradCompression("top_k", density=0.3, warmup_steps=3),
    "a twentieth": GradCompression("top_k", density=0.05, warmup_steps=3),
    "rank 1": GradCompression("low_rank", rank=1),
    "rank 12": GradCompression("low_rank", rank=12),
}


def test_decided_by_counted_bytes():
    """Each parameter as the traced programs of its sums say, without a warm-up."""
    found = {}
    for sizes in MESHES:
        shape = MeshShape(*sizes)
        for name, config in ASKED.items():
            method = make_method(dataclasses.replace(config, warmup_steps=0))
            reducer, axis_sizes = make_reducer(shape, config)
            for leaf in reducer.leaves:
                if leaf.name.startswith("norm"):
                    assert leaf.exact and not leaf.larger
                    continue
                where = (shape, leaf.axes, leaf.storage.dim, leaf.shape)
                ours, exact = (counted_bytes(one, *where) for one in (method, Exact()))
                if config.method == "top_k":
                    by_axis = {a: axis_sizes[a] for a in leaf.axes}
                    ours += bytes_sent(squares.crossings(leaf.shape, by_axis, 0), by_axis)
                assert leaf.larger == leaf.exact == (ours >= exact), (name, sizes, leaf.name)
                found.setdefault(name, set()).add(leaf.larger)
    assert found["bf16"] == found["int4"] == {False}
    assert found["a third of the numbers"] == {False, True} == found["rank 12"]
    assert True in found["int8, blocks as large as all"]


def test_larger_ones_are_summed_exactly(rng):
    """Some are served and keep what is left, others are as without compression."""
    shape = MeshShape(4, 2, 1)
    config = dataclasses.replace(ASKED["a third of the numbers"], warmup_steps=0)
    reducer, axis_sizes = make_reducer(shape, config)
    larger = {leaf.name for leaf in reducer.leaves if leaf.larger}
    served = {leaf.name for leaf in reducer.leaves if not leaf.exact}
    assert larger and served and reducer.state_bytes
    mesh = make_mesh(shape)
    state, local = start(reducer, mesh), local_gradients(rng, reducer, axis_sizes)
    assert set(state) == served
    run, placed = program(reducer, mesh), jax.device_put(local, NamedSharding(mesh, P(*AXES)))
    got, _ = jax.block_until_ready(run(placed, state, jnp.int32(0)))
    for leaf in reducer.leaves:
        want = pieces_of(leaf, exact_sums(leaf, local[leaf.name]))
        error = np.abs(np.asarray(got[leaf.name], np.float64) - want).max()
        # Eight terms of float32 added in some order, or what is left to send.
        assert (error < 8 * 2**-23 * 8 * np.abs(local[leaf.name]).max()) == leaf.exact, leaf.name
    counted = collectives_of(run.trace(placed, state, jnp.int32(0)).jaxpr, axis_sizes)
    exact = program(make_reducer(shape, GradCompression())[0], mesh)
    without = collectives_of(exact.trace(placed, None, jnp.int32(0)).jaxpr, axis_sizes)
    assert sum(c.sent for c in counted) < sum(c.sent for c in without)


def test_weights_gathered_in_bytes_only_where_fewer():
    """Blocks of 256 for pieces of less: by the bytes of the dtype that they would have."""
    shape, whole = MeshShape(8), ("w rows", (16, 36))  # 72 numbers a piece: 260 bytes in a block
    config = GradCompression("none", weight_gather="int8")
    for dtype, operand in ((jnp.float32, 260), (jnp.bfloat16, None)):
        reducer, _ = make_reducer(shape, config, compute_dtype=dtype)
        (leaf,) = [leaf for leaf in reducer.leaves if leaf.path[-1] == whole[0]]
        assert leaf.shape == whole[1] and reducer.gather_operand(leaf, 72) == operand
    # Where the gradient alone would be larger, weights may still be gathered so.
    config = GradCompression("top_k", density=1.0, weight_gather="int8")
    reducer, _ = make_reducer(shape, config, compute_dtype=jnp.float32)
    (leaf,) = [leaf for leaf in reducer.leaves if leaf.path[-1] == whole[0]]
    assert leaf.larger and reducer.gather_operand(leaf, 72) == 260


def test_told():
    names = [f"layer.w{i}" for i in range(6)]
    assert explain_larger("int8", 3, []) == ""
    text = explain_larger("low_rank", 3, names)
    assert text.startswith("gradients: low_rank serves 3 of 9 large matrices")
    assert text.endswith("exactly: layer.w0, layer.w1, layer.w2, layer.w3 and 2 more")
    asked = {"grad_compression": GradCompression("low_rank", rank=32)}
    config = run_config(model={"num_layers": 1, "scan_layers": True}, train=asked)
    made = plan(config, MeshShape(2, 2, 1))
    assert made.formulas_agree
    said = " ".join(format_plan(made).split())
    assert made.uncompressed and made.uncompressed in said
    assert_columns(format_plan(made))
