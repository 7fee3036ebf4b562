"""Presets: published shapes, and parameter counts against the model's own arrays."""

import dataclasses
import math

import jax
import pytest
from flax import nnx
from published_support import PUBLISHED as CONFIGS

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.families import read_config, write_config
from moejax.model.decoder import Decoder, check_mesh
from moejax.presets import PRESETS
from moejax.training.config import TrainConfig
from moejax.training.config_json import config_from_json, config_to_json
from sharding.costs import count_parameters
from sharding.mesh import MeshShape
from train import choose_mesh

# Total parameters of the published checkpoints, and billions as their papers say: all, active.
# DeepSeek's and gpt-oss's active ones leave the embedding out.
PUBLISHED = {
    "mixtral_8x7b": (46_702_792_704, 46.7, 12.9),
    "qwen3_30b_a3b": (30_532_122_624, 30.5, 3.3),
    "olmoe_1b_7b": (6_919_161_856, 6.9, 1.3),
    "deepseek_v2_lite": (15_706_484_224, 15.7, 2.4),
    "deepseek_v3": (671_026_404_352, 671, 37),
    "gpt_oss_20b": (20_914_757_184, 20.9, 3.6),
}
WITHOUT_EMBEDDING = ("deepseek_v2_lite", "deepseek_v3", "gpt_oss_20b")
FAMILIES = {
    "mixtral_8x7b": "mixtral",
    "qwen3_30b_a3b": "qwen3_moe",
    "olmoe_1b_7b": "olmoe",
    "deepseek_v2_lite": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "gpt_oss_20b": "gpt_oss",
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
    layers = config.first_dense_layers + 1
    short = dataclasses.replace(config, num_layers=layers, window_by_layer=())
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
    counted, (exact, total, active) = count_parameters(model), PUBLISHED[name]
    # Without the selection biases, one for an expert of a layer in DeepSeek-V3.
    assert counted.total == exact
    left_out = model.vocab_size * model.d_model if name in WITHOUT_EMBEDDING else 0
    for number, said in (counted.total, total), (counted.active - left_out, active):
        assert number / 1e9 == pytest.approx(said, abs=0.5 if said == int(said) else 0.06)


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_presets_are_the_published_config_json(name, family):
    """They differ in how the model is trained, and in nothing else."""

    def without_training(model: ModelConfig) -> ModelConfig:
        router = dataclasses.replace(
            model.moe.router, load_balance_coef=0.0, z_loss_coef=0.0, bias_update_rate=0.0
        )
        moe = dataclasses.replace(model.moe, router=router)
        return dataclasses.replace(model, moe=moe, scan_layers=False, remat="none")

    model = PRESETS[name]().model
    assert without_training(model) == without_training(read_config(CONFIGS[family][1]))
    assert write_config(model, family)["model_type"] == family


def test_small_fits_the_issue():
    model = PRESETS["small"]().model
    assert count_parameters(model).total >= 1e9
    assert model.d_model >= 1024 and model.moe.router.num_experts >= 64


def test_presets_refuse_meshes_that_do_not_suit():
    with pytest.raises(UserError, match="shrink the expert axis"):
        check_mesh(PRESETS["mixtral_8x7b"]().model, MeshShape(1, 16, 1))
