"""Whole models whose experts have weights of 8 bits."""

import dataclasses

import jax
import numpy as np
import pytest
from inference_support import CONFIG, random_weights
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.model_folder import save_model_folder
from moejax.inference.source import open_model
from moejax.serving.start import load_model
from moejax.training.state import Blueprint
from pallas_kernels.quantized_experts.format import dequantize, quantize
from sharding.mesh import TENSOR, TOKEN_AXES, MeshShape
from sharding.specs import specs_of


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_expert_weights_of_8_bits(tmp_path, rng, weights, scanned):
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
    shape = MeshShape(expert=2)
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
    tokens = jnp.arange(40, dtype=jnp.int32).reshape(2, 20)
    return np.asarray(jax.jit(run)(params, biases, tokens))[..., :257]


def test_a_model_without_experts(tmp_path, rng):
    config = dataclasses.replace(CONFIG, first_dense_layers=2, dense_hidden=16)
    flat = random_weights(config, rng)
    save_model_folder(tmp_path / "m", flat, config, Tokenizer(), record={}, dtype=np.float32)
    with pytest.raises(UserError, match="--expert-weights int8: the model has no experts"):
        load_model(open_model(tmp_path / "m"), MeshShape(), "float32", "int8")
