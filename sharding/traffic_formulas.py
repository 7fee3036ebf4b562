"""Closed formulas for the bytes that each collective of a training step moves.

`sharding.traffic` counts the same in the traced program; tests hold the two together. Letters as in
`moejax.config`; c is the bytes of one number in the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from moejax.config import LayerConfig, ModelConfig
from moejax.exchange.budget import Budget, choose_for
from moejax.exchange.wire import row_bytes
from moejax.placement.arrays import num_slots
from moejax.placement.moves import bucket_size
from moejax.training.config import TrainConfig
from sharding.compression.reduction import Reducer
from sharding.gradients import missing_axes
from sharding.mesh import AXES, DATA, EXPERT, TENSOR, TOKEN_AXES, MeshShape
from sharding.specs import axes_of
from sharding.traffic import Crossing, Kind, Part, Phase, add_up, sent_bytes
from sharding.zero import Storage

__all__ = [
    "expected_collectives",
    "fetch_collectives",
    "item_size",
    "layer_budget",
    "local_elements",
    "sends_again",
    "tokens_at_once",
    "variables_of",
]


def item_size(config: ModelConfig) -> int:
    """Bytes c of one number in the compute dtype."""
    return {"float32": 4, "bfloat16": 2}[config.compute_dtype]


def tokens_at_once(config: TrainConfig, mesh: MeshShape) -> int:
    """T: tokens of a device in one microbatch."""
    examples = config.data.batch_size // config.accumulate
    return examples * config.data.seq_len // (mesh.data * mesh.expert)


def layer_budget(layer: LayerConfig, tokens: int, devices: int) -> Budget:
    """The exchange of an MoE layer.

    Args:
        layer: has `moe`.
        tokens: T of a device, in one microbatch.
        devices: G along `expert`.
    """
    assert layer.moe is not None
    return choose_for(layer.moe, tokens=tokens, devices=devices)


def variables_of(params: nnx.State, storage: Any) -> Iterator[tuple[tuple[int, ...], Storage]]:
    """Global shape and storage of every parameter of a `Blueprint`."""
    leaves = jax.tree.leaves(storage, is_leaf=lambda x: isinstance(x, Storage))
    variables = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    for variable, stored in zip(variables, leaves, strict=True):
        yield tuple(variable.get_value().shape), stored


def local_elements(shape: tuple[int, ...], storage: Storage, mesh: MeshShape) -> int:
    """Elements of a parameter on a device that uses it."""
    return math.prod(shape) // math.prod(getattr(mesh, a) for a in axes_of(storage.spec))


def expected_collectives(
    config: TrainConfig, mesh: MeshShape, params: nnx.State, storage: Any, reducer: Reducer
) -> list[Crossing]:
    """Every collective of a training step, by formula; `times` counts the arrays.

    Args:
        config: the run.
        mesh: sizes of the axes.
        params, storage: of the `Blueprint`.
        reducer: of the gradients.
    """
    formulas = _Formulas(config, mesh)
    return add_up(
        crossing
        for part in (formulas.model(), formulas.weights(variables_of(params, storage), reducer))
        for crossing in part
    )


def fetch_collectives(
    config: TrainConfig, mesh: MeshShape, slots: int, waves: Sequence[int]
) -> list[Crossing]:
    """What a placement adds to a step: copies of experts fetched, their gradients sent home.

    Args:
        config: the run.
        mesh: sizes of the axes.
        slots: S of a device.
        waves: of each MoE layer, as `moejax.placement.fetch.fetch_traffic` counts them.
    """
    formulas = _Formulas(config, mesh)
    layers = [layer for layer in config.model.layers() if layer.moe is not None]
    return add_up(
        crossing
        for layer, count in zip(layers, waves, strict=True)
        for crossing in formulas.fetch(layer, slots, count)
    )


def sends_again(model: ModelConfig) -> bool:
    """Whether a layer's recomputation repeats what its forward has sent."""
    return model.remat in ("layer", "dots")


