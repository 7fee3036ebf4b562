"""Qwen2-MoE (arXiv 2407.10671) and Qwen3-MoE (arXiv 2505.09388); `qwen2_moe` and `qwen3_moe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax.config import ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.families.common import (
    decoder_rules,
    dense_prefix,
    experts_rules,
    head_dim_of,
    read_sizes,
    shared_rules,
    window_of,
    write_sizes,
    write_windows,
)
from moejax.families.fields import Fields
from moejax.families.rope import read_rope
from moejax.families.table import Rule

__all__ = ["read_config", "rules", "write_config"]

_BOTH = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
_DEFAULTS = {
    "qwen2_moe": {**_BOTH, "num_attention_heads": 16, "num_key_value_heads": 16},
    "qwen3_moe": {**_BOTH, "num_attention_heads": 32, "num_key_value_heads": 4},
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json; see `moejax.families.read_config`."""
    fields, third = Fields(hf), hf["model_type"] == "qwen3_moe"
    sizes = read_sizes(fields, _DEFAULTS[hf["model_type"]])
    theta, yarn = read_rope(fields, 1e4, sizes.max_context)
    head_dim = head_dim_of(fields, sizes)
    windows = _read_windows(fields, sizes.num_layers, third)
    dense_hidden = fields.whole("intermediate_size", 6144 if third else 5632)
    dense = _read_dense(fields, sizes.num_layers)
    experts = fields.whole("num_experts", 128 if third else 60, "num_local_experts")
    top_k = fields.whole("num_experts_per_tok", 8 if third else 4)
    renormalize = fields.flag("norm_topk_prob")
    hidden = fields.whole("moe_intermediate_size", 768 if third else 1408)
    balance = fields.number("router_aux_loss_coef", 0.001)
    shared = 0
    if third:
        bias = fields.flag("attention_bias")
    else:
        bias = fields.flag("qkv_bias", True)
        shared = fields.whole("shared_expert_intermediate_size", 5632)
    return fields.build(
        lambda: sizes.model(
            attention=sizes.attention(
                head_dim=head_dim,
                rope_theta=theta,
                yarn=yarn,
                qk_norm="head" if third else "none",
                bias=bias,
                output_bias=bias and third,
            ),
            moe=MoEConfig(
                RouterConfig(
                    num_experts=experts,
                    top_k=top_k,
                    renormalize=renormalize,
                    load_balance_coef=balance,
                ),
                ExpertsConfig(hidden=hidden, shared_hidden=shared, shared_gate=shared > 0),
            ),
            dense_hidden=dense_hidden if dense else 0,
            first_dense_layers=dense,
            window_by_layer=windows,
        )
    )


def write_config(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json of a model; see `moejax.families.write_config`."""
    third = model_type == "qwen3_moe"
    attention, router, experts = config.attention, config.moe.router, config.moe.experts
    windows = write_windows(config)
    name = "Qwen3MoeForCausalLM" if third else "Qwen2MoeForCausalLM"
    hf = {
        **write_sizes(config, model_type, name),
        "head_dim": attention.head_dim,
        "use_sliding_window": windows["sliding_window"] is not None,
        "sliding_window": windows["sliding_window"],
        "intermediate_size": config.dense_hidden or experts.hidden,
        "mlp_only_layers": list(range(config.first_dense_layers)),
        "decoder_sparse_step": 1,
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.renormalize or router.score_function == "topk_softmax",
        "moe_intermediate_size": experts.hidden,
        "router_aux_loss_coef": router.load_balance_coef,
    }
    if third:
        return {**hf, "attention_bias": attention.bias}
    return {
        **hf,
        **windows,
        "qkv_bias": attention.bias,
        "shared_expert_intermediate_size": experts.shared_hidden,
    }


def rules(config: ModelConfig) -> list[Rule]:
    """The names of the tensors."""
    table = decoder_rules(config) + experts_rules(config)
    if not config.moe.experts.shared_hidden:
        return table
    layers = range(config.first_dense_layers, config.num_layers)
    gate = Rule(
        "params/layers.{l}.moe.shared_gate",
        "model.layers.{l}.mlp.shared_expert_gate.weight",
        "1 D -> D",
        layers=layers,
    )
    return [*table, *shared_rules(config, "shared_expert"), gate]


def _read_windows(fields: Fields, layers: int, third: bool) -> tuple[int, ...]:
    used = fields.flag("use_sliding_window")
    # Without `use_sliding_window` the window stays in the file and means nothing.
    window = fields.whole("sliding_window", 4096) if used else None
    fields.ignore("sliding_window")
    if third:
        fields.ignore("max_window_layers")
        return (window,) * layers if window else ()
    last = fields.whole("max_window_layers", 28, least=0)
    return window_of(
        fields,
        window,
        ["sliding" if used and i % 2 == 0 and i < last else "full" for i in range(layers)],
    )


def _read_dense(fields: Fields, layers: int) -> int:
    only = fields.wholes("mlp_only_layers") or ()
    step = fields.whole("decoder_sparse_step", 1)
    dense = [i for i in range(layers) if i in only or (i + 1) % step]
    why = f"mlp_only_layers={list(only)!r}, decoder_sparse_step={step}"
    return dense_prefix(fields, dense, layers, why)
