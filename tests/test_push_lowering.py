"""Kernels that write rows to other GPUs, as programs for four of them, made without one."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import pytest
from exchange_kernel_support import sharded
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from test_pushed_rows import as_on_hopper
from tuning_support import table_of

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig, WireConfig
from moejax.exchange import choose
from moejax.exchange.remote import make_pushed_rows
from moejax.experts import places_for
from moejax.layer import MoELayer
from pallas_kernels.exchange import push, sums
from pallas_kernels.fused_experts import remote
from pallas_kernels.route.api import sorted_tiles
from pallas_kernels.tuning import use_table
from pallas_kernels.tuning.lookup import recorded
from sharding.mesh import EXPERT, TOKEN_AXES, MeshShape, abstract_mesh
from sharding.specs import specs_of

G, S, K, D, H = 4, 4, 2, 256, 128
T = 64
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
BACKWARD = {"experts_down_backward", "rows_gradient", "w_in_gradient", "w_out_gradient"}

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < push.FIRST_JAX,
    reason=f"jax {jax.__version__} is older than {'.'.join(map(str, push.FIRST_JAX))}",
)


def kernels(body, *shapes):
    """Names of the kernels in a program for CUDA, in order; {those that are told of other GPUs}.

    Whether they then write to the right ones, only GPUs show (test_remote_gpus.py).

    Args:
        body: of each device's arrays.
        shapes: (shape, dtype) of a device's.
    """
    arguments = [jax.ShapeDtypeStruct((G * n, *more), dtype) for (n, *more), dtype in shapes]
    return kernels_of(sharded(body, abstract=True, **{EXPERT: G}), *arguments)


def kernels_of(function, *arguments):
    """The same of a whole program."""
    text = jax.export.export(function, platforms=["cuda"])(*arguments).mlir_module()
    assert "multimem" not in text and "nvshmem" not in text
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    names = [re.search(r"(?<=\\00)(?!stable)[a-z_]+(?=_mosaic_gpu\\00)", call)[0] for call in calls]
    pairs = zip(names, calls, strict=True)
    return names, {name for name, call in pairs if "uses_xla_collective_metadata = true" in call}


@pytest.mark.parametrize(
    "dtype,width", [(BF16, D), (F32, 4), (jnp.int8, 2064), (jnp.uint8, 16), (BF16, 7168)]
)
@pytest.mark.parametrize("rows", [T, G * T])
def test_push_rows(rows, dtype, width):
    def body(x_NW, entries_M):
        return push.push_rows(x_NW, entries_M, EXPERT, T, backend="mosaic_gpu")

    found = kernels(body, ((rows, width), dtype), ((G * T,), I32))
    assert found == (["push_rows"], {"push_rows"})


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("width,copies", [(D, K), (7168, 8), (8, 1)])
def test_push_sums(width, copies, weights):
    def body(rows_AD, weights_RJ, place_RJ, entries_M):
        chosen = weights_RJ if weights else None
        return sums.push_sums(rows_AD, chosen, place_RJ, entries_M, EXPERT, T)

    rows, assigned = ((384, width), BF16), (G * T, copies)
    found = kernels(body, rows, (assigned, F32), (assigned, I32), ((G * T,), I32))
    assert found == (["push_sums"], {"push_sums"})


def experts(gradient, tokens=T, hidden=H, reserve_sms=0):
    """`kernels` of `remote_experts`, and of its gradient."""
    sizes = {"tokens": tokens, "top_k": K, "num_experts": G * S, "slots": S, "devices": G}
    budget = choose(ExchangeConfig("remote", bucket_slack=math.inf), **sizes)
    assignments = G * tokens * K

    def body(x_TD, w_in, w_out, scores_RJ, target_TK, ids_RJ):
        places = places_for(S, assignments)
        place_RJ, sizes_S, copy_A, tiles = sorted_tiles(ids_RJ, groups=S, places=places)
        forward = partial(
            remote.remote_experts,
            place_RJ=place_RJ,
            copy_A=copy_A,
            sizes_S=sizes_S,
            rows=make_pushed_rows(target_TK, ids_RJ, budget),
            activation="swiglu",
            tiles=tiles,
            assignments=assignments,
            reserve_sms=reserve_sms,
        )
        arrays = (x_TD, w_in, w_out, scores_RJ)
        if not gradient:
            y_TD = forward(*arrays)
            assert (y_TD.shape, y_TD.dtype) == (x_TD.shape, F32)
            return y_TD
        y_TD, pull = jax.vjp(forward, *arrays)
        cotangents = pull(y_TD)
        for value, ct in zip(arrays, cotangents, strict=True):
            assert (value.shape, value.dtype) == (ct.shape, ct.dtype)
        return y_TD, *cotangents

    return kernels(
        body,
        ((tokens, D), BF16),
        ((S, D, 2, hidden), BF16),
        ((S, hidden, D), BF16),
        ((G * tokens, K), F32),
        ((tokens, K), I32),
        ((G * tokens, K), I32),
    )


def test_experts():
    """The first product sends its rows itself, and their sums go home by one kernel."""
    names, writing = experts(gradient=False)
    assert writing == {"experts_up", "push_sums"}
    assert (names[0], names[-1]) == ("experts_up", "push_sums")


@pytest.mark.parametrize("sizes", [{"tokens": 16}, {"hidden": 4096}], ids=["few", "wide"])
def test_experts_whose_rows_are_sent_before(sizes):
    """Few rows a slot without a gradient, and wide experts, whose rows lie in order."""
    names, writing = experts(gradient=False, **sizes)
    assert writing == {"push_rows", "push_sums"}
    assert (names[0], names[-1]) == ("push_rows", "push_sums") and "experts_up" in names


def test_a_table_that_pairs_blocks():
    """Rows arrive for single blocks: what a table says of pairs is left out."""
    with recorded() as asked:
        experts(gradient=False)
    paired = {p: replace(cut, cluster=2) for p, cut in asked.items() if p.kernel == "experts_up"}
    assert len(paired) == 1
    with use_table(table_of(paired)):
        assert experts(gradient=False)[1] == {"experts_up", "push_sums"}


@pytest.mark.parametrize("left", [31, 4])
def test_few_multiprocessors_left(left):
    """Rows are sent before: no blocks are left that multiply meanwhile."""
    assert experts(gradient=False, reserve_sms=132 - left)[1] == {"push_rows", "push_sums"}


@pytest.mark.parametrize("hidden", [H, 4096])
def test_gradient_of_experts(hidden):
    """Cotangents are sent, and the sums of the rows' go home."""
    names, writing = experts(gradient=True, hidden=hidden)
    assert {"push_rows", "experts_up", "push_sums"} | BACKWARD <= set(names)
    assert ("experts_up" in writing) == (hidden == H)
    assert writing - {"experts_up"} == {"push_rows", "push_sums"}
    assert names.count("push_sums") == 2
    assert names.count("push_rows") == (1 if hidden == H else 2)


