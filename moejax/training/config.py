"""Configuration of a training run; `train.py --help` shows it as flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moejax.config import ModelConfig
from moejax.errors import UserError

__all__ = ["DataConfig", "OptimizerConfig", "TrainConfig"]


@dataclass(frozen=True)
class DataConfig:
    """Text and tokens.

    paths: files, folders, globs, `.jsonl`; none: the standard library's own source.
    vocab: train a BPE of this size; 0: bytes.
    tokenizer: a tokenizer.json to use instead.
    seq_len: tokens of an example.
    batch_size: examples of a step, over all devices and accumulation steps.
    held_out: fraction of documents kept for evaluation, chosen by hash of the path.
    held_out_paths: text to evaluate on instead; then everything under `paths` is trained on.
    """

    paths: tuple[str, ...] = ()
    vocab: int = 0
    tokenizer: str = ""
    seq_len: int = 256
    batch_size: int = 16
    held_out: float = 0.05
    held_out_paths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.batch_size < 1:
            raise UserError(
                f"seq_len={self.seq_len}, batch_size={self.batch_size}: both must be at least 1"
            )
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out={self.held_out}: must lie between 0 and 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) with warm-up and decay.

    learning_rate: peak.
    final_ratio: last learning rate over the peak.
    schedule: `cosine`, or `wsd`: constant, then linear decay over the last `decay_fraction`.
    clip_norm: largest global gradient norm; 0: no clipping.
    """

    learning_rate: float = 3e-3
    final_ratio: float = 0.1
    warmup_steps: int = 20
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate={self.learning_rate}: must be greater than 0")
        if not 0 <= self.decay_fraction <= 1:
            raise UserError(f"decay_fraction={self.decay_fraction}: must lie between 0 and 1")


@dataclass(frozen=True)
class TrainConfig:
    """A run.

    mesh: `data=2,expert=4,tensor=1`, or `auto`: the experts over all devices.
    devices: number of fake devices on a CPU; 0: as many as the mesh needs.
    steps: optimizer steps.
    accumulate: microbatches of a step, run one after the other.
    loss_chunk: tokens whose logits exist at once; 0: all.
    eval_every, save_every: steps between held-out evaluations and checkpoints; 0: at the end.
    eval_windows: windows of an evaluation on the way; the last one takes all held-out text.
    keep: checkpoints kept.
    run: run directory; empty: a new one under runs/, or with `resume` the newest there.
    resume: continue the newest run under runs/ when `run` is empty.
    deterministic: the same bits run to run on GPU too (slower); on CPU they always are.
    dry_run: print parameters, FLOPs, memory and bytes moved for the mesh, and stop.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: str = "auto"
    devices: int = 0
    steps: int = 300
    accumulate: int = 1
    loss_chunk: int = 0
    eval_every: int = 100
    eval_windows: int = 64
    save_every: int = 100
    keep: int = 2
    run: str = ""
    resume: bool = False
    seed: int = 0
    deterministic: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1:
            raise UserError(
                f"steps={self.steps}, accumulate={self.accumulate}: both must be at least 1"
            )
        if self.data.batch_size % self.accumulate:
            raise UserError(
                f"batch_size={self.data.batch_size}: must be a multiple of "
                f"accumulate={self.accumulate}"
            )
        if self.data.seq_len > self.model.max_context:
            raise UserError(
                f"seq_len={self.data.seq_len}: longer than the model's "
                f"max_context={self.model.max_context}; raise --model.max-context"
            )
