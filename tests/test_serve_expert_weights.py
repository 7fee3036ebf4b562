"""Whole models whose experts have weights of 8 bits."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest
from flax import nnx
from inference_support import CONFIG, random_weights
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import ExchangeConfig, WireConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.expert_weights import quantized_blueprint, quantizing
from moejax.inference.model_folder import save_model_folder
from moejax.inference.source import open_model
from moejax.serving.start import load_model
from moejax.training.state import Blueprint, load_weights, weight_targets
from pallas_kernels.quantized_experts.format import dequantize, quantize
from sharding.mesh import TENSOR, TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of


@pytest.mark.parametrize(
    ("scanned", "shape"),
    [
        (False, MeshShape(expert=2)),
        (True, MeshShape(expert=2)),
        (False, MeshShape(expert=3)),  # of which the last device has an empty slot
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_expert_weights_of_8_bits(tmp_path, rng, weights, scanned, shape):
    """The model's logits are those of weights that were rounded by hand."""
    flat = random_weights(CONFIG, rng)
    config = dataclasses.replace(CONFIG, scan_layers=scanned)
    save_model_folder(tmp_path / "m", flat, config, Tokenizer(), record={}, dtype=np.float32)
    source = open_model(tmp_path / "m")
    dtype = jnp.dtype("int8" if weights == "int8" else "float8_e4m3fn")
    rounded = dict(flat)
    for name, value in flat.items():
        if name.endswith(("bank.w_in", "bank.w_out")):
            up = name.endswith("w_in")
            value = jnp.asarray(value.swapaxes(1, 2) if up else value)
            value = np.asarray(dequantize(quantize(value, dtype), jnp.float32))
            rounded[name] = value.swapaxes(1, 2) if up else value
    assert any(not np.array_equal(rounded[name], flat[name]) for name in flat)
    save_model_folder(tmp_path / "r", rounded, config, Tokenizer(), record={}, dtype=np.float32)
    got = logits_of(*load_model(source, shape, "float32", weights))
    want = logits_of(*load_model(open_model(tmp_path / "r"), shape, "float32"))
    plain = logits_of(*load_model(source, shape, "float32"))
    scale = np.abs(plain).max()
    assert np.abs(got - want).max() < 1e-4 * scale < np.abs(got - plain).max()
    assert isinstance(load_model(source, shape, "float32", weights)[0], Blueprint)


def logits_of(blueprint, params, biases):
    def run(params, biases, tokens):
        model = blueprint.merge(params, biases)
        return model.logits(model(tokens, inference=True).hidden_BSD)

    specs = (specs_of(blueprint.params), blueprint.bias_specs, P(TOKEN_AXES))
    run = jax.shard_map(
        run,
        mesh=blueprint.mesh,
        in_specs=specs,
        out_specs=P(TOKEN_AXES, None, TENSOR),
        check_vma=False,
    )
    tokens = jnp.arange(120, dtype=jnp.int32).reshape(6, 20)
    return np.asarray(jax.jit(run)(params, biases, tokens))[..., :257]


def test_matrices_are_given_up_as_they_are_read(tmp_path, rng):
    """While weights are read, no more than one of the experts' float matrices is there."""
    flat = random_weights(CONFIG, rng)
    save_model_folder(tmp_path / "m", flat, CONFIG, Tokenizer(), record={}, dtype=np.float32)
    blueprint = Blueprint(CONFIG, make_mesh(MeshShape(expert=2)))
    quantized = quantized_blueprint(blueprint, "int8")
    keep, alive = quantizing(quantized, "int8"), []

    def watched(name, array):
        kept = keep(name, array)
        if name.endswith(("bank.w_in", "bank.w_out")):
            alive.append(weakref.ref(array))
            assert not any(other() is not None for other in alive[:-1])
            assert set(kept) == {f"{name}_values", f"{name}_scales"}
        return kept

    made = open_model(tmp_path / "m").weights(blueprint, watched)
    assert len(alive) == 2 * sum(layer.moe is not None for layer in CONFIG.layers())
    assert made.keys() == weight_targets(quantized, jnp.float32).keys()
    params, _ = load_weights(made, quantized, jnp.float32)
    for path, variable in nnx.to_flat_state(params):
        name = f"params/{'.'.join(map(str, path))}"
        if name in made:  # nothing was copied
            assert variable.get_value() is made[name]


def test_projected_rows_are_refused():
    wire = WireConfig(dispatch_dim=16)
    moe = dataclasses.replace(CONFIG.moe, exchange=ExchangeConfig(wire=wire))
    blueprint = Blueprint(dataclasses.replace(CONFIG, moe=moe), make_mesh(MeshShape()))
    with pytest.raises(UserError, match="--expert-weights fp8 with rows of dispatch_dim=16"):
        quantized_blueprint(blueprint, "fp8")


def test_a_model_without_experts(tmp_path, rng):
    config = dataclasses.replace(CONFIG, first_dense_layers=2, dense_hidden=16)
    flat = random_weights(config, rng)
    save_model_folder(tmp_path / "m", flat, config, Tokenizer(), record={}, dtype=np.float32)
    with pytest.raises(UserError, match="--expert-weights int8: the model has no experts"):
        load_model(open_model(tmp_path / "m"), MeshShape(), "float32", "int8")
