"""The models whose inference is timed: shapes, random weights, and what a step must at least take.

A decoding step reads every weight that it touches and the keys and values of its texts; a prompt
multiplies each token with the weights that are active for it. Both are bounds, not predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from moejax.config import ModelConfig
from moejax.inference.source import ModelSource
from moejax.inference.stored import Keep, keep_all
from moejax.presets import PRESETS
from moejax.training.state import Blueprint, weight_targets
from sharding.flops import active_matrix_parameters

MODELS = ("olmoe_1b_7b", "qwen3_30b_a3b", "mixtral_8x7b")
READ_BYTES = 3.05e12  # a second, measured on one H100
DOT_FLOPS = 712e12  # a second, of a large bfloat16 `jnp.dot` there: 704 to 720
WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "fp8": 1.0}  # scales of 128 × 128 blocks are 0.02 %


def model_of(name: str, *, tiny: bool = False) -> ModelConfig:
    """The published shapes, as inference runs them: layers unrolled."""
    model = PRESETS[name]().model
    if tiny:
        router = dataclasses.replace(model.moe.router, num_experts=8, top_k=2)
        experts = dataclasses.replace(model.moe.experts, hidden=128)
        attention = dataclasses.replace(model.attention, num_heads=4, num_kv_heads=2, head_dim=32)
        model = dataclasses.replace(
            model,
            vocab_size=512,
            d_model=128,
            num_layers=2,
            attention=attention,
            moe=dataclasses.replace(model.moe, router=router, experts=experts),
            compute_dtype="float32",
        )
    return dataclasses.replace(model, scan_layers=False, remat="none")


def random_source(config: ModelConfig, seed: int = 0) -> ModelSource:
    """A model whose weights are drawn on the devices: normal, of deviation 1 / √(inputs)."""

    def weights(blueprint: Blueprint, keep: Keep = keep_all) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        dtype = jnp.dtype(blueprint.config.compute_dtype)
        targets = weight_targets(blueprint, dtype)
        for index, (name, target) in enumerate(targets.items()):
            key = jax.random.fold_in(jax.random.key(seed), index)
            arrays |= keep(name, draw_weight(key, name, target))
        return arrays

    return ModelSource(Path("random"), config, None, weights)


def draw_weight(key: jax.Array, name: str, target: Any) -> jax.Array:
    """One array of deviation 1 / √inputs; norms' scales are ones."""
    shape = target.shape
    inputs = {"w_o": math.prod(shape[:-1]), "w_in": shape[-3] if len(shape) > 2 else 1}
    inputs["w_out"] = shape[-2] if len(shape) > 1 else 1
    fan_in = inputs.get(name.rpartition(".")[2], shape[0])
    deviation = fan_in**-0.5 if len(shape) > 1 else None
    return _drawing(shape, target.dtype, target.sharding, deviation)(key)


@functools.cache
def _drawing(shape: Any, dtype: Any, sharding: Any, deviation: float | None) -> Callable[..., Any]:
    def draw(key: jax.Array) -> jax.Array:
        if deviation is None:
            return jnp.ones(shape, dtype)
        return (jax.random.normal(key, shape, jnp.bfloat16) * deviation).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def decode_seconds(
    config: ModelConfig, batch: int, context: int, touched: float, weights: str
) -> float:
    """The least time of a step: what it reads, over the speed of the memory.

    Args:
        config: the model, in bfloat16.
        batch: texts.
        context: mean tokens of a text.
        touched: distinct experts that a layer's tokens use, mean over layers.
        weights: of the experts.
    """
    layers, attention = config.layers(), config.attention
    experts = config.moe.experts
    bank = config.d_model * experts.hidden * (experts.num_in + 1)
    read = len(layers) * touched * bank * WEIGHT_BYTES[weights]
    of_tokens = config.moe.router.top_k * bank * len(layers)
    read += 2.0 * (active_matrix_parameters(config) - of_tokens)
    cached = attention.num_kv_heads * (attention.head_dim + attention.value_dim)
    read += 2.0 * batch * context * cached * len(layers)
    return read / READ_BYTES


def prefill_seconds(config: ModelConfig, batch: int, length: int) -> float:
    """The least time of prompts of `length` tokens: active weights, causal attention, one head."""
    attention = config.attention
    head = config.d_model * config.vocab_size
    weights = 2.0 * (active_matrix_parameters(config) - head) * batch * length
    widths = attention.head_dim + attention.value_dim
    scores = batch * length**2 * attention.num_heads * widths * config.num_layers
    return (weights + scores + 2.0 * head * batch) / DOT_FLOPS


def random_prompts(config: ModelConfig, batch: int, length: int, seed: int = 1) -> list[np.ndarray]:
    """Token ids, uniformly at random."""
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, config.vocab_size, (batch, length)).astype(np.int32))