class _Formulas:
    def __init__(self, config: TrainConfig, mesh: MeshShape):
        self.config, self.mesh, self.model_config = config, mesh, config.model
        self.item = item_size(config.model)
        self.tokens = tokens_at_once(config, mesh)
        self.sends_again = sends_again(config.model)

    def one(
        self,
        name: str,
        phase: Phase,
        kind: Kind,
        axes: str | tuple[str, ...],
        operand: float,
        times: int | None = None,
        extra: bool = False,
    ) -> Crossing:
        axes = (axes,) if isinstance(axes, str) else axes
        axes = tuple(a for a in axes if getattr(self.mesh, a) > 1)
        times = self.config.accumulate if times is None else times
        devices = math.prod(getattr(self.mesh, a) for a in axes)
        sent = times * sent_bytes(kind, devices, operand)
        return Crossing(name, phase, kind, axes, times, sent, extra)

    def weights(
        self, variables: Iterator[tuple[tuple[int, ...], Storage]], reducer: Reducer
    ) -> Iterator[Crossing]:
        splits: set[tuple[str, ...]] = set()
        for (shape, stored), leaf in zip(variables, reducer.leaves, strict=True):
            size = local_elements(shape, stored, self.mesh)
            splits.add(tuple(a for a in AXES if a in axes_of(stored.stored)))
            axes = missing_axes(stored.spec)
            if stored.dim is not None:
                piece, item = size // self.mesh.data, 4 if stored.dtype else self.item
                operand = reducer.gather_operand(leaf, piece) or piece * item
                yield self.one("weight gather", "", "all-gather", DATA, operand, 1)
            compressed = reducer.crossings(leaf)
            if compressed is not None:
                for crossing in compressed:
                    kind, over, operand = crossing[:3]
                    whole = self.one("gradient reduction", "", kind, over, operand, 1)
                    if len(crossing) == 5:  # among some of an axis only
                        sent = sent_bytes(kind, crossing[4], operand)
                        whole = replace(whole, part=crossing[3], sent=sent)
                    yield whole
                continue
            if stored.dim is not None:
                yield self.one("gradient reduction", "", "reduce-scatter", DATA, 4 * size, 1)
                size, axes = piece, tuple(a for a in axes if a != DATA)
            yield self.one("gradient reduction", "", "all-reduce", axes, 4 * size, 1)
        for axes in splits:
            yield self.one("gradient norm", "", "all-reduce", axes, 4, 1)
        if reducer.clips:
            yield self.one("gradient norm", "", "all-reduce", (EXPERT, TENSOR), 4, 1)
        yield self.one("loss", "", "all-reduce", TOKEN_AXES, 4, 2)
        if self.config.anomaly.active:
            yield self.one("loss", "", "all-reduce", AXES, 8, 1)

    def model(self) -> Iterator[Crossing]:
        wide = self.tokens * self.model_config.d_model * self.item  # T·D·c
        yield self.one("embedding", "forward", "all-reduce", TENSOR, wide)
        for layer in self.model_config.layers():
            yield from self.attention(layer, wide)
            if layer.dense is not None:
                yield self.one("MLP", "forward", "all-reduce", TENSOR, wide)
                yield self.one("MLP", "backward", "all-reduce", TENSOR, wide)
            else:
                yield from self.experts(layer, wide)
                yield from self.exchange(layer, layer_budget(layer, self.tokens, self.mesh.expert))
        yield from self.loss()

    def forward(self, *args: Any, **kwargs: Any) -> Iterator[Crossing]:
        """A collective of a layer's forward, and again for the backward if layers are rematted."""
        name, *rest = args
        yield self.one(name, "forward", *rest, **kwargs)
        if self.sends_again:
            yield self.one(name, "recomputed", *rest, **kwargs)

    def attention(self, layer: LayerConfig, wide: int) -> Iterator[Crossing]:
        yield from self.forward("attention", "all-reduce", TENSOR, wide)
        latent = layer.attention.latent
        if latent is None:
            yield self.one("attention", "backward", "all-reduce", TENSOR, wide)
        else:  # what all heads share: the source of the queries, the latent and the rotated key
            shared = latent.rank + latent.rope_dim + (latent.query_rank or layer.d_model)
            crossing = self.tokens * shared * self.item
            yield self.one("attention", "backward", "all-reduce", TENSOR, crossing)
        for _ in "qk":
            if layer.attention.qk_norm == "full":  # a mean square for each token, both ways
                yield from self.forward("attention", "all-reduce", TENSOR, 4 * self.tokens)
                yield self.one("attention", "backward", "all-reduce", TENSOR, 4 * self.tokens)
            elif layer.attention.qk_norm == "head":  # the gradient of the shared scale
                scale = 4 * layer.attention.head_dim
                yield self.one("attention", "backward", "all-reduce", TENSOR, scale)

    def experts(self, layer: LayerConfig, wide: int) -> Iterator[Crossing]:
        assert layer.moe is not None
        router, experts = layer.moe.router, layer.moe.experts
        # Tokens and scores enter the tensor-parallel region; a float32 sum leaves it.
        yield self.one("experts", "forward", "all-reduce", TENSOR, wide // self.item * 4)
        yield self.one("experts", "backward", "all-reduce", TENSOR, wide)
        scores = 4 * self.tokens * router.top_k
        yield self.one("experts", "backward", "all-reduce", TENSOR, scores)
        if experts.bias:
            slots = num_slots(router.num_experts, self.mesh.expert)
            output_bias = slots * layer.d_model * self.item
            yield self.one("experts", "backward", "all-reduce", TENSOR, output_bias)
            if experts.shared_hidden:
                yield self.one("MLP", "backward", "all-reduce", TENSOR, layer.d_model * self.item)
        if experts.shared_gate:
            yield self.one("experts", "backward", "all-reduce", TENSOR, 4 * layer.d_model)
        if experts.sharing.rank is not None:  # how a basis is combined, of both projections
            slots = num_slots(router.num_experts, self.mesh.expert)
            for _ in range(2):
                combinations = slots * experts.sharing.rank * self.item
                yield self.one("experts", "backward", "all-reduce", TENSOR, combinations)
        wire = layer.moe.exchange.wire
        for columns in (wire.dispatch_dim, wire.combine_dim):
            projection = (columns or 0) * layer.d_model * self.item
            yield self.one("experts", "backward", "all-reduce", TENSOR, projection)
        if router.load_balance_coef or router.z_loss_coef:
            counts = 4 * router.num_outputs
            yield from self.forward("router statistics", "all-reduce", TOKEN_AXES, counts)
        # Counts of each expert; losses, entropy, tokens; the exchange's seven counters.
        reported = 4 * (self.model_config.moe.router.num_experts + 4 + 7)
        yield self.one("metrics", "forward", "all-reduce", TOKEN_AXES, reported)

    def exchange(self, layer: LayerConfig, budget: Budget) -> Iterator[Crossing]:
        assert layer.moe is not None
        if layer.moe.exchange.capacity_factor is not None:
            counts = 4 * layer.moe.router.num_experts
            yield from self.forward("capacity counts", "all-gather", EXPERT, counts)
        if not budget.single_wave:
            yield from self.forward("number of waves", "all-reduce", TOKEN_AXES, 4)
        if budget.inside is None:
            if budget.mode != "local":
                further = int(not budget.single_wave)
                yield from self.level(layer, budget, budget.chunks, further)
            return
        yield from self.agreement_inside(budget, budget.inside)
        outer, inner = (1 + (not level.single_wave) for level in (budget, budget.inside))
        chunks = budget.chunks
        yield from self.level(layer, budget, chunks, outer - 1, "between hosts")
        # A further wave inside the first between hosts, and a first and a further one in the next.
        further = outer * inner - 1
        # What goes home between hosts is kept, and with it what it was summed of.
        spared = 0 if self.sends_again else inner - 1
        yield from self.level(layer, budget.inside, chunks, further, "inside hosts", spared)

    def agreement_inside(self, outer: Budget, inner: Budget) -> Iterator[Crossing]:
        """Counts of what will arrive, for the counters and the number of waves."""
        counts = 2 * 4 * outer.most_waves * outer.devices * inner.devices
        times = self.config.accumulate * outer.chunks
        sent = times * sent_bytes("all-to-all", outer.devices, counts)
        known = Crossing("number of waves", "forward", "all-to-all", (EXPERT,), times, sent)
        known = replace(known, part="between hosts")
        yield known
        if not inner.single_wave:
            if self.sends_again:
                yield replace(known, phase="recomputed")
            yield from self.forward(
                "number of waves", "all-reduce", TOKEN_AXES, 4 * outer.most_waves
            )

    def level(
        self,
        layer: LayerConfig,
        budget: Budget,
        chunks: int,
        further: int,
        part: Part = "",
        spared: int = 0,
    ) -> Iterator[Crossing]:
        """The rows of an exchange, or of one of its two levels.

        `chunks` are those of the outer level, `further` its further waves if each loop turns once;
        `spared` of the first chunk's are not repeated where what was received is kept.
        Mode `remote` is counted as it runs without its kernel, with rows that nobody needs; of the
        bytes of rows the kernel sends the part that `Budget.moved_rows` expects.
        """
        rows, times = budget.received_rows, self.config.accumulate * chunks
        dtype = self.model_config.compute_dtype
        sizes = row_bytes(layer.d_model, dtype, budget.carried, budget.wire)
        out: list[tuple[int, Kind]] = [(rows * sizes[0], "all-to-all")]
        if budget.mode == "ring":
            out = [(budget.tokens * sizes[0], "all-gather")]
        elif budget.mode == "remote":  # slots and scores of all tokens go everywhere
            beside = 8 * budget.carried
            out = [
                (rows * (sizes[0] - beside), "all-to-all"),
                (budget.tokens * beside, "all-gather"),
            ]
        home, back, again = (rows * size for size in sizes[1:])

        def way(name: str, phase: Phase, operand: int, kind: Kind = "all-to-all") -> Crossing:
            extra = name == "further wave"
            often = times * (further if extra else 1)
            if extra and phase == "recomputed":
                often -= self.config.accumulate * spared
            sent = often * sent_bytes(kind, budget.devices, operand)
            return Crossing(name, phase, kind, (EXPERT,), often, sent, extra, part)

        def outward(name: str, phase: Phase) -> Iterator[Crossing]:
            return (way(name, phase, *part) for part in out)

        yield from outward("dispatch", "forward")
        if self.sends_again:
            yield from outward("dispatch", "recomputed")
        yield way("dispatch", "backward", back)
        yield way("combine", "forward", home)
        yield way("combine", "backward", again)
        # A projection's gradient needs the outputs at home.
        twice = budget.wire.combine_dim is not None and self.model_config.remat != "none"
        if twice and self.sends_again:
            yield way("combine", "recomputed", home)
        if further:
            if twice:
                yield from outward("further wave", "recomputed")
                yield way("further wave", "recomputed", home)
            yield from outward("further wave", "forward")
            yield way("further wave", "forward", home)
            # The backward of a further wave dispatches its rows once more.
            yield from outward("further wave", "backward")
            yield way("further wave", "backward", again)
            yield way("further wave", "backward", back)

    def fetch(self, layer: LayerConfig, slots: int, waves: int) -> Iterator[Crossing]:
        assert layer.moe is not None
        experts, wide = layer.moe.experts, layer.d_model
        hidden = experts.hidden // self.mesh.tensor
        # Numbers of one expert; what experts share is everywhere.
        own = experts.sharing.own(wide, experts.num_in, hidden, wide)
        arrays = [math.prod(shape) for shape in own.values()]
        if experts.bias:
            arrays += [experts.num_in * hidden, wide]
        bucket, times = bucket_size(slots, self.mesh.expert), self.config.accumulate * waves
        for numbers in arrays:
            operand = self.mesh.expert * bucket * numbers * self.item
            way: tuple[Any, ...] = "all-to-all", EXPERT, operand, times, True
            yield self.one("replica fetch", "forward", *way)
            if self.model_config.remat != "none":  # so that one layer's copies are there at a time
                yield self.one("replica fetch", "recomputed", *way)
            yield self.one("replica fetch", "backward", *way)

    def loss(self) -> Iterator[Crossing]:
        tokens, chunk = self.tokens, self.config.loss_chunk
        if chunk and chunk < tokens:
            tokens = -(-tokens // chunk) * chunk
        wide = self.tokens * self.model_config.d_model * self.item
        yield self.one("cross-entropy", "backward", "all-reduce", TENSOR, wide)
        # Largest logit, sum of exponentials, target's logit.
        yield self.one("cross-entropy", "forward", "all-reduce", TENSOR, 3 * 4 * tokens)
