"""The plan of a run: bytes counted in the traced step, by formula, by XLA; memory; FLOPs."""

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

from moejax.config import (
    AttentionConfig,
    ExchangeConfig,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    WireConfig,
)
from moejax.errors import UserError
from moejax.presets import PRESETS
from moejax.training.config import DataConfig, TrainConfig
from moejax.training.state import Blueprint
from sharding.costs import count_parameters
from sharding.mesh import AXES, DATA, EXPERT, TENSOR, MeshShape, abstract_mesh, make_mesh
from sharding.plan_text import format_bytes, format_count
from sharding.planner import format_plan, plan, trace_step
from sharding.traffic import collectives_of, sent_bytes


def run_config(
    *,
    router: dict | None = None,
    experts: dict | None = None,
    exchange: dict | None = None,
    attention: dict | None = None,
    model: dict | None = None,
    train: dict | None = None,
    batch_size: int = 16,
    seq_len: int = 16,
) -> TrainConfig:
    moe = MoEConfig(
        RouterConfig(**{"num_experts": 8, "top_k": 2, **(router or {})}),
        ExpertsConfig(**{"hidden": 64, **(experts or {})}),
        ExchangeConfig(**(exchange or {})),
    )
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, **(attention or {})}
    config = ModelConfig(
        **{
            "vocab_size": 200,
            "d_model": 128,
            "num_layers": 2,
            "max_context": 64,
            "attention": AttentionConfig(**heads),
            "moe": moe,
            **(model or {}),
        }
    )
    return TrainConfig(config, DataConfig(seq_len=seq_len, batch_size=batch_size), **(train or {}))


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


# ── the two ways of counting ─────────────────────────────────────────────────

CASES = {
    "buckets, layers rematted and scanned, two microbatches, loss in chunks": (
        (2, 4, 2),
        run_config(
            exchange={"mode": "all_to_all", "bucket_rows": 8},
            attention={"qk_norm": "full"},
            experts={"bias": True, "shared_hidden": 32, "shared_gate": True},
            model={"num_layers": 3, "scan_layers": True, "remat": "layer"},
            train={"accumulate": 2, "loss_chunk": 12},
        ),
    ),
    "ring, capacity, products kept": (
        (1, 4, 2),
        run_config(
            exchange={"mode": "ring", "capacity_factor": 1.25},
            attention={"qk_norm": "head"},
            router={"num_experts": 6, "load_balance_coef": 0.0, "z_loss_coef": 1e-3},
            model={"remat": "dots", "first_dense_layers": 1, "dense_hidden": 64},
        ),
    ),
    "one wave, unrolled, float32, different k": (
        (2, 2, 2),
        run_config(
            exchange={"mode": "all_to_all", "bucket_slack": math.inf},
            router={"load_balance_coef": 0.0},
            model={"top_k_by_layer": (1, 3), "compute_dtype": "float32", "tie_embeddings": True},
        ),
    ),
    "buckets, four ways of rounding": (
        (2, 4, 1),
        run_config(
            exchange={
                "mode": "all_to_all",
                "bucket_rows": 8,
                "wire": WireConfig("int8", "float8", "compute", "int4"),
            },
        ),
    ),
    "ring, rounded and rotated": (
        (1, 4, 2),
        run_config(
            exchange={
                "mode": "ring",
                "bucket_slack": math.inf,
                "wire": WireConfig("float8", "int8", "int4", "int8", rotate=True),
            },
            model={"remat": "layer"},
        ),
    ),
    "data alone": ((8, 1, 1), run_config(model={"scan_layers": True, "remat": "layer"})),
    "one device": ((1, 1, 1), run_config()),
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


def assert_columns(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 100, text
    assert not re.search(r"[ \t]$", text, re.M)


# ── meshes larger than the machine ───────────────────────────────────────────


def many_experts(**model) -> TrainConfig:
    return run_config(
        router={"num_experts": 512, "top_k": 8},
        experts={"hidden": 1024},
        attention={"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "qk_norm": "head"},
        model={
            "vocab_size": 151_936,
            "d_model": 4096,
            "num_layers": 24,
            "max_context": 4096,
            "scan_layers": True,
            "remat": "layer",
            **model,
        },
        batch_size=64,
        seq_len=4096,
    )


@pytest.mark.parametrize("sizes", [(1, 64, 1), (8, 8, 1), (2, 8, 4)])
def test_512_experts_on_64_devices(sizes):
    before = len(jax.live_arrays())
    config, mesh = many_experts(), MeshShape(*sizes)
    made = plan(config, mesh)
    text = format_plan(made)
    assert len(jax.live_arrays()) <= before + 1
    assert made.formulas_agree
    assert_columns(text)
    for word in (f"mesh {mesh}: 64 devices", "157 B", "dispatch", "combine", "total", "FLOPs"):
        assert word in text, word

    # By hand: experts over `expert` and `tensor`, everything over `data`; norms, router and the
    # smallest parts aside.
    size = count_parameters(config.model)
    dense = size.total - size.experts
    masters = 4 * (size.experts / 64 + dense / (mesh.data * mesh.tensor))
    assert made.memory.masters == pytest.approx(masters, rel=0.03)
    assert made.memory.moments == 2 * made.memory.masters
    if mesh.data > 1:
        gathered = made.memory.weights * (mesh.data - 1) / mesh.data
        assert made.sent("weight gather") == pytest.approx(gathered, rel=0.01)
    else:
        assert made.sent(axis=DATA) == made.sent("weight gather") == 0
    assert (made.sent(axis=TENSOR) > 0) == (mesh.tensor > 1)

    # By hand: one layer's rows in bfloat16 to every other device, there and back.
    budget = made.exchanges[0][1]
    rows = (mesh.expert - 1) * budget.rows
    assert made.sent("combine") == 24 * 2 * rows * 4096 * 2
    assert f"24 layers: {budget.mode}" in text
    if budget.mode == "all_to_all":
        dispatched = 24 * rows * (2 * (4096 * 2 + 8 * 8) + 4096 * 2 + 8 * 4)
        assert made.sent("dispatch") == dispatched


def test_lowers_for_gpus_that_are_not_here():
    config = CASES["one wave, unrolled, float32, different k"][1]
    blueprint = Blueprint(
        dataclasses.replace(config.model, compute_dtype="bfloat16"),
        abstract_mesh(MeshShape(8, 8, 1)),
    )
    config = dataclasses.replace(
        config, model=blueprint.config, data=DataConfig(seq_len=16, batch_size=64)
    )
    traced = trace_step(blueprint, config)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own lowering of attention mixes dtypes
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("all_to_all", "all_reduce", "all_gather", "reduce_scatter"):
        assert f"stablehlo.{name}" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PRESETS if n != "tiny"])
def test_presets_have_plans(name):
    config = PRESETS[name]()
    made = plan(config, MeshShape.parse(config.mesh))
    assert made.formulas_agree
    assert_columns(format_plan(made))


# ── refusals ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((1, 16, 1), "mesh expert=16 with num_experts=8: .*shrink"),
        ((1, 1, 4), "mesh tensor=4 with num_kv_heads=2: .*shrink"),
        ((3, 2, 1), "batch_size=16 with accumulate=1 on mesh data=3,expert=2,tensor=1: .* of 6$"),
    ],
)
def test_what_does_not_fit(sizes, message):
    with pytest.raises(UserError, match=message) as error:
        plan(run_config(), MeshShape(*sizes))
    assert "\n" not in str(error.value)


