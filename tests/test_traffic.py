"""A plan's bytes: by formula, counted in the traced step, and in XLA's program."""

import dataclasses
import math
import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from planner_support import CASES, assert_columns, run_config

from moejax.config import WireConfig
from moejax.training.state import Blueprint
from sharding.mesh import AXES, DATA, EXPERT, TENSOR, MeshShape, abstract_mesh, make_mesh
from sharding.planner import format_plan, plan, trace_step
from sharding.traffic import collectives_of, sent_bytes

# ── the ring formulas ────────────────────────────────────────────────────────


def ring(devices: int, piece: float) -> float:
    """Bytes device 0 sends when each device's piece goes around a ring until all have it."""
    has = [{device} for device in range(devices)]
    passing, sent = list(range(devices)), 0.0
    while any(len(pieces) < devices for pieces in has):
        sent += piece
        passing = [passing[device - 1] for device in range(devices)]
        for device, got in enumerate(passing):
            has[device].add(got)
    return sent


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_sent_bytes(devices):
    operand = 24.0 * devices
    assert sent_bytes("all-gather", devices, operand) == ring(devices, operand)
    scatter = ring(devices, operand / devices)
    assert sent_bytes("reduce-scatter", devices, operand) == pytest.approx(scatter)
    assert sent_bytes("all-reduce", devices, operand) == pytest.approx(2 * scatter)
    assert sent_bytes("all-to-all", devices, operand) == pytest.approx(
        sum(operand / devices for other in range(devices) if other)
    )
    assert sent_bytes("permute", devices, operand) == (operand if devices > 1 else 0)


# ── counting in a jaxpr ──────────────────────────────────────────────────────

SIZES = {DATA: 2, EXPERT: 4, TENSOR: 1}


def counted(function, *arguments):
    mesh = abstract_mesh(MeshShape(**SIZES))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return collectives_of(jax.make_jaxpr(mapped)(*arguments), SIZES)


def sums(found) -> dict:
    total: Counter = Counter()
    for c in found:
        total[c.kind, c.axes, c.phase, c.extra] += c.sent
    return dict(total)


def test_loops_branches_and_dead_code():
    x = jnp.ones((8, 3), jnp.float32)
    small, bytes_ = jnp.ones((), jnp.int32), 8 * 3 * 4

    def function(x, small):
        lax.psum(x, EXPERT)  # nobody reads it
        x = lax.psum(x, TENSOR)  # one device

        def turn(carry, _):
            lax.all_gather(carry, DATA)
            return lax.pmax(carry, EXPERT), None

        x, _ = lax.scan(turn, x, None, length=5)
        x = lax.while_loop(lambda y: y[0, 0] < 0, lambda y: lax.ppermute(y, EXPERT, [(0, 1)]), x)
        y = lax.all_to_all(x, EXPERT, 0, 0, tiled=True)
        y = lax.cond(small > 0, lambda y: y, lambda y: lax.psum(y, (DATA, EXPERT)), y)
        return jax.jit(lambda y: lax.psum_scatter(y, EXPERT, tiled=True))(y)

    assert sums(counted(function, x, small)) == {
        ("all-reduce", (EXPERT,), "", False): pytest.approx(5 * 2 * 3 / 4 * bytes_),
        ("permute", (EXPERT,), "", True): bytes_,
        ("all-to-all", (EXPERT,), "", False): 3 / 4 * bytes_,
        ("all-reduce", (DATA, EXPERT), "", False): pytest.approx(2 * 7 / 8 * bytes_),
        ("reduce-scatter", (EXPERT,), "", False): 3 / 4 * bytes_,
    }


def test_phases_of_a_gradient():
    bytes_ = 16 * 4

    @jax.checkpoint
    def piece(x):
        return jnp.sin(lax.ppermute(jnp.sin(x), EXPERT, [(0, 1), (1, 0)]))

    def function(x):
        return jax.grad(lambda x: jnp.sum(piece(lax.ppermute(x, DATA, [(0, 1), (1, 0)]))))(x)

    # Nobody reads the loss, so the first run of `piece`, which only its value needs, is dead.
    assert sums(counted(function, jnp.ones(16))) == {
        ("permute", (DATA,), "forward", False): bytes_,
        ("permute", (DATA,), "backward", False): bytes_,
        ("permute", (EXPERT,), "recomputed", False): bytes_,
        ("permute", (EXPERT,), "backward", False): bytes_,
    }


