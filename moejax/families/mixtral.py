"""Mixtral (arXiv 2401.04088); transformers' `mixtral`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax.config import ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.families.common import (
    decoder_rules,
    experts_rules,
    head_dim_of,
    read_sizes,
    write_sizes,
)
from moejax.families.fields import Fields
from moejax.families.rope import read_rope
from moejax.families.table import Rule

__all__ = ["read_config", "rules", "write_config"]

_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json; see `moejax.families.read_config`."""
    fields = Fields(hf)
    sizes = read_sizes(fields, _DEFAULTS)
    theta, yarn = read_rope(fields, 1e6, sizes.max_context)
    head_dim = head_dim_of(fields, sizes)
    window = fields.whole_or_none("sliding_window")
    hidden = fields.whole("intermediate_size", 14336)
    experts = fields.whole("num_local_experts", 8, "num_experts")
    top_k = fields.whole("num_experts_per_tok", 2)
    balance = fields.number("router_aux_loss_coef", 0.001)
    return fields.build(
        lambda: sizes.model(
            attention=sizes.attention(
                head_dim=head_dim,
                rope_theta=theta,
                yarn=yarn,
                window=window,
            ),
            moe=MoEConfig(
                RouterConfig(
                    num_experts=experts,
                    top_k=top_k,
                    score_function="topk_softmax",
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
        **write_sizes(config, model_type, "MixtralForCausalLM"),
        "head_dim": config.attention.head_dim,
        # One for all layers; if they differ, whoever reads this back tells.
        "sliding_window": config.layers()[0].attention.window,
        "intermediate_size": config.moe.experts.hidden,
        "num_local_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "router_aux_loss_coef": router.load_balance_coef,
    }


def rules(config: ModelConfig) -> list[Rule]:
    """The names of the tensors."""
    return decoder_rules(config) + experts_rules(config, "block_sparse_moe", ("w1", "w3", "w2"))
