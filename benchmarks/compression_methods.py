"""The methods that benchmarks/compression_quality.py compares: the run, and what each sends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from simulated_ranks import SimulatedRanks

from moejax.config import AttentionConfig, ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.training.config import DataConfig, OptimizerConfig, TrainConfig
from sharding.compression.config import GradCompression
from sharding.compression.interface import bytes_sent
from sharding.compression.leaves import Leaf
from sharding.compression.reduction import Reducer
from sharding.mesh import DATA
from sharding.traffic import Kind, sent_bytes

__all__ = ["METHODS", "RATE", "TINY", "Sizes", "bytes_ratios", "run_config"]

WARMUP = 100  # steps of the learning rate's, top-k's and low rank's
RATE = 1e-3  # the `reference` preset's, by the root of the batch: 4096 tokens, not 65,536
METHODS: dict[str, GradCompression] = {
    "exact": GradCompression(),
    "exact_again": GradCompression(),
    "bf16": GradCompression("bf16"),
    "int8": GradCompression("int8"),
    "int8_feedback": GradCompression("int8", rounding="error_feedback"),
    "int4": GradCompression("int4"),
    "int4_feedback": GradCompression("int4", rounding="error_feedback"),
    "int4_rotated": GradCompression("int4", rotate=True),
    "int4_rotated_feedback": GradCompression("int4", rounding="error_feedback", rotate=True),
    "low_rank": GradCompression("low_rank", rank=4, warmup_steps=WARMUP),
    "low_rank_at_once": GradCompression("low_rank", rank=4),
    "top_k": GradCompression("top_k", density=0.01, warmup_steps=WARMUP),
    "top_k_at_once": GradCompression("top_k", density=0.01),
}
"""By the name of the row."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained: ranks, examples of a rank and step, tokens of an example; the model."""

    ranks: int = 8
    examples: int = 2
    length: int = 256
    d_model: int = 256
    layers: int = 4
    hidden: int = 128
    held_out: int | None = None  # windows; None: all
    on_the_way: int = 512  # windows of a point of the curve, and at once


TINY = Sizes(length=32, d_model=64, layers=2, hidden=32, held_out=256, on_the_way=128)


def run_config(sizes: Sizes, steps: int, rate: float) -> TrainConfig:
    """A run with exact gradients: bytes as tokens, 8 experts, 2 for a token, bfloat16."""
    model = ModelConfig(
        vocab_size=257,
        d_model=sizes.d_model,
        num_layers=sizes.layers,
        max_context=sizes.length,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=sizes.d_model // 4),
        moe=MoEConfig(RouterConfig(num_experts=8, top_k=2), ExpertsConfig(hidden=sizes.hidden)),
        scan_layers=True,
    )
    return TrainConfig(
        model=model,
        data=DataConfig(seq_len=sizes.length, batch_size=sizes.ranks * sizes.examples),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=WARMUP, final_ratio=0.0),
        steps=steps,
    )


def sent(reducer: Reducer, leaf: Leaf, ranks: int) -> float:
    """Bytes that a rank sends a step for one gradient."""
    crossings = reducer.crossings(leaf)
    if crossings is not None:
        return bytes_sent(crossings, {DATA: ranks})  # type: ignore[arg-type]
    kind: Kind = "all-reduce" if leaf.storage.dim is None else "reduce-scatter"
    return sent_bytes(kind, ranks, 4 * math.prod(leaf.shape))


def bytes_ratios(config: TrainConfig, ranks: int) -> dict[str, Any]:
    """How many times fewer bytes than the same sums in bfloat16; after any warm-up."""

    def of(method: GradCompression) -> dict[str, float]:
        reducer = SimulatedRanks(replace(config, grad_compression=method), ranks).reducer
        return {leaf.name: sent(reducer, leaf, ranks) for leaf in reducer.leaves}

    leaves = SimulatedRanks(config, ranks).reducer.leaves
    numbers = {leaf.name: math.prod(leaf.whole) for leaf in leaves}
    compressed = {leaf.name for leaf in leaves if not leaf.exact}
    ours = of(replace(config.grad_compression, warmup_steps=0))
    theirs = of(GradCompression("bf16"))

    def total(of_leaves: Mapping[str, float], names: Iterable[str]) -> float:
        return sum(of_leaves[name] for name in names)

    return {
        "bytes_ratio": round(total(theirs, compressed) / total(ours, compressed), 3),
        "bytes_ratio_all": round(total(theirs, numbers) / total(ours, numbers), 3),
        "bytes_a_step": round(total(ours, numbers)),
        "compressed_part": round(total(numbers, compressed) / sum(numbers.values()), 4),
    }
