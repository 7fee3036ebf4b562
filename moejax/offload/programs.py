"""The compiled steps of a model whose experts lie on the host: a loop over layers, driven from it.

A layer with experts is a program that attends and routes, the host's turn, and a program that
computes the experts and adds them to the residual. Equal layers have the same programs: weights are
arguments, and where experts are is data, so nothing compiles anew when that changes.

Where all experts that a step needs fit the slots, the second program is the resident layer's
arithmetic over other slots. Where they do not, each copy of a token is a row of its own, a wave
fills those rows whose experts it has, and a last program adds up each token's copies in float32, in
the order of its choice: so the sum depends neither on the waves nor on what the slots held.

Shape letters: B rows, S tokens of a row, T = B · S, K experts of a token, N = T · K copies, D model
width, E experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.inference.drawing import Drawn
from moejax.inference.exchange_choice import DecodeExchange, Picked, Timer
from moejax.inference.scheduler import Plan
from moejax.inference.shapes import Shape
from moejax.inference.step_programs import StepPrograms
from moejax.inference.step_rows import COLUMNS
from moejax.offload.experts import OffloadedExperts
from moejax.offload.halves import Halves, Kind
from moejax.offload.parts import same_but_layer
from moejax.offload.probes import LinearProbe, RouterProbe
from moejax.offload.statistics import OffloadStats
from moejax.training.state import Blueprint

__all__ = ["OffloadedPrograms"]


@dataclass(frozen=True)
class _Key:
    """A program: what it does, of layers of which kind, and for which sizes."""

    part: str
    shape: Shape
    kind: int = -1


@dataclass(frozen=True)
class _Layer:
    """A layer of the model.

    name: of its pages.
    at: its number among layers with experts; None without.
    state: its weights but for the experts.
    probe: weights of what guesses the next layer's choice; None where nothing does.
    kind: which programs it has.
    """

    name: str
    at: int | None
    state: nnx.State
    probe: Any
    kind: int


class OffloadedPrograms(StepPrograms):
    """The model with its pages and some of its experts on one device, and the steps over them.

    Args:
        blueprint: model and mesh, from `apart`.
        params: weights but for experts, as from `load_weights`.
        biases: selection biases, likewise.
        experts: of all layers.
        by_copy: always add up a token's copies one by one, so that a row's bits do not depend on
            which experts the other rows need.
        one_wave, placing: of no use here.
        sizes: num_ids, slots, pages, page_len and max_len, see `StepPrograms`.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        params: Any,
        biases: Any,
        *,
        experts: OffloadedExperts,
        by_copy: bool = False,
        one_wave: bool = False,
        placing: None = None,
        **sizes: int,
    ):
        del one_wave, placing
        if by_copy:
            experts.config.check_deterministic()
        super().__init__(blueprint, **sizes)
        self._experts, self._by_copy = experts, by_copy
        self._here = NamedSharding(blueprint.mesh, P())
        model: Any = blueprint.merge(params, biases)
        self._kinds: list[Kind] = []
        self._model_layers = self._split_layers(model)
        model.layers = nnx.Dict({})
        graph, self._top_state = nnx.split(model)
        self._halves = Halves(graph, jnp.dtype(blueprint.config.compute_dtype))

    def offload_stats(self) -> OffloadStats:
        """What was moved and waited for."""
        return self._experts.stats()

    def reset(self) -> None:
        """Empties the pages, forgets what is under way, and fills the slots anew."""
        self._experts.reset()
        super().reset()

    def pick_exchange(
        self, rows: Iterable[int], how: DecodeExchange, timer: Timer | None = None
    ) -> Picked | None:
        """Nothing to choose: one device exchanges no rows."""
        del rows, how, timer
        return None

    def _split_layers(self, model: Any) -> list[_Layer]:
        groups = self._blueprint.groups
        experts, numbers = self._experts, {index: n for n, index in enumerate(self._experts.layers)}
        seen: dict[Hashable, int] = {}
        layers = []
        for group in groups:
            graph, state = nnx.split(model.layers[group.name])
            at = numbers.get(group.start)
            bank, slots, probe, weights = None, 0, None, None
            if at is not None:
                bank, slots = experts.store.banks[group.start], experts.room.slots_L[at]
                probe, weights = self._probe(model, at)
            same = (graph, None if bank is None else same_but_layer(bank), slots, probe)
            if same not in seen:
                seen[same] = len(self._kinds)
                top_k = 0 if group.layer.moe is None else group.layer.moe.router.top_k
                self._kinds.append(Kind(graph, bank, slots, experts.room.wave, probe, top_k))
            layers.append(_Layer(group.name, at, state, weights, seen[same]))
        return layers

    def _probe(self, model: Any, at: int) -> tuple[Any, Any]:
        """What guesses the choice of the layer after the one numbered so, and its weights."""
        config, layers = self._experts.config, self._experts.layers
        if at + 1 == len(layers):
            return None, None
        if config.predictor == "routers":
            return RouterProbe.of(model.layers[str(layers[at + 1])])
        if config.predictor == "linear":
            assert config.fits is not None
            found = config.fits.linear(at, 1)
            if found is not None:
                return LinearProbe(self._experts.experts_L[at + 1]), jax.device_put(
                    found, self._here
                )
        return None, None

    def _keys(self, shape: Shape) -> Iterator[_Key]:
        yield _Key("begin", shape)
        yield _Key("end", shape)
        for number, kind in enumerate(self._kinds):
            if kind.bank is None:
                yield _Key("dense", shape, number)
                continue
            yield _Key("attend", shape, number)
            most = min(shape.rows * (shape.tokens or 1) * kind.top_k, kind.bank.experts)
            parts = [] if self._by_copy else ["serve"]
            if self._by_copy or most > kind.slots:
                parts += ["nothing", "streamed", "finish"]
            if most > kind.slots and not self._alike(kind):
                parts.append("held")
            yield from (_Key(part, self._tokens_of(shape), number) for part in parts)

    def _alike(self, kind: Kind) -> bool:
        """Whether waves are computed in one way wherever their experts come from.

        How 8-bit experts are multiplied, and rounded, goes by the rows for each slot.
        """
        return self._by_copy or (kind.bank is not None and kind.bank.quantized)

    @staticmethod
    def _tokens_of(shape: Shape) -> Shape:
        """Only rows and tokens matter behind the attention."""
        return Shape(shape.rows, shape.tokens or 1, 0)

    def run(self, plan: Plan) -> Drawn:
        """Runs a step: the host is told what each layer chooses, so it ends with the last layer."""
        self._experts.begin(plan)
        return super().run(plan)

    def _logits(self, shape: Shape, rows: jax.Array, where: jax.Array) -> jax.Array:
        begin = self._program(_Key("begin", shape))
        x_BSD, context = begin(self._top_state, self._history_RM, rows, where)
        for layer in self._model_layers:
            pages = self._layers[layer.name]
            if layer.at is None:
                run = self._program(_Key("dense", shape, layer.kind))
                x_BSD, self._layers[layer.name] = run(layer.state, x_BSD, context, pages)
                continue
            run = self._program(_Key("attend", shape, layer.kind))
            given = layer.state, layer.probe, x_BSD, context, pages, self._slots_now(layer.at)
            x_BSD, sent, probe_E, self._layers[layer.name] = run(*given)
            x_BSD = self._serve(layer, self._tokens_of(shape), x_BSD, sent, probe_E)
        end = self._program(_Key("end", shape))
        return end(self._top_state, x_BSD, rows)

    def _slots_now(self, at: int) -> jax.Array | None:
        """Where a layer's experts are, if routing is to prefer those that are there."""
        if not self._experts.config.bonus:
            return None
        return jax.device_put(self._experts.slots_of(at), self._here)

    def _serve(
        self, layer: _Layer, shape: Shape, x_BSD: jax.Array, sent: Any, probe_E: jax.Array | None
    ) -> jax.Array:
        """The host's turn, and the experts."""
        assert layer.at is not None
        experts_TK = sent[-1]
        for array in (experts_TK, probe_E):
            if array is not None:
                array.copy_to_host_async()
        chosen_TK = np.asarray(experts_TK)
        guess_E = None if probe_E is None else np.asarray(probe_E)
        need = self._experts.arrive(layer.at, chosen_TK, guess_E)
        if need.fits and not self._by_copy:
            weights, slot_E = self._experts.into_slots(need)
            run = self._program(_Key("serve", shape, layer.kind))
            return run(layer.state, weights, x_BSD, sent, slot_E)
        y_ND = self._program(_Key("nothing", shape, layer.kind))()
        for wave in self._experts.waves(need, alike=self._alike(self._kinds[layer.kind])):
            run = self._program(_Key("held" if wave.stacked else "streamed", shape, layer.kind))
            y_ND = run(layer.state, wave.weights, sent, wave.slot_E, y_ND)
            wave.done = y_ND
        finish = self._program(_Key("finish", shape, layer.kind))
        return finish(layer.state, x_BSD, sent, y_ND)

    def _lower_model(self, key: _Key) -> jax.stages.Lowered:
        shape, halves = key.shape, self._halves
        rows = self._packed_rows(shape.rows, COLUMNS)
        dtype = halves.dtype

        def of(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=self._here)

        width, columns = self._blueprint.config.d_model, shape.tokens or 1
        tokens = shape.rows * columns
        x_BSD = of(shape.rows, columns, width, dtype=dtype)
        if key.part == "begin":
            where = self._packed_rows(shape.rows, shape.pages + shape.tokens)
            run = self._jit(partial(halves.begin, shape))
            return run.lower(self._top_state, self._history_RM, rows, where)
        if key.part == "end":
            return self._jit(halves.end).lower(self._top_state, x_BSD, rows)
        kind = self._kinds[key.kind]
        layer = next(one for one in self._model_layers if one.kind == key.kind)
        if key.part in ("dense", "attend"):
            context = {
                "positions_BS": of(shape.rows, columns),
                "mask_BS": of(shape.rows, columns, dtype=jnp.bool_),
                "tables_BN": of(shape.rows, shape.pages),
                "lengths_B": None if shape.begins else of(shape.rows),
            }
            pages = self._layers[layer.name]
            if key.part == "dense":
                run = self._jit(partial(halves.dense, kind), (1, 3))
                return run.lower(layer.state, x_BSD, context, pages)
            assert layer.at is not None
            bonus = self._experts.config.bonus
            run = self._jit(partial(halves.attend, kind, bonus), (2, 4))
            slots = self._slots_now(layer.at)
            return run.lower(layer.state, layer.probe, x_BSD, context, pages, slots)
        assert kind.bank is not None
        copies_ND = of(tokens * kind.top_k, width, dtype=jnp.float32)
        if key.part == "nothing":
            return self._jit(partial(jnp.zeros, copies_ND.shape, copies_ND.dtype)).lower()
        scores_TK = of(tokens, kind.top_k, dtype=jnp.float32)
        sent = of(tokens, width, dtype=dtype), scores_TK, of(tokens, kind.top_k)
        slot_E = of(kind.bank.experts)

        def bank(*lead: int) -> tuple[jax.ShapeDtypeStruct, ...]:
            assert kind.bank is not None
            return tuple(of(*lead, *s.shape, dtype=s.dtype) for s in kind.bank.shapes)

        match key.part:
            case "serve":
                run = self._jit(partial(halves.serve, kind), (2,))
                return run.lower(layer.state, bank(kind.slots), x_BSD, sent, slot_E)
            case "held":
                run = self._jit(partial(halves.wave, kind, kind.slots))
                return run.lower(layer.state, bank(kind.slots), sent, slot_E, copies_ND)
            case "streamed":
                run = self._jit(partial(halves.streamed, kind))
                weights = (bank(),) * kind.wave
                return run.lower(layer.state, weights, sent, slot_E, copies_ND)
        run = self._jit(partial(halves.finish, kind), (1,))
        return run.lower(layer.state, x_BSD, sent, copies_ND)

    def _jit(self, function: Any, donated: tuple[int, ...] = ()) -> Any:
        return jax.jit(self._mapped(function, P(), P()), donate_argnums=donated)
