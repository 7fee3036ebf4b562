"""Runs to start from: functions that return a `TrainConfig`."""

from __future__ import annotations

from collections.abc import Callable

from moejax.config import AttentionConfig, ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig

__all__ = [
    "PRESETS",
    "deepseek_v2_lite",
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
    """One GPU: 1.3 B parameters, 64 experts, 8 for a token, width 1024."""
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
            scan_layers=True,
            remat="layer",
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
    """DeepSeek-V2-Lite: experts as published (arXiv 2405.04434, appendix B), attention not.

    The published model has 15.7 B parameters, 2.4 B active, with latent attention, which is not
    built here: 16 heads whose queries and keys are 192 wide (128, and 64 that are rotated) and
    whose values are 128 wide, keys and values expanded from 512 shared numbers. In its place are
    16 query heads and 8 key-value heads of width 128, all rotated: 15 674 619 904 parameters, 32 M
    fewer; 2 629 285 888 active, or 2.42 B without the embedding.
    """
    model = ModelConfig(
        vocab_size=102_400,
        d_model=2048,
        num_layers=27,
        max_context=163_840,
        attention=AttentionConfig(num_heads=16, num_kv_heads=8, head_dim=128),
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


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    make.__name__: make
    for make in (tiny, small, reference, mixtral_8x7b, qwen3_30b_a3b, olmoe_1b_7b, deepseek_v2_lite)
}
"""By name, `tiny` first."""
