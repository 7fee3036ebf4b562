"""Folders of transformers whose quantized tensors are damaged or unknown."""

import ml_dtypes
import numpy as np
import pytest
from inference_support import random_weights
from test_families_refused import CONFIG, EXPERT, change_tensors, edit_json, refusal

from moejax.families import read_config
from moejax.families.export import save_hf_folder
from moejax.inference.source import open_model
from moejax.training.state import Blueprint
from sharding.mesh import MeshShape, make_mesh


@pytest.fixture
def folder(tmp_path, rng):
    save_hf_folder(tmp_path / "hf", random_weights(CONFIG, rng), CONFIG, family="mixtral")
    return tmp_path / "hf"


def quantize(folder, scheme, change):
    change_tensors(folder, change)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=scheme))


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def test_float8(folder):
    number, scales = np.ones((16, 32), ml_dtypes.float8_e4m3fn), np.ones((1, 2), np.float32)

    def put(**tensors):
        quantize(folder, FP8, lambda t: t.update({EXPERT + n: a for n, a in tensors.items()}))

    put(**{"": number, "_scale_inv": scales})
    open_model(folder).weights(Blueprint(CONFIG, make_mesh(MeshShape())))
    for value in np.nan, np.inf:
        put(_scale_inv=np.array([[1, value]], np.float32))
        assert f"{EXPERT}: a scale is not finite" in refusal(folder)
    put(_scale_inv=np.ones((2, 2), np.float32))
    assert EXPERT in refusal(folder) and "(2, 2)" in refusal(folder)
    put(**{"": np.ones((16, 32), np.float32), "_scale_inv": scales})
    assert "float32 (16, 32) with scales" in refusal(folder)
    quantize(folder, FP8, lambda t: t.pop(EXPERT))
    assert f"{EXPERT} is missing" in refusal(folder)
    put(**{"": number})
    quantize(folder, FP8, lambda t: t.pop(EXPERT + "_scale_inv"))
    assert f"{EXPERT} is float8_e4m3fn without scales" in refusal(folder)
    edit_json(folder / "config.json", lambda c: c.pop("quantization_config"))
    assert f"{EXPERT} is float8_e4m3fn without scales" in refusal(folder)


def test_four_bits(folder):
    scheme, name = {"quant_method": "mxfp4"}, "model.extra"

    def put(blocks, scales):
        parts = {name + "_blocks": blocks, name + "_scales": scales}
        quantize(folder, scheme, lambda t: t.update(parts))

    put(np.zeros((1, 2, 3, 16), np.uint8), np.zeros((1, 2, 3), np.uint8))
    assert refusal(folder).count("model.extra is unknown") == 1  # the two are one
    for shape in (1, 2, 3, 8), (1, 2, 4, 16), (2, 3, 16):
        put(np.zeros(shape, np.uint8), np.zeros((1, 2, 3), np.uint8))
        assert "[E, O, G, 16]" in refusal(folder)
    quantize(folder, scheme, lambda t: t.pop(name + "_scales"))
    assert "model.extra_scales is missing" in refusal(folder)


def test_four_bits_whose_scale_is_no_number(tmp_path, rng):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = read_config({"model_type": "gpt_oss", "vocab_size": 70, **sizes, **heads})
    folder, name = tmp_path / "hf", "model.layers.0.mlp.experts.gate_up_proj"
    save_hf_folder(folder, random_weights(config, rng), config, family="gpt_oss")
    shape = (4, 64, 1)  # experts, gates and ups, blocks of 32 inputs
    blocks = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
    scales = rng.integers(0, 128, shape, dtype=np.uint8)

    def put(tensors):
        tensors.pop(name, None)
        tensors.update({name + "_blocks": blocks, name + "_scales": scales})

    quantize(folder, {"quant_method": "mxfp4"}, put)
    assert open_model(folder).weights(Blueprint(config, make_mesh(MeshShape())))
    scales.flat[rng.integers(scales.size)] = 255
    quantize(folder, {"quant_method": "mxfp4"}, put)
    assert f"{name}: a scale is not finite" in refusal(folder, config)


@pytest.mark.parametrize(
    "scheme",
    [{"quant_method": "gptq"}, {"quant_method": "fp8"}, "fp8", {**FP8, "weight_block_size": [0]}],
)
def test_unknown_schemes(folder, scheme):
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=scheme))
    assert "quantization_config with quant_method=" in refusal(folder)