# ── FLOPs ────────────────────────────────────────────────────────────────────


def dot_flops(jaxpr, times: int = 1) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[d] for d in contracting)
            total += 2 * times * eqn.outvars[0].aval.size * depth
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += dot_flops(inner, times * turns)
    return total


def test_flops_are_those_of_the_traced_products():
    # 16 assignments to 16 experts: no group is padded, so every product counts. In float32, where
    # the router's product is one; for bfloat16 rows it is three, of the same factors' parts.
    config = run_config(
        router={"num_experts": 16},
        model={
            "vocab_size": 192,
            "num_layers": 3,
            "first_dense_layers": 1,
            "dense_hidden": 96,
            "compute_dtype": "float32",
        },
        batch_size=1,
        seq_len=8,
    )
    tokens, dims = 8, 128
    counted = dot_flops(trace_step(one_device(config), config).jaxpr)
    flops = plan(config, MeshShape()).flops
    scores = flops.step - flops.weights  # the trace has the whole square, not the causal half
    of_scores = 2 * 2 * tokens * 2 * dims  # gradients of the experts' weights for each token
    assert counted == pytest.approx(tokens * (flops.weights + 2 * scores) + of_scores, rel=1e-9)
    assert flops.forward == pytest.approx(flops.step / 3)
    assert flops.recomputed == 0


def one_device(config: TrainConfig) -> Blueprint:
    return Blueprint(config.model, abstract_mesh(MeshShape()))


def test_recomputed_flops():
    config = run_config(
        router={"num_experts": 16},
        model={"vocab_size": 192, "compute_dtype": "float32"},
        batch_size=1,
        seq_len=8,
    )
    again = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="layer"))
    extra = sum(
        sign * dot_flops(trace_step(one_device(c), c).jaxpr)
        for sign, c in ((1, again), (-1, config))
    )
    flops = plan(again, MeshShape()).flops
    scores = (flops.step - flops.weights) / 3
    assert extra == pytest.approx(8 * (flops.recomputed + scores), rel=1e-6)


# ── text ─────────────────────────────────────────────────────────────────────


def test_units():
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536 * 1024, 2**40, 999.6 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 MiB",
        "1.00 TiB",
        "0.98 TiB",
    ]
    assert [format_count(n) for n in (7, 1234, 46.7e9, 1e19)] == [
        "7",
        "1.23 k",
        "46.7 G",
        "10000 P",
    ]


# ── against the compiler ─────────────────────────────────────────────────────

OPERATION = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all)\((?P<rest>.*)"
)
ITEM = {"f32": 4, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


def groups_of(rest: str) -> np.ndarray:
    explicit = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest)
    if explicit:
        return np.array([[int(n) for n in g.split(",")] for g in explicit[1][1:-1].split("},{")])
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
@pytest.mark.parametrize("mode, remat", [("all_to_all", "layer"), ("ring", "none")])
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
