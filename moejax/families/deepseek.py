"""DeepSeek-V2 (arXiv 2405.04434) and -V3 (arXiv 2412.19437); `deepseek_v2` and `deepseek_v3`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax.config import (
    ExpertsConfig,
    LatentConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from moejax.families.common import (
    decoder_rules,
    experts_rules,
    read_sizes,
    shared_rules,
    write_sizes,
)
from moejax.families.fields import Fields
from moejax.families.rope import read_rope
from moejax.families.table import Rule

__all__ = ["read_config", "rules", "write_config"]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
    },
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json; see `moejax.families.read_config`."""
    fields, third = Fields(hf), hf["model_type"] == "deepseek_v3"
    defaults = _DEFAULTS[hf["model_type"]]
    sizes = read_sizes(fields, defaults)
    # The norms of the latent vectors have this constant, whatever the config says.
    fields.only("rms_norm_eps", (1e-6,), 1e-6)
    for name in "attention_bias", "mlp_bias":
        fields.only(name, (False,), False)
    fields.only("moe_layer_freq", (1,), 1)
    theta, yarn = read_rope(fields, 1e4, sizes.max_context, scales_logits=True)
    interleaved = fields.flag("rope_interleave", True) if third else True
    if sizes.num_kv_heads != sizes.num_heads:
        said = f"num_key_value_heads={sizes.num_kv_heads}"
        fields.problems.append(f"{said} (only num_attention_heads={sizes.num_heads})")
    nope = fields.whole("qk_nope_head_dim", 128)
    latent: dict[str, Any] = {
        "rank": fields.whole("kv_lora_rank", 512),
        "rope_dim": fields.whole("qk_rope_head_dim", 64),
        "value_dim": fields.whole("v_head_dim", 128),
        "query_rank": fields.whole_or_none("q_lora_rank", 1536),
    }
    dense = fields.whole("first_k_dense_replace", defaults["first_k_dense_replace"], least=0)
    dense_hidden = fields.whole("intermediate_size", defaults["intermediate_size"])
    hidden = fields.whole("moe_intermediate_size", defaults["moe_intermediate_size"])
    shared = fields.whole("n_shared_experts", defaults["n_shared_experts"], least=0)
    if "n_shared_experts" in hf and hf["n_shared_experts"] is None:
        shared = 0
    router = _read_router(fields, third)
    # Derived fields, which transformers writes down; and modules that predict further tokens.
    fields.ignore("qk_head_dim", "head_dim", "num_nextn_predict_layers", "num_mtp_layers")
    return fields.build(
        lambda: sizes.model(
            attention=sizes.attention(
                head_dim=nope + latent["rope_dim"],
                rope_theta=theta,
                rope_interleaved=interleaved,
                yarn=yarn,
                latent=LatentConfig(**latent),
            ),
            moe=MoEConfig(
                RouterConfig(**router),
                ExpertsConfig(hidden=hidden, shared_hidden=shared * hidden),
            ),
            dense_hidden=dense_hidden if dense else 0,
            first_dense_layers=min(dense, sizes.num_layers),
        )
    )


def _read_router(fields: Fields, third: bool) -> dict[str, Any]:
    """The arguments of `RouterConfig`."""
    defaults = _DEFAULTS["deepseek_v3" if third else "deepseek_v2"]
    top_k = fields.whole("num_experts_per_tok", 8 if third else 0, least=1)
    if not top_k:
        fields.problems.append("num_experts_per_tok is missing")
    router: dict[str, Any] = {
        "num_experts": fields.whole(
            "n_routed_experts", defaults["n_routed_experts"], "num_local_experts", "num_experts"
        ),
        "top_k": top_k,
        "scaling_factor": fields.number("routed_scaling_factor", defaults["routed_scaling_factor"]),
        "load_balance_coef": fields.number("aux_loss_alpha", 0.0),
    }
    groups = fields.whole_or_none("n_group", 8 if third else None) or 1
    best = fields.whole_or_none("topk_group", 4 if third else None) or groups
    if third:
        fields.only("scoring_func", ("sigmoid",), "sigmoid")
        fields.only("topk_method", ("noaux_tc",), "noaux_tc")
        router |= {
            "score_function": "sigmoid",
            "renormalize": fields.flag("norm_topk_prob", True),
            "selection_bias": True,
            "group_score": "top2_sum",
        }
    else:
        # Of a renormalised choice transformers and DeepSeek's own program make different things.
        fields.only("norm_topk_prob", (False,), False)
        fields.only("scoring_func", ("softmax",), "softmax")
        if fields.only("topk_method", ("greedy", "group_limited_greedy"), "greedy") == "greedy":
            groups = best = 1
        router |= {"score_function": "softmax", "renormalize": False}
    return {**router, "num_groups": groups, "top_groups": best}


def write_config(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json of a model; see `moejax.families.write_config`."""
    third = model_type == "deepseek_v3"
    attention, router, experts = config.attention, config.moe.router, config.moe.experts
    # A model without latent attention is refused by whoever reads this back.
    latent = attention.latent or LatentConfig()
    hf = {
        **write_sizes(config, model_type, f"Deepseek{'V3' if third else 'V2'}ForCausalLM"),
        "attention_bias": False,
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.query_rank,
        "qk_nope_head_dim": max(attention.head_dim - latent.rope_dim, 1),
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "intermediate_size": config.dense_hidden or experts.hidden,
        "first_k_dense_replace": config.first_dense_layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": experts.hidden,
        "n_routed_experts": router.num_experts,
        # Their models have at least one; one too many is found when this is read back.
        "n_shared_experts": max(experts.shared_hidden // experts.hidden, 1),
        "num_experts_per_tok": router.top_k,
        "routed_scaling_factor": router.scaling_factor,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "aux_loss_alpha": router.load_balance_coef,
        "norm_topk_prob": router.renormalize and third,
    }
    if third:
        return {
            **hf,
            "rope_interleave": attention.rope_interleaved,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
        }
    grouped = router.top_groups < router.num_groups
    method = "group_limited_greedy" if grouped else "greedy"
    return {**hf, "scoring_func": "softmax", "topk_method": method}


def rules(config: ModelConfig) -> list[Rule]:
    """The names of the tensors."""
    table = decoder_rules(config) + experts_rules(config)
    layers = range(config.first_dense_layers, config.num_layers)
    if config.moe.router.selection_bias:
        bias = Rule(
            "bias/layers.{l}.moe.router.selection_bias_E",
            "model.layers.{l}.mlp.gate.e_score_correction_bias",
            "E -> E",
            layers=layers,
        )
        table.append(bias)
    if config.moe.experts.shared_hidden:
        table += shared_rules(config, "shared_experts")
    return table
