"""What a device computes and moves through its memory in a training step, by closed formulas.

Expert products as the Hopper kernels make them, everything else as XLA fuses it: each norm, sum of
residuals or rotation reads and writes its values once more than the products do. FLOPs are those
that are computed, with tiles that are not full and what is computed again; `sharding.flops` counts
what the model needs. Letters as in `moejax.config`; c is the bytes of a number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moejax.config import AttentionConfig, ExpertsConfig, LayerConfig
from moejax.exchange.cost import TILE
from moejax.model.attention import choose_attention
from moejax.training.config import TrainConfig
from pallas_kernels.fused_experts import api as fused
from sharding.device_kinds import DeviceKind
from sharding.local_weights import Weights
from sharding.mesh import MeshShape
from sharding.traffic_formulas import (
    item_size,
    layer_budget,
    sends_again,
    tokens_at_once,
)

__all__ = ["Operation", "operations", "without_kernels"]

Part = Literal["experts", "attention", "products", "head", "activations", "weights", "optimizer"]

NARROW = 50
"""H of an expert at which its products reach half their rate: H / (H + 50) is within 2 % of the
forward products of benchmarks/results/expert_kernels_h100.json, of H = 768, 1024 and 14336."""
BACKWARD = 0.9
"""Rate of the experts' backward products over the forward's, the mean of the same three shapes."""
WITHOUT_KERNELS = 0.4
"""Rate of the experts' products by XLA, where our kernels do not serve, over theirs. Assumed."""
FLASH = (0.75, 0.55)
"""Rate of fused attention over that of large products, forward and backward, for long sequences and
heads of 128. Assumed, near what arXiv 2407.08608 (figures 5 and 6) shows for an H100."""
FLASH_BACKWARD = 2.5
"""FLOPs of its backward over the forward's: five products instead of two."""
SCORES = (20, 24)
"""Bytes moved for a score where attention is not fused: float32 scores are written, read three
times and written as shares, which are read; and about as much with the gradient."""
FORWARD, RECOMPUTED, BACKWARD_PASSES = 13, 10, 23
"""Times that a token's row of D numbers is read or written in a layer beside products. Forward: two
norms (3 each: a mean square, then the row, then the result), two sums of residuals (3 each), the
router. Backward: norms 5 each, residuals 6, three gradients of attention's input added up (4),
the router 3."""
OPTIMIZER = 32
"""Bytes a stored number: the gradient for the norm, then it, master and moments, three written."""


@dataclass(frozen=True)
class Operation:
    """One operation of a device, or several alike.

    part: what it belongs to.
    times: how often a step.
    flops: of each, computed by the matrix units.
    moved: bytes to or from memory; at best while the matrix units work.
    exposed: those of them that are moved while the matrix units wait.
    rate: of the products, over that of large ones.
    """

    part: Part
    times: float
    flops: float = 0.0
    moved: float = 0.0
    exposed: float = 0.0
    rate: float = 1.0


def operations(
    config: TrainConfig, mesh: MeshShape, weights: Weights, kind: DeviceKind
) -> list[Operation]:
    """All operations of a step on one device, collectives left out; routing is even.

    Args:
        config: the run.
        mesh: sizes of the axes.
        weights: on a device.
        kind: of devices; decides what computes attention and experts.
    """
    step = _Step(config, mesh, kind)
    found = [op for layer, count in step.layers.items() for op in step.layer(layer, count)]
    return [*found, *step.ends(), *step.weights(weights)]


def without_kernels(layer: LayerConfig, dtype: str, tensor: int, kind: DeviceKind) -> str | None:
    """Why our kernels do not compute a layer's experts; None if they do.

    Args:
        layer: has `moe`.
        dtype: of the products.
        tensor: devices that the experts' width is split over.
        kind: of devices.
    """
    assert layer.moe is not None
    if not kind.kernels:
        return f"there are none for {kind.name}"
    experts = layer.moe.experts
    width_in, width_out = layer.moe.exchange.wire.widths(layer.d_model)
    hidden = experts.hidden // tensor
    case = fused.Case(width_in, hidden, experts.activation, dtype, experts.bias, width_out)
    return fused.refusal(kind.kernels, case, forced=True)


