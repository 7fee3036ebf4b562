"""config.json: published ones are read, and whatever this program cannot compute is told."""

import dataclasses
import math

import pytest
from published_support import PUBLISHED, hf, refusal

from moejax.config import AttentionConfig, ExpertsConfig, LatentConfig, RouterConfig, YarnConfig
from moejax.families import MODEL_TYPES, bindings, read_config, write_config
from moejax.training.state import Blueprint, logical_targets
from sharding.mesh import MeshShape, abstract_mesh


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
