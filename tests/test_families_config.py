"""config.json: published ones are read, and whatever this program cannot compute is told."""

import dataclasses
import math

import pytest

from moejax.config import (
    AttentionConfig,
    ExchangeConfig,
    ExpertsConfig,
    LatentConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    YarnConfig,
)
from moejax.errors import UserError
from moejax.families import MODEL_TYPES, bindings, read_config, write_config
from moejax.training.state import Blueprint, logical_targets
from sharding.mesh import MeshShape, abstract_mesh

_COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
_DEEPSEEK = {
    **_COMMON,
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "v_head_dim": 128,
}
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
# As they are published, and the number of parameters (10⁹) that their makers name.
PUBLISHED = {
    "mixtral": (
        46.7,
        {
            **_COMMON,
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "vocab_size": 32000,
        },
    ),
    "qwen2_moe": (
        14.3,
        {
            **_COMMON,
            "model_type": "qwen2_moe",
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "qwen3_moe": (
        30.5,
        {
            **_COMMON,
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "olmoe": (
        6.92,
        {
            **_COMMON,
            "model_type": "olmoe",
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "vocab_size": 50304,
        },
    ),
    "deepseek_v2": (
        15.7,
        {
            **_DEEPSEEK,
            "model_type": "deepseek_v2",
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "topk_group": 1,
            "topk_method": "greedy",
            "vocab_size": 102400,
        },
    ),
    "deepseek_v3": (
        671.0,
        {
            **_DEEPSEEK,
            "model_type": "deepseek_v3",
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
            "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "vocab_size": 129280,
        },
    ),
    "gpt_oss": (
        20.9,
        {
            "model_type": "gpt_oss",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": 200002,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2880,
            "initial_context_length": 4096,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131072,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "quantization_config": {"quant_method": "mxfp4"},
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "vocab_size": 201088,
        },
    ),
}


def hf(name, **changes):
    return {**PUBLISHED[name][1], **changes}


def refusal(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name):
    billions, config = PUBLISHED[name]
    model = read_config(config)
    assert not model.scan_layers and model.remat == "none" and model.compute_dtype == "bfloat16"
    assert read_config(write_config(model, name)) == model
    # Two layers of each kind count for all.
    dense = min(model.first_dense_layers, 1)
    counts = {}
    for layers in dense + 1, dense + 2:
        small = dataclasses.replace(
            model, num_layers=layers, first_dense_layers=dense, window_by_layer=()
        )
        targets = logical_targets(Blueprint(small, abstract_mesh(MeshShape())), ("params", "bias"))
        bound = bindings(small, name)
        assert bound.keys() == targets.keys()
        counts[layers] = {
            layer: sum(
                math.prod(bound[n].shape(t.shape)) * len(bound[n].names(t.shape))
                for n, t in targets.items()
                if f"layers.{layer}." in n or (layer is None and "layers." not in n)
            )
            for layer in (None, *range(layers))
        }
    outside, first, last = counts[dense + 2][None], counts[dense + 2][0], counts[dense + 2][dense]
    total = outside + model.first_dense_layers * first
    total += (model.num_layers - model.first_dense_layers) * last
    assert total / 1e9 == pytest.approx(billions, rel=0.005)


def test_what_published_ones_mean():
    v3 = read_config(hf("deepseek_v3"))
    assert v3.moe.router == RouterConfig(
        num_experts=256,
        top_k=8,
        score_function="sigmoid",
        scaling_factor=2.5,
        selection_bias=True,
        num_groups=8,
        top_groups=4,
        group_score="top2_sum",
        load_balance_coef=0.001,
    )
    assert v3.attention == AttentionConfig(
        128,
        128,
        192,
        rope_interleaved=True,
        yarn=YarnConfig(40, 4096, mscale=1.0, mscale_all_dim=1.0),
        latent=LatentConfig(512, 64, 128, 1536),
    )
    assert (v3.dense_hidden, v3.first_dense_layers) == (18432, 3)
    assert v3.moe.experts == ExpertsConfig(hidden=2048, shared_hidden=2048)
    oss = read_config(hf("gpt_oss"))
    assert oss.window_by_layer == (128, 0) * 12
    assert oss.attention.yarn == YarnConfig(32, 4096, truncate=False)
    assert oss.moe.experts == ExpertsConfig(hidden=2880, activation="swiglu_oai", bias=True)
    qwen = read_config(hf("qwen2_moe"))
    assert qwen.attention == AttentionConfig(16, 16, 128, rope_theta=1e6, bias=True)
    assert not qwen.moe.router.renormalize and qwen.moe.experts.shared_gate
    assert read_config(hf("deepseek_v2")).moe.router.num_groups == 1


REFUSED = [
    ("mixtral", {"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
    ("mixtral", {"num_local_experts": 8, "num_experts": 9}, ["num_local_experts=8", "they must"]),
    ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_type='linear'"]),
    ("mixtral", {"rope_scaling": {"rope_type": "llama3"}}, ["rope_type='llama3'"]),
    ("mixtral", {"rope_scaling": {"rope_type": "dynamic"}}, ["rope_type='dynamic'"]),
    ("mixtral", {"rope_scaling": "yarn"}, ["rope_scaling='yarn'"]),
    ("mixtral", {"rope_scaling": {"type": "yarn", "factor": "4"}}, ["factor='4'"]),
    ("mixtral", {"rope_scaling": {"type": "yarn", "factor": 0.5}}, ["factor=0.5"]),
    ("mixtral", {"rope_parameters": {"rope_theta": -1}}, ["rope_theta=-1"]),
    ("mixtral", {"rope_parameters": {"full_attention": {}}}, ["full_attention={}"]),
    ("mixtral", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    ("mixtral", {"hidden_size": "4096"}, ["hidden_size='4096'"]),
    ("mixtral", {"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
    ("mixtral", {"num_experts_per_tok": 9}, ["top_k=9"]),
    ("mixtral", {"torch_dtype": "float8"}, ["dtype='float8'"]),
    ("mixtral", {"residual_multiplier": 0.2}, ["residual_multiplier=0.2 (unknown)"]),
    ("mixtral", {"is_encoder_decoder": True}, ["is_encoder_decoder=True"]),
    ("mixtral", {"rms_norm_eps": True, "x": 1}, ["rms_norm_eps=True", "x=1"]),
    ("qwen2_moe", {"mlp_only_layers": [1]}, ["mlp_only_layers=[1]", "layers [1] are dense"]),
    ("qwen2_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step=2"]),
    ("qwen2_moe", {"layer_types": ["full_attention"]}, ["layer_types of 1 layers (of 24)"]),
    ("qwen2_moe", {"layer_types": ["linear"] * 24}, ["layer_types=['linear'"]),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 24}, ["sliding_window=None"]),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size=0"]),
    ("qwen3_moe", {"norm_topk_prob": 1}, ["norm_topk_prob=1"]),
    ("olmoe", {"clip_qkv": 8.0}, ["clip_qkv=8.0"]),
    ("olmoe", {"head_dim": 64}, ["head_dim=64"]),
    ("deepseek_v2", {"norm_topk_prob": True}, ["norm_topk_prob=True"]),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, ["topk_method='noaux_tc'"]),
    ("deepseek_v2", {"moe_layer_freq": 2}, ["moe_layer_freq=2"]),
    ("deepseek_v2", {"num_experts_per_tok": None}, ["num_experts_per_tok is missing"]),
    ("deepseek_v2", {"rms_norm_eps": 1e-5}, ["rms_norm_eps=1e-05"]),
    ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func='softmax'"]),
    ("deepseek_v3", {"attention_bias": True}, ["attention_bias=True"]),
    ("deepseek_v3", {"num_key_value_heads": 8}, ["num_key_value_heads=8"]),
    ("deepseek_v3", {"topk_group": 9}, ["top_groups=9"]),
    ("gpt_oss", {"swiglu_limit": 5.0, "swiglu_alpha": 1.0}, ["swiglu_limit=5.0", "swiglu_alpha=1"]),
    ("gpt_oss", {"experts_per_token": 2}, ["experts_per_token=2"]),
]


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_refused(name, changes, words):
    message = refusal(read_config, hf(name, **changes))
    assert all(word in message for word in words), message
    assert len(message) < 500


def test_all_problems_are_told_at_once():
    changes = {"hidden_act": "relu", "logit_scale": 2.0, "rms_norm_eps": "x"}
    message = refusal(read_config, hf("mixtral", **changes))
    assert all(word in message for word in changes)


@pytest.mark.parametrize("name", [None, "llama", ["mixtral"]])
def test_unknown_families(name):
    message = refusal(read_config, {"model_type": name})
    assert repr(name) in message and all(known in message for known in MODEL_TYPES)


def test_float16_and_missing_dtypes():
    for dtype, expected in ("float16", "bfloat16"), ("float32", "float32"), (None, "bfloat16"):
        assert read_config(hf("olmoe", torch_dtype=dtype)).compute_dtype == expected
        assert read_config(hf("olmoe", torch_dtype=None, dtype=dtype)).compute_dtype == expected


def test_nulls_that_mean_something():
    v3 = read_config(hf("deepseek_v3", n_group=None, topk_group=None, n_shared_experts=None))
    assert (v3.moe.router.num_groups, v3.moe.experts.shared_hidden) == (1, 0)
    assert read_config(hf("gpt_oss", rope_scaling=None)) == read_config(hf("gpt_oss"))
    plain = read_config(hf("gpt_oss", rope_scaling={"rope_type": "default"}))
    assert plain.attention.yarn is None
    assert read_config(write_config(plain, "gpt_oss")) == plain


def test_qwen_windows():
    windows = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}
    second = read_config(hf("qwen2_moe", num_hidden_layers=5, **windows))
    assert second.window_by_layer == (7, 0, 7, 0, 0)
    third = read_config(hf("qwen3_moe", num_hidden_layers=3, **windows))
    assert third.window_by_layer == (7, 7, 7)
    for model, name in (second, "qwen2_moe"), (third, "qwen3_moe"):
        assert read_config(write_config(model, name)) == model


# --- writing ----------------------------------------------------------------------------------

SMALL = ModelConfig(
    vocab_size=99,
    d_model=64,
    num_layers=2,
    attention=AttentionConfig(4, 2, 16),
    moe=MoEConfig(RouterConfig(num_experts=8, top_k=2), ExpertsConfig(hidden=32)),
)


def changed(router=None, experts=None, attention=None, exchange=None, **fields):
    moe = SMALL.moe
    moe = MoEConfig(
        dataclasses.replace(moe.router, **(router or {})),
        dataclasses.replace(moe.experts, **(experts or {})),
        ExchangeConfig(**(exchange or {})),
    )
    attention = dataclasses.replace(SMALL.attention, **(attention or {}))
    return dataclasses.replace(SMALL, moe=moe, attention=attention, **fields)


def test_one_model_in_two_spellings():
    # Renormalised probabilities are a softmax over the chosen, and a window of all is one of each.
    assert write_config(SMALL, "mixtral")["num_local_experts"] == 8
    other = changed(router={"score_function": "topk_softmax"}, window_by_layer=(3, 3))
    assert write_config(other, "mixtral")["sliding_window"] == 3
    third = changed(attention={"qk_norm": "head"}, router={"score_function": "topk_softmax"})
    assert write_config(third, "qwen3_moe")["norm_topk_prob"]


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("mixtral", changed(router={"renormalize": False}), ["moe.router.renormalize=False"]),
        ("mixtral", changed(router={"selection_bias": True}), ["moe.router.selection_bias=True"]),
        ("mixtral", changed(experts={"activation": "geglu"}), ["moe.experts.activation='geglu'"]),
        ("mixtral", changed(attention={"sinks": True}), ["attention.sinks=True"]),
        ("mixtral", changed(top_k_by_layer=(1, 2)), ["top_k_by_layer=(1, 2)"]),
        ("mixtral", changed(window_by_layer=(0, 3)), ["window_by_layer=(0, 3)"]),
        ("mixtral", changed(dense_hidden=9, first_dense_layers=1), ["first_dense_layers=1"]),
        ("mixtral", changed(exchange={"capacity_factor": 1.0}), ["capacity_factor=1.0"]),
        ("mixtral", changed(router={"forced_balance": True}), ["forced_balance=True"]),
        ("qwen3_moe", SMALL, ["attention.qk_norm='none' (there 'head')"]),
        ("qwen2_moe", SMALL, ["shared_expert_intermediate_size=0"]),
        ("olmoe", changed(attention={"head_dim": 8}), ["attention.head_dim=8"]),
        (
            "deepseek_v3",
            changed(norm_eps=1e-6, attention={"num_kv_heads": 4, "head_dim": 80}),
            ["attention.latent.rank=None (there 512)", "score_function"],
        ),
        ("deepseek_v2", SMALL, ["rms_norm_eps=1e-05"]),
        ("gpt_oss", SMALL, ["moe.experts.activation='swiglu'", "attention.sinks=False"]),
        ("llama", SMALL, ["model_type='llama'"]),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_models_that_a_family_cannot_say(name, config, words):
    message = refusal(write_config, config, name)
    assert all(word in message for word in words), message


def test_how_a_model_runs_does_not_matter():
    config = changed(
        exchange={"mode": "all_to_all", "chunks": 2}, router={"z_loss_coef": 0.1}, remat="dots"
    )
    assert write_config(config, "mixtral")["hidden_size"] == 64
