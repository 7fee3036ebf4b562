"""Inference with experts that are fewer than outputs, unequal by layer, or share: from a folder."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_support import check_books, run
from fewer_experts_support import draw, model_of, save
from inference_support import check_greedy, make_generator
from jax import numpy as jnp
from test_serve_expert_weights import logits_of

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.exchange_choice import pick
from moejax.inference.expert_weights import quantized_blueprint, quantizing
from moejax.inference.model_folder import save_model_folder
from moejax.inference.params import SamplingParams
from moejax.inference.placement_choice import choose_placement
from moejax.inference.sampling import SamplingConfig
from moejax.inference.source import open_model
from moejax.placement.record import record, trace_of
from moejax.serving import start
from moejax.serving.flags import EngineFlags
from moejax.serving.start import load_model
from moejax.training.state import Blueprint, load_weights, weight_targets
from pallas_kernels.quantized_experts.format import dequantize, quantize
from sharding.mesh import MeshShape, make_mesh

MOST = 8
GREEDY = SamplingParams(temperature=0, max_tokens=MOST, ignore_eos=True)
# Few shapes of steps, as compiling takes most of the time.
FLAGS = {"dtype": "float32", "prefill_chunk": 16, "max_rows": 4, "page_len": 8}


@pytest.fixture(autouse=True)
def compiled_programs_are_not_kept(monkeypatch):
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)


def generate(engine, prompts):
    ids = [engine.add(prompt, GREEDY) for prompt in prompts]
    made, _ = run(engine)
    check_books(engine)
    return [made[id, 0][0] for id in ids]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=1,expert=1,tensor=1", "data=1,expert=2,tensor=1"])
@pytest.mark.parametrize("kind", ["merged", "unequal", "merged+unequal", "up", "in", "basis"])
def test_engine(tmp_path, rng, kind, mesh):
    config = model_of(kind)
    flat = save(tmp_path / "m", rng, config)
    engine = start.make_engine(open_model(tmp_path / "m"), EngineFlags(mesh=mesh, **FLAGS))
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (5, 19)]
    compared = 0
    for prompt, made in zip(prompts, generate(engine, prompts)):
        assert len(made) == MOST
        compared += check_greedy(config, flat, prompt, made)
    assert compared > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes", "scanned"),
    [
        ("merged+unequal", (1, 2, 1), False),
        ("merged", (2, 2, 1), True),
        ("unequal", (1, 2, 1), False),
        ("basis", (1, 2, 2), True),
        ("merged+unequal+up", (1, 2, 1), False),
    ],
)
def test_generator(rng, kind, sizes, scanned):
    config = model_of(kind)
    flat = draw(rng, config)
    generator = make_generator(dataclasses.replace(config, scan_layers=scanned), flat, sizes)
    prompts = [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in (9, 12, 16)]
    made = generator.generate(prompts, max_tokens=MOST, sampling=SamplingConfig())
    tokens = [result.tokens for result in made]
    assert sum(check_greedy(config, flat, *pair) for pair in zip(prompts, tokens)) > 0


@pytest.mark.parametrize(
    ("kind", "weights", "devices"),
    [
        ("merged+unequal", "int8", 2),
        ("unequal", "fp8", 2),
        ("merged", "int8", 1),
        ("merged", "fp8", 3),
    ],
)
@pytest.mark.slow
def test_expert_weights_of_8_bits(tmp_path, rng, kind, weights, devices):
    """The logits are those of weights that were rounded by hand, on one device."""
    config = model_of(kind)
    flat = save(tmp_path / "m", rng, config)
    dtype, rounded = jnp.dtype("int8" if weights == "int8" else "float8_e4m3fn"), dict(flat)
    for name, value in flat.items():
        if name.endswith(("bank.w_in", "bank.w_out")):
            up = name.endswith("w_in")
            value = jnp.asarray(value.swapaxes(1, 2) if up else value)
            value = np.asarray(dequantize(quantize(value, dtype), jnp.float32))
            rounded[name] = value.swapaxes(1, 2) if up else value
    save_model_folder(tmp_path / "r", rounded, config, Tokenizer(), record={}, dtype=np.float32)
    many, one = MeshShape(expert=devices), MeshShape()
    got = logits_of(*load_model(open_model(tmp_path / "m"), many, "float32", weights))
    want = logits_of(*load_model(open_model(tmp_path / "r"), one, "float32"))
    plain = logits_of(*load_model(open_model(tmp_path / "m"), one, "float32"))
    scale = np.abs(plain).max()
    assert np.abs(got - want).max() < 1e-4 * scale < np.abs(got - plain).max()


def test_layers_are_quantized_one_by_one(tmp_path, rng):
    """Six experts lie split over two devices, nine do not: a program for each."""
    config = model_of("merged+unequal")
    flat = save(tmp_path / "m", rng, config)
    blueprint = Blueprint(config, make_mesh(MeshShape(expert=2)))
    quantized = quantized_blueprint(blueprint, "int8")
    found = open_model(tmp_path / "m").weights(blueprint, quantizing(quantized, "int8"))
    for name, target in weight_targets(quantized, jnp.float32).items():
        assert found[name].shape == target.shape
        assert found[name].sharding.is_equivalent_to(target.sharding, target.ndim), name
    for layer in 0, 1:
        name = f"params/layers.{layer}.moe.bank.w_out"
        right = quantize(jnp.asarray(flat[name]), jnp.dtype("int8"))
        np.testing.assert_array_equal(found[f"{name}_values"], right.values)
        np.testing.assert_array_equal(found[f"{name}_scales"], right.scales)


@pytest.mark.slow
def test_engine_with_weights_of_8_bits(tmp_path, rng):
    """Steps of an engine and a pass of the same quantized weights over all tokens agree."""
    config = model_of("merged+unequal")
    save(tmp_path / "m", rng, config)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (5, 19)]
    found = []
    for mesh in "data=1,expert=1,tensor=1", "data=1,expert=2,tensor=1":
        flags = EngineFlags(mesh=mesh, expert_weights="int8", **FLAGS)
        found.append(generate(start.make_engine(open_model(tmp_path / "m"), flags), prompts))
    assert found[0] == found[1]


def test_experts_are_reported(rng):
    """Each layer's own, counted among as many as the layer with most has; a plain count is equal.

    A token has an expert once that several of its outputs became.
    """
    config = model_of("merged+unequal")
    blueprint = Blueprint(config, make_mesh(MeshShape(expert=2)))
    weights = load_weights(draw(rng, config), blueprint, jnp.float32)
    documents = [rng.integers(0, config.vocab_size, 16) for _ in range(3)]
    recording = record(blueprint, *weights, documents, tokens=True)
    experts_NLK = recording.experts_NLK
    assert experts_NLK.shape == (48, 2, 3) and recording.load_LE.shape == (2, 9)
    for layer, count in enumerate((6, 9)):
        chosen_NK = experts_NLK[:, layer]
        assert chosen_NK.max() < count and (chosen_NK[:, 0] >= 0).all()
        assert (chosen_NK < 0).any(), "no token had one expert twice"
        for row in chosen_NK:
            assert len(set(row[row >= 0])) == (row >= 0).sum()
        right = np.bincount(chosen_NK[chosen_NK >= 0], minlength=9)
        np.testing.assert_array_equal(recording.load_LE[layer], right)


@pytest.mark.slow
def test_one_trace_and_one_exchange_for_all_layers(rng):
    config = model_of("unequal")
    blueprint = Blueprint(config, make_mesh(MeshShape(expert=2)))
    weights = load_weights(draw(rng, config), blueprint, jnp.float32)
    trace = trace_of(blueprint, *weights, [rng.integers(0, config.vocab_size, 16)])
    assert trace.num_experts == 9 and trace.experts_NLK[:, 0].max() < 6

    def timer(name, rows, call):
        call()
        return {"ring": 2.0, "all_to_all": 1.0}.get(name, 3.0)

    picked = pick(blueprint, weights, [2], timer=timer)
    assert picked.exchanges == {2: "all_to_all"}


@pytest.mark.slow
def test_merged_experts_move(tmp_path, rng):
    """Placements are of experts, not of outputs."""
    config = model_of("merged")
    flat = save(tmp_path / "m", rng, config)
    engine = start.make_engine(
        open_model(tmp_path / "m"),
        EngineFlags(
            mesh="data=1,expert=2,tensor=1",
            placement="auto",
            replicas=1,
            rebalance_every=2,
            **FLAGS,
        ),
    )
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (5, 19)]
    for prompt, made in zip(prompts, generate(engine, prompts)):
        check_greedy(config, flat, prompt, made)
    assert engine.stats().placement.looks > 0
    engine.close()


def test_what_is_refused(tmp_path, rng):
    config = model_of("basis")
    shape = MeshShape(expert=2)
    with pytest.raises(UserError, match="--placement auto with experts that share parameters"):
        choose_placement("auto", config, shape)
    save(tmp_path / "m", rng, config)
    with pytest.raises(UserError, match="--expert-weights int8 with experts that share"):
        load_model(open_model(tmp_path / "m"), shape, "float32", "int8")
    with pytest.raises(UserError, match="expert=7 with num_experts=6: every device needs"):
        Blueprint(model_of("unequal"), make_mesh(MeshShape(expert=7)))
    assert start.start_devices(EngineFlags(devices=8), model_of("unequal")).expert == min(
        6, len(jax.devices())
    )
