"""gpt-oss (arXiv 2508.10925); transformers' `gpt_oss`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from moejax.config import ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.families.common import (
    decoder_rules,
    head_dim_of,
    read_sizes,
    window_of,
    write_sizes,
    write_windows,
)
from moejax.families.fields import Fields
from moejax.families.rope import read_rope
from moejax.families.table import Rule

__all__ = ["read_config", "rules", "write_config"]

_DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json; see `moejax.families.read_config`."""
    fields = Fields(hf)
    sizes = read_sizes(fields, _DEFAULTS)
    theta, yarn = read_rope(fields, 150_000.0, sizes.max_context, default=_ROPE)
    head_dim = head_dim_of(fields, sizes, 64)
    window = fields.whole_or_none("sliding_window", 128)
    kinds: list[Literal["full", "sliding"]] = [
        "sliding" if i % 2 == 0 else "full" for i in range(sizes.num_layers)
    ]
    windows = window_of(fields, window, kinds)
    bias = fields.flag("attention_bias", True)
    hidden = fields.whole("intermediate_size", 2880)
    experts = fields.whole("num_local_experts", 128, "num_experts")
    top_k = fields.whole("num_experts_per_tok", 4, "experts_per_token")
    # The activation's constants are part of its definition here.
    fields.only("swiglu_alpha", (1.702,), 1.702)
    fields.only("swiglu_limit", (7.0, 7), 7.0)
    fields.ignore("initial_context_length")  # of the training; the rotation says it again
    balance = fields.number("router_aux_loss_coef", 0.001)
    return fields.build(
        lambda: sizes.model(
            attention=sizes.attention(
                head_dim=head_dim,
                rope_theta=theta,
                yarn=yarn,
                bias=bias,
                output_bias=bias,
                sinks=True,
            ),
            moe=MoEConfig(
                RouterConfig(
                    num_experts=experts,
                    top_k=top_k,
                    score_function="topk_softmax",
                    load_balance_coef=balance,
                    bias=True,
                ),
                ExpertsConfig(hidden=hidden, activation="swiglu_oai", bias=True),
            ),
            window_by_layer=windows,
        )
    )


def write_config(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json of a model; see `moejax.families.write_config`."""
    router = config.moe.router
    hf = {
        **write_sizes(config, model_type, "GptOssForCausalLM"),
        "head_dim": config.attention.head_dim,
        **write_windows(config),
        "attention_bias": config.attention.bias,
        "intermediate_size": config.moe.experts.hidden,
        "num_local_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "router_aux_loss_coef": router.load_balance_coef,
        "swiglu_limit": 7.0,
    }
    # Here null is not "none": it stands for the published model's settings.
    return {**hf, "rope_scaling": hf["rope_scaling"] or {"rope_type": "default"}}


def rules(config: ModelConfig) -> list[Rule]:
    """The names of the tensors: all experts of a layer in one, gate and up side by side."""
    ours, theirs = "params/layers.{l}.moe.", "model.layers.{l}.mlp."
    inside = [
        ("router.w_DE", "router.weight", "E D -> D E"),
        ("router.b_E", "router.bias", "E -> E"),
        ("bank.w_in", "experts.gate_up_proj", "E D (H n) -> E D n H"),
        ("bank.b_in", "experts.gate_up_proj_bias", "E (H n) -> E n H"),
        ("bank.w_out", "experts.down_proj", "E H D -> E H D"),
        ("bank.b_out", "experts.down_proj_bias", "E D -> E D"),
    ]
    layers = range(config.first_dense_layers, config.num_layers)
    return decoder_rules(config) + [
        Rule(ours + a, theirs + b, axes, layers=layers) for a, b, axes in inside
    ]
