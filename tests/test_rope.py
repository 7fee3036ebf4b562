"""Rotary positions against complex numbers in float64, and against what `transformers` rotates."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from model_support import rope

from moejax.config import YarnConfig
from moejax.model.rope import rotate, yarn_frequencies

GPT_OSS = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
DEEPSEEK = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}
OTHERS = {
    "given factor": DEEPSEEK | {"attention_factor": 0.8},
    "steep ramp": GPT_OSS | {"beta_fast": 1.0001, "beta_slow": 1.0},
    "all stretched": GPT_OSS | {"original_max_position_embeddings": 8},
    "not stretched": DEEPSEEK | {"factor": 1.0},
}


def yarn_of(parameters) -> YarnConfig:
    names = {"original_max_position_embeddings": "original_context"}
    other = ("rope_type", "rope_theta")
    return YarnConfig(**{names.get(k, k): v for k, v in parameters.items() if k not in other})


def drawn(rng, largest, width=16):
    x = rng.normal(size=(2, 5, 3, width)).astype(np.float32)
    return x, rng.integers(0, largest, size=(2, 5)).astype(np.int32)


@pytest.mark.parametrize("yarn", [None, yarn_of(GPT_OSS), yarn_of(DEEPSEEK)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_is_multiplication_of_complex_numbers(interleaved, yarn, rng):
    x, positions = drawn(rng, 2000)
    settings = {"theta": 1e4, "interleaved": interleaved, "yarn": yarn}
    rotated = jax.jit(functools.partial(rotate, **settings))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(rotated(x, positions), rope(wide, positions, **settings), atol=2e-3)
    small = np.minimum(positions, 7)
    np.testing.assert_allclose(rotated(x, small), rope(wide, small, **settings), atol=6e-6)
    short = jnp.asarray(x, jnp.bfloat16)
    assert rotate(short, jnp.asarray(positions), **settings).dtype == jnp.bfloat16


@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("parameters", [GPT_OSS, DEEPSEEK, *OTHERS.values()])
def test_yarn_is_that_of_transformers(parameters, width):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import _compute_yarn_parameters

    config = transformers.GptOssConfig(
        head_dim=width, rope_parameters=parameters, max_position_embeddings=131_072
    )
    frequencies, scale = _compute_yarn_parameters(config)
    yarn = yarn_of(parameters)
    assert yarn.rotation_scale == pytest.approx(scale, rel=1e-12)
    got = yarn_frequencies(width, parameters["rope_theta"], yarn)
    assert got.dtype == np.float32
    # Near the end of a steep ramp theirs is a small difference of float32 numbers.
    np.testing.assert_allclose(got, frequencies.numpy(), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("model", ["gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_rotations_are_those_of_the_models(model, rng):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    width, parameters = 16, GPT_OSS if model == "gpt_oss" else DEEPSEEK
    x, positions = drawn(rng, 100, width)
    heads_first = torch.from_numpy(x).transpose(1, 2)
    name = {"gpt_oss": "GptOss", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}[model]
    module = getattr(transformers.models, model)
    theirs = getattr(module, f"modeling_{model}")
    sizes = {"head_dim": width} if model == "gpt_oss" else {"qk_rope_head_dim": width}
    config = getattr(transformers, f"{name}Config")(
        **sizes, rope_parameters=parameters, max_position_embeddings=131_072
    )
    embedding = getattr(theirs, f"{name}RotaryEmbedding")(config)
    turns = embedding(heads_first, torch.from_numpy(positions))
    if model == "deepseek_v2":
        want = theirs.apply_rotary_emb(heads_first, heads_first, turns)[0]
    elif model == "deepseek_v3":
        want = theirs.apply_rotary_pos_emb_interleave(heads_first, heads_first, *turns)[0]
        # Theirs come out as halves: what is summed over a head is the same.
        want = torch.stack(want.chunk(2, dim=-1), dim=-1).flatten(-2)
    else:
        want = theirs.apply_rotary_pos_emb(heads_first, heads_first, *turns)[0]
    got = rotate(
        x,
        positions,
        parameters["rope_theta"],
        interleaved=model != "gpt_oss",
        yarn=yarn_of(parameters),
    )
    np.testing.assert_allclose(got, want.transpose(1, 2).numpy(), atol=2e-4)
