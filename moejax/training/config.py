"""Configuration of a training run; `train.py --help` shows it as flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro.conf

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.training.anomaly_config import AnomalyConfig
from sharding.compression.config import GradCompression

__all__ = ["DataConfig", "OptimizerConfig", "TrainConfig"]


@dataclass(frozen=True)
class DataConfig:
    """Text and tokens.

    Attributes:
        paths: files, folders, globs, `.jsonl`; none: the standard library's own source.
        vocab: train a BPE of this size; 0: bytes.
        tokenizer: a tokenizer.json to use instead.
        seq_len: tokens of an example.
        batch_size: examples of a step, over all devices and accumulation steps.
        held_out: fraction of documents kept for evaluation, chosen by hash of the path.
        held_out_paths: text to evaluate on instead; then everything under `paths` is trained on.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    vocab: Annotated[int, tyro.conf.arg(aliases=["--vocab"])] = 0
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

    Attributes:
        learning_rate: peak.
        final_ratio: last learning rate over the peak.
        warmup_steps: steps of linear increase up to the peak.
        schedule: `cosine`, or `wsd`: constant, then linear decay over the last steps.
        decay_fraction: part of the run over which `wsd` decays.
        weight_decay: of matrices; norms and biases do not decay.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of the latter.
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
        for name in ("decay_fraction", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: must lie between 0 and 1")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must be 0 or more")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 0 and less than 1")
        if self.eps <= 0:
            raise UserError(f"eps={self.eps}: must be greater than 0")


@dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
        model: what is trained.
        data: what it reads.
        optimizer: how it learns.
        mesh: `data=2,expert=4,tensor=1`, or `auto`: over all devices, two or more experts on each.
        devices: number of fake devices on a CPU; 0: as many as the mesh needs.
        steps: optimizer steps.
        accumulate: microbatches of a step, run one after the other.
        loss_chunk: tokens whose logits exist at once; 0: all.
        eval_every: steps between held-out evaluations; 0: only at the end.
        eval_windows: windows of an evaluation on the way; the last one takes all held-out text.
        save_every: steps between checkpoints; 0: only at the end.
        keep: checkpoints kept.
        run: run directory; empty: a new one under runs/, or with `resume` the newest there.
        resume: continue the newest run under runs/ when `run` is empty.
        init_from: begin with the weights, tokenizer and model of this folder: of a run, of a model,
            or of Hugging Face transformers. Empty: random weights.
        seed: of the weights and of the order of examples.
        deterministic: the same bits run to run on GPU too (slower); on CPU they always are.
        placement_stats: count which experts are chosen together and how often, for planning where
            experts should live; written into the run directory.
        placement_stats_every: steps between writing them; 0: only at the end.
        placement_stats_window: steps that they look back on, older ones fade; 0: all since the
            run was started or continued.
        placement: where experts are computed. `home`: where their weights are stored, in order.
            `auto`: planned from the run's own traffic, and followed; results stay the same.
        replicas: slots of each device for copies of experts, with placement=auto.
        rebalance_every: steps between looks at the traffic, likewise.
        grad_compression: what of gradients and weights travels in fewer bytes (lossy).
        anomaly: what is done with steps whose loss or gradient is not finite or a spike.
        replay: a batch that a run has kept in `anomalies/`: print what the weights before that step
            make of it, and stop.
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
    init_from: str = ""
    seed: int = 0
    deterministic: bool = False
    placement_stats: bool = False
    placement_stats_every: int = 100
    placement_stats_window: int = 100
    placement: Literal["home", "auto"] = "home"
    replicas: int = 0
    rebalance_every: int = 100
    grad_compression: GradCompression = field(
        default_factory=GradCompression, metadata={"may_lack": True}
    )
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig, metadata={"may_lack": True})
    replay: str = field(default="", metadata={"may_lack": True})
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1:
            raise UserError(
                f"steps={self.steps}, accumulate={self.accumulate}: both must be at least 1"
            )
        intervals = ("eval_every", "save_every", "placement_stats_every", "placement_stats_window")
        for name in ("devices", "loss_chunk", "replicas", *intervals):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must be 0 or more")
        for name in ("eval_windows", "keep", "rebalance_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
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
        if self.replicas and self.placement == "home":
            raise UserError(
                f"replicas={self.replicas}: at home every expert is there once; choose "
                "placement=auto or no replicas"
            )
        if self.placement != "home":
            self.model.check_equal_experts(f"placement={self.placement}")
        if not any(layer.moe for layer in self.model.layers()):
            for name, asked in (
                ("placement_stats=True", self.placement_stats),
                ("placement=auto", self.placement == "auto"),
            ):
                if asked:
                    raise UserError(f"{name}: the model has no layer with experts; leave it off")
