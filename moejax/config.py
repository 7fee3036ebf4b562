"""Configuration of a model: frozen dataclasses, validated when they are made.

Shape letters used throughout the project:

    B batch        T tokens of a device     D model width      H hidden width of an expert
    E experts      K experts of a token     N heads            h width of a head
    G devices along `expert`                S expert slots of a device
    C bucket rows for one (source, device) pair                V vocabulary      L layers
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from moejax.attention_config import AttentionConfig, LatentConfig, YarnConfig
from moejax.errors import UserError
from moejax.locality_config import LocalityConfig

__all__ = [
    "AttentionConfig",
    "ExchangeConfig",
    "ExpertsConfig",
    "LatentConfig",
    "LayerConfig",
    "LocalityConfig",
    "MoEConfig",
    "ModelConfig",
    "RouterConfig",
    "YarnConfig",
]

ScoreFunction = Literal["softmax", "topk_softmax", "sigmoid"]
GroupScore = Literal["max", "top2_sum"]
Activation = Literal["swiglu", "geglu", "swiglu_oai", "gelu", "relu2"]
ExchangeMode = Literal["auto", "local", "all_to_all", "ring", "remote"]
WireFormat = Literal["compute", "int8", "float8", "int4"]
RematPolicy = Literal["none", "layer", "dots"]
ComputeDtype = Literal["float32", "bfloat16"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts.

    Attributes:
        num_experts: E, routed experts of a layer.
        top_k: K, experts of a token.
        score_function: `softmax`: probabilities over all experts, then the K best (Switch, Qwen3,
            OLMoE); `topk_softmax`: the K best logits, then a softmax over those (Mixtral,
            gpt-oss); `sigmoid`: independent scores (DeepSeek-V3).
        renormalize: divide the K scores of a token by their sum.
        scaling_factor: multiplies the scores after that.
        selection_bias: a per-expert bias added for choosing only (arXiv 2408.15664); its value is
            a `RouterBias` variable that the optimizer does not see.
        bias_update_rate: step of that bias a training step, towards equal loads; 0 freezes it.
        num_groups: experts lie in this many equal groups (DeepSeek-V2 §2.1.3).
        top_groups: groups that a token may use, its best ones.
        group_score: how a group is scored: by its best expert (V2) or its best two (V3).
        load_balance_coef: weight of E·Σ f_e·P_e over global statistics (arXiv 2101.03961 eq. 4).
        z_loss_coef: weight of mean(logsumexp(logits)²) (arXiv 2202.08906 eq. 5).
        forced_balance: ignore the scores when choosing and deal experts round robin; for
            benchmarks.
        bias: logits have a learned bias (gpt-oss).
    """

    num_experts: int = 8
    top_k: int = 2
    score_function: ScoreFunction = "softmax"
    renormalize: bool = True
    scaling_factor: float = 1.0
    selection_bias: bool = False
    bias_update_rate: float = 0.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    load_balance_coef: float = 0.01
    z_loss_coef: float = 0.0
    forced_balance: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        _require(self.num_experts >= 1, f"num_experts={self.num_experts}: at least 1 is needed")
        _require(
            1 <= self.top_k <= self.num_experts,
            f"top_k={self.top_k}: must lie between 1 and num_experts={self.num_experts}",
        )
        _require(
            self.num_groups >= 1 and self.num_experts % self.num_groups == 0,
            f"num_groups={self.num_groups}: must divide num_experts={self.num_experts}",
        )
        _require(
            1 <= self.top_groups <= self.num_groups,
            f"top_groups={self.top_groups}: must lie between 1 and num_groups={self.num_groups}",
        )
        reachable = self.top_groups * (self.num_experts // self.num_groups)
        _require(
            self.top_k <= reachable,
            f"top_k={self.top_k}: the {self.top_groups} chosen groups hold only {reachable} "
            "experts; raise top_groups or lower top_k",
        )
        _require(
            self.bias_update_rate == 0.0 or self.selection_bias,
            f"bias_update_rate={self.bias_update_rate}: needs selection_bias=True",
        )


@dataclass(frozen=True)
class ExpertsConfig:
    """What an expert computes.

    Attributes:
        hidden: width H of one expert.
        activation: gated `swiglu`, `geglu` (arXiv 2002.05202), `swiglu_oai` (gpt-oss: clamped,
            see `moejax.activations`), or plain `gelu`, `relu2` (arXiv 2109.08668). `gelu` and
            `geglu` use the tanh approximation.
        bias: both products have a bias.
        shared_hidden: total width of the experts every token uses (0: none).
        shared_gate: scale the shared experts' output by a learned sigmoid gate (Qwen2-MoE).
    """

    hidden: int = 256
    activation: Activation = "swiglu"
    bias: bool = False
    shared_hidden: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        _require(self.hidden >= 1, f"hidden={self.hidden}: an expert needs a width of at least 1")
        _require(
            not self.shared_gate or self.shared_hidden > 0,
            "shared_gate=True: needs shared_hidden > 0",
        )

    @property
    def num_in(self) -> int:
        """Number of input projections: 2 for gated activations, else 1."""
        return 1 if self.activation in ("gelu", "relu2") else 2


@dataclass(frozen=True)
class WireConfig:
    """How activations and their gradients are rounded while they travel.

    `compute` sends the compute dtype as it is: exact. `int8`, `float8` (e4m3) and `int4` send
    blocks of 128 columns with a float32 scale each; the rounding is straight-through, gradients do
    not see it. It applies to all rows of an exchange, those that stay on their device included, and
    to none where nothing is exchanged.

    Attributes:
        dispatch: tokens on the way to their experts.
        combine: experts' outputs on the way home.
        dispatch_grad: gradients of the tokens on the way home.
        combine_grad: gradients of the outputs on the way to the experts.
        rotate: multiply each block with a Hadamard matrix before rounding, and back on arrival; the
            width of the rows is then a multiple of 128.
        dispatch_dim: columns r ≤ D of a token on the way to its experts, and of its gradient on the
            way home: a learned projection, lossy, see `moejax.exchange.reduced`; as part of the
            model it applies on any number of devices. None sends all D.
        combine_dim: likewise of an output on the way home, and of its gradient.
    """

    dispatch: WireFormat = "compute"
    combine: WireFormat = "compute"
    dispatch_grad: WireFormat = "compute"
    combine_grad: WireFormat = "compute"
    rotate: bool = False
    dispatch_dim: int | None = None
    combine_dim: int | None = None

    def __post_init__(self) -> None:
        for name, columns in ("dispatch_dim", self.dispatch_dim), ("combine_dim", self.combine_dim):
            _require(
                columns is None or columns >= 1,
                f"{name}={columns}: a row needs at least 1 column; None sends them all",
            )
        _require(
            not self.rotate or any(f != "compute" for f in self.formats),
            "rotate=True: nothing is rounded; set a wire format other than 'compute'",
        )

    @property
    def formats(self) -> tuple[WireFormat, ...]:
        """Of the four ways: dispatch, combine, and their gradients."""
        return self.dispatch, self.combine, self.dispatch_grad, self.combine_grad

    def widths(self, d_model: int) -> tuple[int, int]:
        """Columns of a row on the way to the experts, and on the way home.

        Args:
            d_model: D.
        """
        return self.dispatch_dim or d_model, self.combine_dim or d_model


EXACT_WIRE = WireConfig()


@dataclass(frozen=True)
class ExchangeConfig:
    """How rows travel between devices.

    Attributes:
        mode: `local` (one device along `expert`), `all_to_all`, `ring` (all-gather in,
            reduce-scatter back), `remote` (rows are written straight into the other GPUs' memory by
            a kernel of ours, one process in all; elsewhere the same rows by XLA's
            all-to-all), or `auto`, which picks one of the first three by counted bytes.
        bucket_rows: rows C of one (source, device) bucket; None derives it from `bucket_slack`.
        bucket_slack: buckets hold this multiple of the expected number of rows, at most T; what
            does not fit travels in further waves. `inf` gives buckets of T: one wave, whatever
            the routing.
        capacity_factor: None is dropless. A number bounds each expert to this multiple of its
            even share and drops the rest (arXiv 2101.03961 §2.2): lossy, counted.
        chunks: a device's tokens are exchanged and computed in this many pieces, so that one may
            travel while another is computed; with a number of tokens that it does not divide, in
            the next smaller number that does.
        reserve_sms: streaming multiprocessors that Hopper's expert kernels leave free, so that
            transfers beside them find some: the kernels stay on theirs until they end. Others, and
            8-bit experts, take what they get.
        host_devices: devices along `expert` that share a host, or a fast link, next to each other;
            with more of them a row crosses once to each other host and is spread inside it. None
            sends a row to every device. `bucket_rows` holds for both.
        wire: rounding of what travels; exact by default.
    """

    mode: ExchangeMode = "auto"
    bucket_rows: int | None = None
    bucket_slack: float = 1.5
    capacity_factor: float | None = None
    chunks: int = 1
    reserve_sms: int = 0
    host_devices: int | None = None
    wire: WireConfig = EXACT_WIRE

    def __post_init__(self) -> None:
        _require(
            self.bucket_rows is None or self.bucket_rows >= 1,
            f"bucket_rows={self.bucket_rows}: a bucket holds at least 1 row",
        )
        _require(
            self.bucket_slack > 0,
            f"bucket_slack={self.bucket_slack}: must be greater than 0",
        )
        _require(
            self.capacity_factor is None or self.capacity_factor > 0,
            f"capacity_factor={self.capacity_factor}: must be greater than 0, or None",
        )
        _require(self.chunks >= 1, f"chunks={self.chunks}: there is at least 1")
        _require(self.reserve_sms >= 0, f"reserve_sms={self.reserve_sms}: 0 reserves none")
        _require(
            self.host_devices is None or self.host_devices >= 1,
            f"host_devices={self.host_devices}: a host has at least 1; None for no hierarchy",
        )


@dataclass(frozen=True)
class MoEConfig:
    """One Mixture-of-Experts layer.

    Attributes:
        router: how tokens choose experts.
        experts: what an expert computes.
        exchange: how rows travel between devices.
        locality: how routing prefers experts that are near; lossy, off by default.
    """

    router: RouterConfig = field(default_factory=RouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    locality: LocalityConfig = field(default_factory=LocalityConfig, metadata={"may_lack": True})

    def __post_init__(self) -> None:
        _require(
            not (self.locality.active and self.router.forced_balance),
            "forced_balance=True with locality: experts are dealt, so that neither scores nor "
            "distances play a part; turn one of them off",
        )


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer as the model builds it: attention, then an MoE or a dense MLP."""

    d_model: int
    norm_eps: float
    attention: AttentionConfig
    moe: MoEConfig | None
    dense: ExpertsConfig | None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    Attributes:
        vocab_size: token ids.
        d_model: width D.
        num_layers: L, dense and MoE layers together.
        max_context: longest sequence the model is used with, in tokens.
        attention: its heads.
        moe: its experts.
        dense_hidden: width of the dense layers' MLP.
        first_dense_layers: the first layers use a dense MLP of width `dense_hidden` (DeepSeek).
        top_k_by_layer: number of experts of a token for each layer; empty: the router's top_k.
        window_by_layer: attention's window for each layer, in tokens, 0 for none; empty:
            `attention.window` in all of them.
        norm_eps: added to the mean square in every RMSNorm.
        tie_embeddings: the head uses the embedding's weights.
        scan_layers: run equal consecutive layers by one `lax.scan` (compile time) or unrolled.
        remat: what the backward recomputes: nothing, whole layers, or all but products (`dots`).
        compute_dtype: dtype of activations and of weights in products; masters stay float32.
    """

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    max_context: int = 256
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    dense_hidden: int = 0
    first_dense_layers: int = 0
    top_k_by_layer: tuple[int, ...] = ()
    window_by_layer: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    scan_layers: bool = False
    remat: RematPolicy = "none"
    compute_dtype: ComputeDtype = "bfloat16"

    def __post_init__(self) -> None:
        _require(self.vocab_size >= 2, f"vocab_size={self.vocab_size}: at least 2 is needed")
        _require(self.num_layers >= 1, f"num_layers={self.num_layers}: at least 1 is needed")
        _require(
            0 <= self.first_dense_layers <= self.num_layers,
            f"first_dense_layers={self.first_dense_layers}: must lie between 0 and "
            f"num_layers={self.num_layers}",
        )
        _require(
            self.first_dense_layers == 0 or self.dense_hidden > 0,
            f"first_dense_layers={self.first_dense_layers}: needs dense_hidden > 0",
        )
        for name in "top_k_by_layer", "window_by_layer":
            entries = len(getattr(self, name))
            _require(
                entries in (0, self.num_layers),
                f"{name} has {entries} entries: needs one for each of the {self.num_layers} "
                "layers, or none",
            )

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to 64, so that `tensor` divides it."""
        return -(-self.vocab_size // 64) * 64

    def layers(self) -> tuple[LayerConfig, ...]:
        """The layers one by one; equal neighbours may be scanned together."""
        return tuple(self._layer(i) for i in range(self.num_layers))

    def _layer(self, index: int) -> LayerConfig:
        moe = dense = None
        if index < self.first_dense_layers:
            dense = dataclasses.replace(
                self.moe.experts, hidden=self.dense_hidden, shared_hidden=0, shared_gate=False
            )
        else:
            moe = self.moe
            if self.top_k_by_layer:
                router = dataclasses.replace(moe.router, top_k=self.top_k_by_layer[index])
                moe = dataclasses.replace(moe, router=router)
        attention = self.attention
        if self.window_by_layer:
            attention = dataclasses.replace(attention, window=self.window_by_layer[index] or None)
        return LayerConfig(self.d_model, self.norm_eps, attention, moe, dense)
