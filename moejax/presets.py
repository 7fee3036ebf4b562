"""Runs to start from: functions that return a `TrainConfig`."""

from __future__ import annotations

from collections.abc import Callable

from moejax.config import (
    AttentionConfig,
    ExpertsConfig,
    LatentConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    YarnConfig,
)
from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig

__all__ = [
    "PRESETS",
    "deepseek_v2_lite",
    "deepseek_v3",
    "gpt_oss_20b",
    "mixtral_8x7b",
    "olmoe_1b_7b",
    "qwen3_30b_a3b",
    "reference",
    "small",
    "tiny",
]


def tiny() -> TrainConfig:
    """The default: minutes on a laptop's CPU, 8 fake devices, bytes as tokens, float32."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=257,
            d_model=128,
            num_layers=4,
            max_context=256,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
            moe=MoEConfig(RouterConfig(num_experts=8, top_k=2), ExpertsConfig(hidden=128)),
            compute_dtype="float32",
        ),
        data=DataConfig(batch_size=8),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        steps=480,
        eval_every=100,
        save_every=240,
    )


def small() -> TrainConfig:
    """One GPU of 40 GB or more: 1.3 B parameters, 64 experts, 8 for a token, width 1024."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=16_384,
            d_model=1024,
            num_layers=12,
            max_context=2048,
            attention=AttentionConfig(num_heads=16, num_kv_heads=4, head_dim=64, qk_norm="head"),
            moe=MoEConfig(
                RouterConfig(num_experts=64, top_k=8, z_loss_coef=1e-3), ExpertsConfig(hidden=512)
            ),
        ),
        data=DataConfig(vocab=16_384, seq_len=1024, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=100),
        mesh="data=1",
        steps=2000,
        loss_chunk=8192,
        eval_every=500,
        save_every=500,
    )


