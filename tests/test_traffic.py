"""A plan's bytes: by formula, counted in the traced step, and in XLA's program."""

import ast
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from planner_support import CASES, assert_columns, run_config
from traffic_support import compiled_bytes

from moejax.config import WireConfig
from moejax.training.state import Blueprint
from sharding.compression.config import GradCompression
from sharding.mesh import DATA, EXPERT, TENSOR, MeshShape, abstract_mesh, make_mesh
from sharding.planner import format_plan, plan, trace_step
from sharding.traffic import NAMES, collectives_of, sent_bytes

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


def test_every_name_is_of_code_that_exists():
    """An entry of `NAMES` whose file or function was moved names nothing any more, silently."""
    defined: dict[str, set[str]] = {}
    for package in ("moejax", "sharding"):
        for file in (Path(__file__).parents[1] / package).rglob("*.py"):
            tree = ast.parse(file.read_text())
            defined.setdefault(file.stem, {""}).update(_qualified_names(tree))
    missing = [(file, function) for file, function, _ in NAMES if function not in defined[file]]
    assert not missing


def _qualified_names(tree: ast.AST, within: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield within + node.name
            yield from _qualified_names(node, f"{within}{node.name}.")


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


REMATTED = [name for name, (_, config) in CASES.items() if config.model.remat != "none"]
QUICK = ("ring", "single rows", "data alone")


@pytest.mark.parametrize(
    "name",
    [n if n.startswith(QUICK) else pytest.param(n, marks=pytest.mark.slow) for n in REMATTED],
)
def test_no_exchange_of_the_first_wave_is_repeated(name):
    """remat="local": what a layer has received is kept, and nothing of it is sent again."""
    sizes, config = CASES[name]
    model = dataclasses.replace(config.model, remat="local")
    made = plan(dataclasses.replace(config, model=model), MeshShape(*sizes))
    assert made.formulas_agree
    again = [c for c in made.collectives if c.phase == "recomputed"]
    assert {(c.name, c.extra) for c in again} <= {("further wave", True)}
    combined = any(layer.moe.exchange.wire.combine_dim for layer in model.layers() if layer.moe)
    assert any(c.extra for c in again) == combined  # whose projection needs the outputs


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, remat, method",
    [
        ("all_to_all", "layer", "none"),
        ("ring", "none", "none"),
        ("remote", "none", "none"),
        ("ring", "layer", "int8"),
    ],
)
def test_bytes_and_memory_are_those_of_the_compiled_step(mode, remat, method):
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
        train={
            "grad_compression": GradCompression(
                method,
                rounding="error_feedback",
                weight_gather="none" if method == "none" else "int8",
            )
        },
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
    held = made.memory.masters + made.memory.moments + made.memory.residuals
    assert bool(made.memory.residuals) == (method != "none")
    history = 4 * 2 * config.anomaly.window + 13
    expected_size = held + batch + 4 + history
    assert analysis.argument_size_in_bytes == pytest.approx(expected_size, abs=64)
    estimate = made.memory.total - held
    assert estimate / 2 < analysis.temp_size_in_bytes < 2 * estimate