@pytest.mark.parametrize("name", CASES)
def test_traced_bytes_equal_the_formulas(name):
    sizes, config = CASES[name]
    made = plan(config, MeshShape(*sizes))
    counted = {c.key: c.sent for c in made.collectives}
    expected = {c.key: c.sent for c in made.formulas}
    assert counted == pytest.approx(expected)
    assert all(key[0] for key in counted), "a collective without a name"
    assert made.formulas_agree
    assert bool(counted) == (made.mesh.size > 1)
    changed = dataclasses.replace(made, formulas=made.formulas[1:])
    assert changed.formulas_agree == (made.mesh.size == 1)
    assert_columns(format_plan(made))


def test_fewer_bytes_than_copies_in_bfloat16():
    """8 bits, one row a device: over 2.5 times fewer than K bfloat16 rows a token, counted."""
    wire = WireConfig("int8", "int8", "int8", "int8")
    config = run_config(
        router={"num_experts": 64, "top_k": 8},
        exchange={"mode": "all_to_all", "bucket_slack": math.inf, "wire": wire},
        model={"num_layers": 1},
    )
    made = plan(config, MeshShape(1, 4, 1))
    counted = sum(c.sent for c in made.collectives if c.name in ("dispatch", "combine"))
    tokens, d_model = 16 * 16 // 4, 128
    copies = 8 * 3 / 4  # experts of a token on other devices
    plain = 4 * tokens * copies * d_model * 2  # dispatch, combine and their gradients
    assert counted * 2.5 < plain


# ── against the compiler ─────────────────────────────────────────────────────

OPERATION = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all)\((?P<rest>.*)"
)

ITEM = {"f32": 4, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


def groups_of(rest: str) -> np.ndarray:
    explicit = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest)
    if explicit:
        return np.array([[int(n) for n in g.split(",")] for g in explicit[1][1:-1].split("},{")])
    named = re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", rest)
    if named:  # from jax 0.11 on
        sizes = {a: int(n) for a, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        among = re.findall(r"'(\w+)'", named[2])
        order = [list(sizes).index(a) for a in [*(a for a in sizes if a not in among), *among]]
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return devices.transpose(order).reshape(-1, math.prod(sizes[a] for a in among))
    found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    assert found, rest
    shape, dims, order = ([int(n) for n in g.split(",")] if g else None for g in found.groups())
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)


def compiled_bytes(text: str, mesh: MeshShape) -> dict:
    """Bytes a device sends by (kind, axes), read from XLA's program."""
    total: Counter = Counter()
    for found in OPERATION.finditer(text):
        group = groups_of(found["rest"])[0]
        places = np.array(np.unravel_index(group, mesh.sizes))
        axes = tuple(a for a, p in zip(AXES, places) if len(set(p)) > 1)
        result = sum(
            ITEM[dtype] * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found["result"])
        )
        operand = {"all-gather": result / len(group), "reduce-scatter": result * len(group)}
        kind = found["kind"]
        total[kind, axes] += sent_bytes(kind, len(group), operand.get(kind, result))
    return dict(total)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, remat", [("all_to_all", "layer"), ("ring", "none"), ("remote", "none")]
)
def test_bytes_and_memory_are_those_of_the_compiled_step(mode, remat):
    config = run_config(
        exchange={"mode": mode, "bucket_slack": math.inf},
        experts={"bias": True, "shared_hidden": 32},
        attention={"qk_norm": "full"},
        model={
            "compute_dtype": "float32",
            "remat": remat,
            "first_dense_layers": 1,
            "dense_hidden": 64,
        },
        batch_size=8,
    )
    mesh = MeshShape(2, 2, 2)
    made = plan(config, mesh)
    compiled = trace_step(Blueprint(config.model, make_mesh(mesh)), config).lower().compile()
    expected: Counter = Counter()
    for c in made.collectives:
        assert not c.extra
        expected[c.kind, c.axes] += c.sent
    assert compiled_bytes(compiled.as_text(), mesh) == pytest.approx(dict(expected), rel=1e-3)

    analysis = compiled.memory_analysis()
    batch = 4 * 2 * 17  # int32, two examples on a device
    held = made.memory.masters + made.memory.moments
    assert analysis.argument_size_in_bytes == pytest.approx(held + batch + 4, abs=64)
    estimate = made.memory.total - held
    assert estimate / 2 < analysis.temp_size_in_bytes < 2 * estimate