def reference() -> TrainConfig:
    """The model that comes with the package: 15 M parameters, 64 experts, 8 for a token."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=4096,
            d_model=256,
            num_layers=6,
            max_context=1024,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, qk_norm="head"),
            moe=MoEConfig(
                RouterConfig(num_experts=64, top_k=8, z_loss_coef=1e-3), ExpertsConfig(hidden=44)
            ),
            tie_embeddings=True,
        ),
        data=DataConfig(vocab=4096, seq_len=1024, batch_size=64),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, warmup_steps=200, schedule="wsd", final_ratio=0.0
        ),
        mesh="data=1",
        steps=11_000,
        loss_chunk=16_384,
        eval_every=1000,
        save_every=4000,
    )


def _published(model: ModelConfig, *, seq_len: int, batch_size: int, mesh: str) -> TrainConfig:
    """What the published shapes share: long runs in bfloat16, layers scanned and recomputed."""
    return TrainConfig(
        model=model,
        data=DataConfig(seq_len=seq_len, batch_size=batch_size),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        mesh=mesh,
        steps=100_000,
        loss_chunk=4096,
        eval_every=1000,
        save_every=1000,
    )


def mixtral_8x7b() -> TrainConfig:
    """Mixtral 8x7B: 46.7 B parameters, 12.9 B active (arXiv 2401.04088, table 1)."""
    model = ModelConfig(
        vocab_size=32_000,
        d_model=4096,
        num_layers=32,
        max_context=32_768,
        attention=AttentionConfig(
            num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1_000_000.0
        ),
        moe=MoEConfig(
            RouterConfig(
                num_experts=8, top_k=2, score_function="topk_softmax", load_balance_coef=0.02
            ),
            ExpertsConfig(hidden=14_336),
        ),
        scan_layers=True,
        remat="layer",
    )
    return _published(model, seq_len=4096, batch_size=64, mesh="data=8,expert=8")


def qwen3_30b_a3b() -> TrainConfig:
    """Qwen3-30B-A3B: 30.5 B parameters, 3.3 B active (arXiv 2505.09388, table 2)."""
    model = ModelConfig(
        vocab_size=151_936,
        d_model=2048,
        num_layers=48,
        max_context=40_960,
        attention=AttentionConfig(
            num_heads=32, num_kv_heads=4, head_dim=128, rope_theta=1_000_000.0, qk_norm="head"
        ),
        moe=MoEConfig(
            RouterConfig(num_experts=128, top_k=8, load_balance_coef=0.001),
            ExpertsConfig(hidden=768),
        ),
        norm_eps=1e-6,
        scan_layers=True,
        remat="layer",
    )
    return _published(model, seq_len=4096, batch_size=64, mesh="data=8,expert=8")


def olmoe_1b_7b() -> TrainConfig:
    """OLMoE-1B-7B: 6.9 B parameters, 1.3 B active (arXiv 2409.02060, table 1)."""
    model = ModelConfig(
        vocab_size=50_304,
        d_model=2048,
        num_layers=16,
        max_context=4096,
        attention=AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="full"),
        moe=MoEConfig(
            RouterConfig(
                num_experts=64,
                top_k=8,
                renormalize=False,
                load_balance_coef=0.01,
                z_loss_coef=0.001,
            ),
            ExpertsConfig(hidden=1024),
        ),
        scan_layers=True,
        remat="layer",
    )
    return _published(model, seq_len=4096, batch_size=64, mesh="expert=8")


def deepseek_v2_lite() -> TrainConfig:
    """DeepSeek-V2-Lite: 15.7 B parameters, 2.4 B active (arXiv 2405.04434, appendix B).

    The active ones leave out the embedding. Positions are stretched as in the published
    config.json, to 163 840 tokens.
    """
    model = ModelConfig(
        vocab_size=102_400,
        d_model=2048,
        num_layers=27,
        max_context=163_840,
        attention=AttentionConfig(
            num_heads=16,
            num_kv_heads=16,
            head_dim=128 + 64,
            rope_interleaved=True,
            yarn=YarnConfig(40, original_context=4096, mscale=0.707, mscale_all_dim=0.707),
            latent=LatentConfig(rank=512, rope_dim=64, value_dim=128),
        ),
        moe=MoEConfig(
            RouterConfig(num_experts=64, top_k=6, renormalize=False, load_balance_coef=0.001),
            ExpertsConfig(hidden=1408, shared_hidden=2816),
        ),
        dense_hidden=10_944,
        first_dense_layers=1,
        norm_eps=1e-6,
        scan_layers=True,
        remat="layer",
    )
    return _published(model, seq_len=4096, batch_size=64, mesh="data=2,expert=8")


def deepseek_v3() -> TrainConfig:
    """DeepSeek-V3: 671 B parameters, 37 B active (arXiv 2412.19437, §4.2).

    Without its module that predicts a further token. Loads are balanced by the selection bias, at
    the paper's rate; the small loss beside it is counted over all tokens here, not in each
    sequence.
    """
    model = ModelConfig(
        vocab_size=129_280,
        d_model=7168,
        num_layers=61,
        max_context=163_840,
        attention=AttentionConfig(
            num_heads=128,
            num_kv_heads=128,
            head_dim=128 + 64,
            rope_interleaved=True,
            yarn=YarnConfig(40, original_context=4096, mscale=1.0, mscale_all_dim=1.0),
            latent=LatentConfig(rank=512, rope_dim=64, value_dim=128, query_rank=1536),
        ),
        moe=MoEConfig(
            RouterConfig(
                num_experts=256,
                top_k=8,
                score_function="sigmoid",
                scaling_factor=2.5,
                selection_bias=True,
                bias_update_rate=0.001,
                num_groups=8,
                top_groups=4,
                group_score="top2_sum",
                load_balance_coef=1e-4,
            ),
            ExpertsConfig(hidden=2048, shared_hidden=2048),
        ),
        dense_hidden=18_432,
        first_dense_layers=3,
        norm_eps=1e-6,
        scan_layers=True,
        remat="layer",
    )
    return _published(model, seq_len=4096, batch_size=512, mesh="data=4,expert=64,tensor=8")


def gpt_oss_20b() -> TrainConfig:
    """gpt-oss-20b: 20.9 B parameters, 3.6 B active (arXiv 2508.10925, table 1).

    The active ones leave out the embedding. Layers with and without a window alternate, so that
    none can be scanned with its neighbour.
    """
    model = ModelConfig(
        vocab_size=201_088,
        d_model=2880,
        num_layers=24,
        max_context=131_072,
        attention=AttentionConfig(
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            rope_theta=150_000.0,
            yarn=YarnConfig(32, original_context=4096, truncate=False),
            bias=True,
            output_bias=True,
            sinks=True,
        ),
        moe=MoEConfig(
            RouterConfig(num_experts=32, top_k=4, score_function="topk_softmax", bias=True),
            ExpertsConfig(hidden=2880, activation="swiglu_oai", bias=True),
        ),
        window_by_layer=(128, 0) * 12,
        remat="layer",
    )
    return _published(model, seq_len=4096, batch_size=64, mesh="data=2,expert=8")


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    make.__name__: make
    for make in (
        *(tiny, small, reference, mixtral_8x7b, qwen3_30b_a3b, olmoe_1b_7b),
        *(deepseek_v2_lite, deepseek_v3, gpt_oss_20b),
    )
}
"""By name, `tiny` first."""
