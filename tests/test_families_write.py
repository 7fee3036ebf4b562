"""config.json of a model: what a family can say is written, all else is told."""

import dataclasses

import pytest
from published_support import refusal

from moejax.config import (
    AttentionConfig,
    ExchangeConfig,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from moejax.families import write_config

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
