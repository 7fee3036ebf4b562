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
from typing import Any, Literal

from moejax.attention_config import AttentionConfig, LatentConfig, YarnConfig
from moejax.errors import UserError
from moejax.locality_config import LocalityConfig
from moejax.router_config import RouterConfig
from moejax.sharing_config import SharingConfig

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
    "SharingConfig",
    "YarnConfig",
]

Activation = Literal["swiglu", "geglu", "swiglu_oai", "gelu", "relu2"]
ExchangeMode = Literal["auto", "local", "all_to_all", "ring", "remote"]
WireFormat = Literal["compute", "int8", "float8", "int4"]
RematPolicy = Literal["none", "local", "layer", "dots"]
ComputeDtype = Literal["float32", "bfloat16"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


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
        sharing: parameters that the routed experts have in common.
        together: neighbouring experts that are computed, and stored, as one wide one: exact, a
            token goes to each group once (`moejax.wide_bank`). 1: each by itself.
    """

    hidden: int = 256
    activation: Activation = "swiglu"
    bias: bool = False
    shared_hidden: int = 0
    shared_gate: bool = False
    sharing: SharingConfig = field(default_factory=SharingConfig, metadata={"may_lack": True})
    together: int = field(default=1, metadata={"may_lack": True})

    def __post_init__(self) -> None:
        _require(self.together >= 1, f"together={self.together}: 1 computes each by itself")
        for what, there in ("bias=True", self.bias), ("sharing", self.sharing.active):
            _require(
                self.together == 1 or not there,
                f"together={self.together} with {what}: only independent experts without biases "
                "can be computed as one wide one; set together=1",
            )
        _require(self.hidden >= 1, f"hidden={self.hidden}: an expert needs a width of at least 1")
        _require(
            not self.shared_gate or self.shared_hidden > 0,
            "shared_gate=True: needs shared_hidden > 0",
        )
        _require(
            self.sharing.kind != "up" or self.num_in == 2,
            f"sharing kind='up' with activation={self.activation!r}: has no gate, so that nothing "
            "of the input would be an expert's own; choose 'in', or a gated activation",
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
        _require(
            not self.locality.active or self.router.merged_from is None,
            f"merged_from={self.router.merged_from} with locality: distances are of experts, and "
            "a merged expert has several of the router's outputs; turn locality off",
        )
        together, wire = self.experts.together, self.exchange.wire
        _require(
            self.router.num_experts % together == 0,
            f"together={together}: must divide num_experts={self.router.num_experts}",
        )
        for what, there in (
            ("exchange.mode='remote'", self.exchange.mode == "remote"),
            ("dispatch_dim or combine_dim", wire.dispatch_dim or wire.combine_dim),
        ):
            _require(
                together == 1 or not there,
                f"together={together} with {what}: needs the weights of single experts; set "
                "together=1, or leave it out",
            )
        rank, experts = self.experts.sharing.rank, self.router.num_experts
        _require(
            rank is None or rank <= experts,
            f"sharing rank={rank} with num_experts={experts}: {experts} matrices of their own say "
            "all and are fewer; choose a smaller rank",
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
        num_experts_by_layer: routed experts of each layer, of which the router's num_experts is the
            largest; dense layers' numbers are not looked at. Placements need equal ones. Empty: the
            router's num_experts in all of them.
        window_by_layer: attention's window for each layer, in tokens, 0 for none; empty:
            `attention.window` in all of them.
        norm_eps: added to the mean square in every RMSNorm.
        tie_embeddings: the head uses the embedding's weights.
        scan_layers: run equal consecutive layers by one `lax.scan` (compile time) or unrolled.
        remat: what the backward recomputes: nothing; whole layers; of layers what a device computes
            by itself, so that no exchange is repeated (`local`); or all but products (`dots`).
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
    num_experts_by_layer: tuple[int, ...] = field(default=(), metadata={"may_lack": True})

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
        for name in "top_k_by_layer", "window_by_layer", "num_experts_by_layer":
            entries = len(getattr(self, name))
            _require(
                entries in (0, self.num_layers),
                f"{name} has {entries} entries: needs one for each of the {self.num_layers} "
                "layers, or none",
            )
        if largest := max(self.num_experts_by_layer[self.first_dense_layers :], default=0):
            _require(
                largest == self.moe.router.num_experts,
                f"num_experts_by_layer={self.num_experts_by_layer}: its largest number must be "
                f"num_experts={self.moe.router.num_experts}; set that to {largest}",
            )
            self.layers()  # what a router refuses is told now

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to 64, so that `tensor` divides it."""
        return -(-self.vocab_size // 64) * 64

    @property
    def expert_numbers(self) -> tuple[int, ...]:
        """Routed experts of each layer that has any, in order."""
        layers = (layer.moe for layer in self.layers())
        return tuple(moe.router.num_experts for moe in layers if moe is not None)

    @property
    def fewest_experts(self) -> int:
        """Routed experts of the layer that has the fewest; 1 for a model without."""
        return min(self.expert_numbers, default=1)

    def holds_experts(self, devices: int) -> bool:
        """Whether so many devices can each have experts of every layer, whole groups of them."""
        members = self.moe.experts.together
        if members > 1 and any(number % (devices * members) for number in self.expert_numbers):
            return False
        return devices <= self.fewest_experts

    def check_equal_experts(self, what: str) -> None:
        """Refuses a model whose experts cannot each be anywhere: unequal numbers, wide groups.

        Args:
            what: needs equal numbers of single ones.

        Raises:
            UserError: the layers' numbers differ, or experts are computed together.
        """
        _require(
            self.moe.experts.together == 1,
            f"{what} with together={self.moe.experts.together}: experts that are computed together "
            "lie together; leave it out, or set together=1",
        )
        _require(
            len(set(self.expert_numbers)) <= 1,
            f"{what} with num_experts_by_layer={self.num_experts_by_layer}: layers with unequal "
            "numbers of experts are only computed where their weights are; leave it out",
        )

    def layers(self) -> tuple[LayerConfig, ...]:
        """The layers one by one; equal neighbours may be scanned together."""
        return tuple(self._layer(i) for i in range(self.num_layers))

    def _layer(self, index: int) -> LayerConfig:
        moe = dense = None
        if index < self.first_dense_layers:
            dense = dataclasses.replace(
                self.moe.experts,
                hidden=self.dense_hidden,
                shared_hidden=0,
                shared_gate=False,
                sharing=SharingConfig(),
                together=1,
            )
        else:
            moe = self.moe
            changed: dict[str, Any] = {}
            if self.top_k_by_layer:
                changed["top_k"] = self.top_k_by_layer[index]
            if self.num_experts_by_layer:
                changed["num_experts"] = self.num_experts_by_layer[index]
            if changed:
                moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, **changed))
        attention = self.attention
        if self.window_by_layer:
            attention = dataclasses.replace(attention, window=self.window_by_layer[index] or None)
        return LayerConfig(self.d_model, self.norm_eps, attention, moe, dense)
