"""The plan of a run: larger meshes than the machine, what does not fit, FLOPs, units."""

import dataclasses
import math

import jax
import pytest
from planner_support import CASES, assert_columns, run_config

from moejax.config import LatentConfig
from moejax.errors import UserError
from moejax.presets import PRESETS
from moejax.training.config import DataConfig, TrainConfig
from moejax.training.state import Blueprint
from sharding.costs import count_parameters
from sharding.mesh import DATA, TENSOR, MeshShape, abstract_mesh
from sharding.plan_text import format_bytes, format_count
from sharding.planner import format_plan, plan, trace_step

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


ATTENTIONS = {
    "grouped": {},
    "sinks, biases, windows": {"sinks": True, "bias": True, "output_bias": True, "window": 3},
    "latent": {"num_kv_heads": 4, "head_dim": 24, "latent": LatentConfig(32, 8, 20, 48)},
    "latent, queries of the input": {"num_kv_heads": 4, "latent": LatentConfig(32, 8, 12)},
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_flops_are_those_of_the_traced_products(name):
    # 16 assignments to 16 experts: no group is padded, so every product counts. In float32, where
    # the router's product is one; for bfloat16 rows it is three, of the same factors' parts.
    config = run_config(
        router={"num_experts": 16},
        attention=ATTENTIONS[name],
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
    # The trace has the whole square of logits and values, three times with the backward.
    attention = config.model.attention
    width = attention.num_heads * (attention.head_dim + attention.value_dim)
    square = 3 * 3 * 2 * tokens * width
    of_scores = 2 * 2 * tokens * 2 * dims  # gradients of the experts' weights for each token
    assert counted == pytest.approx(tokens * (flops.weights + square) + of_scores, rel=1e-9)
    # The model needs what a token sees, its own position counted half.
    window = attention.window or tokens
    seen = sum(min(at + 1, window) for at in range(tokens))
    needed = (flops.step - flops.weights) * tokens / (3 * 3 * 2 * width)
    assert seen - tokens / 2 <= needed <= seen
    assert flops.forward == pytest.approx(flops.step / 3)
    assert flops.recomputed == 0


@pytest.mark.parametrize("name", CASES)
def test_counted_parameters_are_those_of_the_arrays(name):
    config = CASES[name][1].model
    params = jax.tree.leaves(Blueprint(config, abstract_mesh(MeshShape())).params)
    padding = (config.padded_vocab - config.vocab_size) * config.d_model
    padding *= 1 if config.tie_embeddings else 2
    assert count_parameters(config).total == sum(a.size for a in params) - padding


def test_flops_of_windows_by_layer():
    def scores(**model):
        flops = plan(run_config(model={"num_layers": 2, **model}), MeshShape()).flops
        return flops.step - flops.weights

    whole = scores()
    assert scores(window_by_layer=(0, 16)) == whole  # as long as the text, and longer
    assert scores(window_by_layer=(0, 99)) == whole
    # Of 16 tokens' triangle of 128 a window of 4 leaves 16·4 − 4²/2 = 56.
    assert scores(window_by_layer=(4, 0)) == pytest.approx(whole * (1 + 56 / 128) / 2)


def one_device(config: TrainConfig) -> Blueprint:
    return Blueprint(config.model, abstract_mesh(MeshShape()))


@pytest.mark.parametrize("remat", ["layer", "local", "dots"])
def test_recomputed_flops(remat):
    config = run_config(
        router={"num_experts": 16},
        model={"vocab_size": 192, "compute_dtype": "float32"},
        batch_size=1,
        seq_len=8,
    )
    again = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
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