class _Step:
    def __init__(self, config: TrainConfig, mesh: MeshShape, kind: DeviceKind):
        self.kind = kind
        self.config, self.mesh, self.model = config, mesh, config.model
        self.tokens, self.item = tokens_at_once(config, mesh), item_size(config.model)
        self.layers = Counter(config.model.layers())
        self.again = config.model.remat != "none"
        self.products_again = config.model.remat in ("layer", "local")
        self.sends_again = sends_again(config.model)
        deterministic = config.deterministic
        chosen = choose_attention(kind.platform, config.model, deterministic=deterministic)
        self.flash = chosen == "cudnn"

    def layer(self, layer: LayerConfig, count: int) -> Iterator[Operation]:
        times = count * self.config.accumulate
        yield from self.attention(layer.d_model, layer.attention, times)
        row = self.tokens * layer.d_model * self.item
        passes = FORWARD + BACKWARD_PASSES + (RECOMPUTED if self.again else 0)
        yield Operation("activations", times, moved=passes * row)
        if layer.dense is not None:
            yield from self.mlp(layer.d_model, layer.dense, layer.dense.hidden, times)
        else:
            yield from self.experts(layer, times)

    def product(
        self, depth: int, columns: int, times: float, part: Part = "products", again: bool = True
    ) -> Iterator[Operation]:
        """A product of all tokens with a matrix, and its two gradients.

        The store of a tile is not hidden behind the next tile's products. `again`: it is computed
        once more where layers are; a layer's last product is not, because nobody reads it.
        """
        tokens, item = self.tokens, self.item
        flops = 2.0 * tokens * depth * columns
        moved = float(item * (tokens * depth + depth * columns + tokens * columns))
        forward = times * (1 + (again and self.products_again))
        for often, result in (
            (forward, tokens * columns),
            (times, tokens * depth),
            (times, depth * columns),
        ):
            yield Operation(part, often, flops, moved, float(item * result))

    def attention(self, wide: int, config: AttentionConfig, times: int) -> Iterator[Operation]:
        tensor, latent = self.mesh.tensor, config.latent
        heads, shared = config.num_heads // tensor, config.num_kv_heads // tensor
        if latent is None:
            for columns in (heads, shared, shared):
                yield from self.product(wide, columns * config.head_dim, times)
            turned = (heads + shared) * config.head_dim
        else:
            yield from self.product(wide, latent.rank + latent.rope_dim, times)
            if latent.query_rank:
                yield from self.product(wide, latent.query_rank, times)
            yield from self.product(latent.query_rank or wide, heads * config.head_dim, times)
            up = heads * (config.head_dim - latent.rope_dim + latent.value_dim)
            yield from self.product(latent.rank, up, times)
            turned = 2 * heads * config.head_dim
        yield from self.product(heads * config.value_dim, wide, times)
        # Rotations, and norms of queries and keys, which read them once more each way.
        normed = config.qk_norm != "none"
        passes = (2 + normed) * (1 + self.again) + 2 + 3 * normed
        yield Operation("activations", times, moved=passes * self.tokens * turned * self.item)
        yield from self.scores(config, heads, times)

    def scores(self, config: AttentionConfig, heads: int, times: int) -> Iterator[Operation]:
        length, width = self.config.data.seq_len, config.head_dim + config.value_dim
        forward = times * (1 + self.again)
        if not self.flash:
            pairs = self.tokens * length * heads
            # Where XLA's own does not serve, blocks of queries are computed again.
            blocks = config.sinks or config.value_dim != config.head_dim
            first, then = (float(each * pairs) for each in SCORES)
            flops = 2.0 * pairs * width
            yield Operation("attention", forward + blocks * times, flops, first, first)
            yield Operation("attention", times, 2 * flops, then, then)
            return
        window = min(config.window or length, length)
        keys = window - window**2 / (2 * length)
        flops = 2.0 * self.tokens * keys * heads * width
        # Narrow heads leave the exponentials more of the time, short texts the masked corners.
        rate = min(1.0, 1.5 * config.head_dim / (config.head_dim + 64)) * keys / (keys + 128)
        yield Operation("attention", forward, flops, rate=FLASH[0] * rate)
        yield Operation("attention", times, FLASH_BACKWARD * flops, rate=FLASH[1] * rate)

    def mlp(self, wide: int, config: ExpertsConfig, hidden: int, times: int) -> Iterator[Operation]:
        hidden //= self.mesh.tensor
        yield from self.product(wide, config.num_in * hidden, times)
        yield from self.product(hidden, wide, times, again=False)
        # The activation reads the projections and writes one; its gradient reads one more.
        forward, backward = config.num_in + 1, 2 * config.num_in + 1
        passes = forward * (1 + self.again) + backward
        yield Operation("activations", times, moved=passes * self.tokens * hidden * self.item)

    def experts(self, layer: LayerConfig, times: int) -> Iterator[Operation]:
        assert layer.moe is not None
        router, experts, item = layer.moe.router, layer.moe.experts, self.item
        budget = layer_budget(layer, self.tokens, self.mesh.expert)
        slots, chunks = budget.innermost.slots, budget.chunks
        given = self.tokens * router.top_k  # of even routing, to this device
        rows = given + chunks * slots * TILE // 2  # the last tile of an expert is half full
        width_in, width_out = layer.moe.exchange.wire.widths(layer.d_model)
        hidden = experts.hidden // self.mesh.tensor
        up, down = width_in * experts.num_in * hidden, width_out * hidden
        rate, read = hidden / (hidden + NARROW), float(chunks * slots * item)
        if without_kernels(layer, self.model.compute_dtype, self.mesh.tensor, self.kind):
            rate *= WITHOUT_KERNELS
        kept = item * given * (width_in + experts.num_in * hidden)
        # In the recomputation nobody reads the outputs, so only the first product is made.
        first = times * (1 + self.again)
        yield Operation("experts", first, 2.0 * rows * up, read * up + kept, rate=rate)
        yield Operation("experts", times, 2.0 * rows * down, read * down, rate=rate)
        both = up + down
        yield Operation("experts", times, 4.0 * rows * both, 2 * read * both, rate=BACKWARD * rate)

        # Three bfloat16 products for a float32 one, and its two gradients.
        logits = 3 * 2.0 * self.tokens * layer.d_model * router.num_outputs
        seen = float(self.tokens * (item * layer.d_model + 12 * router.num_outputs))
        yield Operation("products", times * (3 + self.again), logits, seen)
        yield Operation("activations", times, moved=self.rows(layer, budget, given))
        yield from self.shared_parts(experts, slots * both, times)
        if not budget.single_wave:
            # Gradients of further waves begin at zero in float32 and are added on.
            yield Operation("weights", times, moved=float(slots * both * (8 + 4 * item)))
        if experts.shared_hidden:
            yield from self.mlp(layer.d_model, experts, experts.shared_hidden, times)

    def shared_parts(self, config: ExpertsConfig, numbers: int, times: int) -> Iterator[Operation]:
        """Making the matrices of all slots from what experts share, and its gradient."""
        if not config.sharing.active:
            return
        # Written, of parts that are fewer; their gradients are read, and as much is read again of
        # what a basis is made of.
        flops = 2.0 * (config.sharing.rank or 0) * numbers
        moved = float(numbers * self.item)
        yield Operation("weights", times * (1 + self.again), flops, moved)
        yield Operation("weights", times, 2 * flops, 2 * moved)

    def rows(self, layer: LayerConfig, budget: Any, given: int) -> float:
        """Bytes of a layer's rows on their way into and out of the experts, all passes."""
        assert layer.moe is not None
        wide = layer.d_model * self.item
        gathered = 2 * given * wide if layer.moe.experts.hidden >= fused.WIDE else 0
        tokens, received = self.tokens * wide, 0
        if budget.mode != "local":
            received = budget.innermost.received_rows * budget.chunks * wide
        built = 2 * received if budget.mode == "all_to_all" else 0
        # Sums over a row's assignments; then, of rows from other devices, over a token's rows.
        sums = given * wide + (2 * received if received else tokens)
        leaving = self.tokens * layer.d_model * 8  # from float32 to the compute dtype
        inward = gathered + built
        again = gathered * self.again + built * self.sends_again
        return float(2 * (inward + sums) + again + 2 * leaving)

    def ends(self) -> Iterator[Operation]:
        """Embedding, final norm, head and loss."""
        tokens, wide, item = self.tokens, self.model.d_model, self.item
        vocab, times = self.model.padded_vocab // self.mesh.tensor, self.config.accumulate
        chunk = min(self.config.loss_chunk or tokens, tokens)
        table = vocab * wide * (8 + item)  # the gradient: zeros, sums, rounded
        yield Operation("activations", times, moved=float(10 * tokens * wide * item + table))
        yield from self.product(wide, vocab, times, "head", again=False)
        # float32 logits: written, read for the largest, the sum and the gradient, which is made at
        # once (`moejax.model.loss.summed_nll`); each chunk adds its gradient of the weights.
        logits = tokens * vocab * 16
        sums = math.ceil(tokens / chunk) * 8 * wide * vocab
        yield Operation("head", times, moved=float(logits + sums))

    def weights(self, weights: Weights) -> Iterator[Operation]:
        """Casting, copying out of the stacked layers, summing up, the optimizer."""
        item, accumulate = self.item, self.config.accumulate
        yield Operation("weights", 1, moved=float((4 + item) * weights.stored))
        # A loop over layers copies the weights of each out of the stack in every pass, and its
        # gradients into one.
        copies = 2 * item * (3 + self.again) * weights.scanned
        yield Operation("weights", accumulate, moved=float(copies))
        whole = (8 + item if accumulate > 1 else 4 + item) * weights.used
        yield Operation("weights", accumulate, moved=float(whole))
        yield Operation("optimizer", 1, moved=float(OPTIMIZER * weights.stored))