@pytest.mark.parametrize(
    "options,writing",
    [
        ({}, {"push_rows", "experts_up", "push_sums"}),
        ({"chunks": 2}, {"push_rows", "experts_up", "push_sums"}),
        ({"bucket_slack": 0.1}, {"push_rows", "experts_up", "push_sums"}),
        ({"wire": WireConfig(combine="int8")}, {"push_rows"}),
        ({"mode": "ring"}, set()),
    ],
    ids=["one wave", "chunks", "waves", "rounded", "ring"],
)
def test_a_layer(options, writing, monkeypatch):
    """Mode `remote` with its gradient, as GPUs would choose kernels; in a ring none writes."""
    as_on_hopper(monkeypatch)
    exchange = {"mode": "remote", "bucket_slack": math.inf} | options
    config = MoEConfig(RouterConfig(G * S, K), ExpertsConfig(hidden=H), ExchangeConfig(**exchange))
    layer = nnx.eval_shape(lambda: MoELayer(D, config, expert_devices=G, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    specs, rows = specs_of(params), P(TOKEN_AXES)

    def body(params, x_TD):
        def loss(params, x_TD):
            return jnp.sum(nnx.merge(graph, params, rest)(x_TD)[0].astype(F32))

        return jax.grad(loss, (0, 1))(params, x_TD)

    mesh = abstract_mesh(MeshShape(expert=G))
    run = jax.shard_map(
        body, mesh=mesh, in_specs=(specs, rows), out_specs=(specs, rows), check_vma=False
    )
    names, found = kernels_of(jax.jit(run), params, jax.ShapeDtypeStruct((G * T, D), BF16))
    assert found == writing
    assert set(names) >= BACKWARD


@pytest.mark.parametrize(("width", "dtype"), [(3, F32), (264, jnp.uint8), (257, BF16)])
def test_rows_of_any_width(width, dtype):
    """They are padded to what a thread moves."""

    def body(x_TW, entries_M):
        return push.push_rows(x_TW, entries_M, EXPERT, T, backend="mosaic_gpu")

    names, writing = kernels(body, ((T, width), dtype), ((G * T,), I32))
    assert (names, writing) == (["push_rows"], {"push_rows"})
