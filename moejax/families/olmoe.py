"""OLMoE (arXiv 2409.02060); transformers' `olmoe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax.config import ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.families.common import decoder_rules, experts_rules, read_sizes, write_sizes
from moejax.families.fields import Fields
from moejax.families.rope import read_rope
from moejax.families.table import Rule

__all__ = ["read_config", "rules", "write_config"]

_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json; see `moejax.families.read_config`."""
    fields = Fields(hf)
    sizes = read_sizes(fields, _DEFAULTS)
    theta, yarn = read_rope(fields, 1e4, sizes.max_context)
    # The norms over all heads have the model's width, so a head has its share of that.
    head_dim = max(sizes.d_model // sizes.num_heads, 1)
    fields.only("head_dim", (head_dim,), head_dim)
    if hf.get("clip_qkv") is not None:
        fields.problems.append(f"clip_qkv={hf['clip_qkv']!r} (only null)")
    fields.ignore("clip_qkv")
    bias = fields.flag("attention_bias")
    hidden = fields.whole("intermediate_size", 2048)
    experts = fields.whole("num_experts", 64, "num_local_experts")
    top_k = fields.whole("num_experts_per_tok", 8)
    renormalize = fields.flag("norm_topk_prob")
    balance = fields.number("router_aux_loss_coef", 0.01)
    return fields.build(
        lambda: sizes.model(
            attention=sizes.attention(
                head_dim=head_dim,
                rope_theta=theta,
                yarn=yarn,
                qk_norm="full",
                bias=bias,
                output_bias=bias,
            ),
            moe=MoEConfig(
                RouterConfig(
                    num_experts=experts,
                    top_k=top_k,
                    renormalize=renormalize,
                    load_balance_coef=balance,
                ),
                ExpertsConfig(hidden=hidden),
            ),
        )
    )


def write_config(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json of a model; see `moejax.families.write_config`."""
    router = config.moe.router
    return {
        **write_sizes(config, model_type, "OlmoeForCausalLM"),
        "attention_bias": config.attention.bias,
        "clip_qkv": None,
        "intermediate_size": config.moe.experts.hidden,
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.renormalize or router.score_function == "topk_softmax",
        "router_aux_loss_coef": router.load_balance_coef,
    }


def rules(config: ModelConfig) -> list[Rule]:
    """The names of the tensors."""
    return decoder_rules(config) + experts_rules(config)
