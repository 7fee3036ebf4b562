"""Presets: published shapes, and parameter counts against the model's own arrays."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.model.decoder import Decoder, check_mesh
from moejax.presets import PRESETS
from moejax.training.config import TrainConfig
from moejax.training.config_json import config_from_json, config_to_json
from sharding.costs import count_parameters
from sharding.mesh import MeshShape
from train import choose_mesh

# Total parameters of the published checkpoints, and active ones in billions as their papers say
# (DeepSeek's leave the embedding out).
PUBLISHED = {
    "mixtral_8x7b": (46_702_792_704, 12.9),
    "qwen3_30b_a3b": (30_532_122_624, 3.3),
    "olmoe_1b_7b": (6_919_161_856, 1.3),
    "deepseek_v2_lite": (15_706_484_224, 2.4),
}


def arrays(config: ModelConfig) -> int:
    """Parameters of the model as it is made, on a mesh that pads no expert bank."""

    def make(key):
        model = Decoder(config, MeshShape(), nnx.Rngs(params=key))
        return nnx.split(model, nnx.Param, ...)[1]

    shapes = jax.eval_shape(make, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_the_default_comes_first():
    assert next(iter(PRESETS)) == "tiny"
    assert set(PUBLISHED) | {"tiny", "small"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_runs_that_fit_their_mesh(name):
    config = PRESETS[name]()
    assert isinstance(config, TrainConfig) and config == PRESETS[name]()
    assert config_from_json(TrainConfig, config_to_json(config)) == config
    mesh = choose_mesh(config)
    check_mesh(config.model, mesh)
    assert config.data.batch_size % (mesh.data * mesh.expert * config.accumulate) == 0
    assert config.model.vocab_size >= max(257, config.data.vocab)  # the end of a document included


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_arrays(name):
    config = PRESETS[name]().model
    short = dataclasses.replace(config, num_layers=config.first_dense_layers + 1)
    tables = 1 if short.tie_embeddings else 2
    padding = (short.padded_vocab - short.vocab_size) * short.d_model * tables
    assert count_parameters(short).total == arrays(short) - padding


def test_parameters_of_what_no_preset_has():
    config = PRESETS["tiny"]().model
    router = dataclasses.replace(config.moe.router, bias=True, selection_bias=True)
    experts = dataclasses.replace(
        config.moe.experts, bias=True, activation="gelu", shared_hidden=32, shared_gate=True
    )
    config = dataclasses.replace(
        config,
        vocab_size=256,
        tie_embeddings=True,
        first_dense_layers=1,
        dense_hidden=48,
        top_k_by_layer=(1, 2, 3, 4),
        attention=dataclasses.replace(config.attention, qk_norm="full"),
        moe=dataclasses.replace(config.moe, router=router, experts=experts),
    )
    counted = count_parameters(config)
    assert counted.total == arrays(config)
    one_expert = 2 * 128 * 128 + 128 + 128
    assert counted.experts == 3 * 8 * one_expert
    assert counted.active == counted.total - (6 + 5 + 4) * one_expert


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    model = PRESETS[name]().model
    counted, (total, active) = count_parameters(model), PUBLISHED[name]
    if name == "deepseek_v2_lite":
        # Its latent attention: queries 192 wide, keys and values by way of 512 + 64 numbers.
        latent = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 + 512 * 16 * 256 + 16 * 128 * 2048
        grouped = 2 * 2048 * (16 + 8) * 128
        assert counted.total == total - 27 * (latent - grouped) == 15_674_619_904
        assert counted.active == 2_629_285_888
        assert f"{(counted.active - 102_400 * 2048) / 1e9:.1f}" == str(active)
    else:
        assert counted.total == total
        assert counted.active / 1e9 == pytest.approx(active, abs=0.06)


def test_small_fits_the_issue():
    model = PRESETS["small"]().model
    assert count_parameters(model).total >= 1e9
    assert model.d_model >= 1024 and model.moe.router.num_experts >= 64


def test_presets_refuse_meshes_that_do_not_suit():
    with pytest.raises(UserError, match="shrink the expert axis"):
        check_mesh(PRESETS["mixtral_8x7b"]().model, MeshShape(1, 16, 1))
