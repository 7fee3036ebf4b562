"""The compiled steps of a model whose experts lie on the host: a loop over layers, driven from it.

A layer with experts is a program that attends and routes, the host's turn, and a program that
computes the experts and adds them to the residual. Where all experts that a step can need fit the
slots, the latter attends and routes in the next layer, too, and may begin before the host knows
what was chosen. Equal layers have the same programs: weights are
arguments, and where experts are is data, so nothing compiles anew when that changes.

Where all experts that a step needs fit the slots, the second program is the resident layer's
arithmetic over other slots. Where they do not, each copy of a token is a row of its own, a wave
fills those rows whose experts it has, and a last program adds up each token's copies in float32, in
the order of its choice: so the sum depends neither on the waves nor on what the slots held.

Shape letters: B rows, S tokens of a row, T = B · S, K experts of a token, N = T · K copies, D model
width, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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
from moejax.offload.halves import Halves, Kind, Sent
from moejax.offload.layers import HostedLayer, split_layers
from moejax.offload.parts import Structure
from moejax.offload.statistics import OffloadStats
from moejax.offload.store import Expert
from moejax.training.state import Blueprint

__all__ = ["OffloadedPrograms"]


@dataclass(frozen=True)
class _Key:
    """A program: what it does, of layers of which kind, and for which sizes.

    after: of `serve_attend`, the kind of the second of two layers.
    """

    part: str
    shape: Shape
    kind: int = -1
    after: int = -1


class _Routed(NamedTuple):
    """What the first half of a layer with experts leaves.

    x_BSD: the residual behind the attention.
    sent: see `halves`.
    probe_E: a guess for the next layer, if there is one.
    """

    x_BSD: jax.Array
    sent: Sent
    probe_E: jax.Array | None


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
        split = split_layers(model, blueprint.groups, experts, self._here)
        self._model_layers, self._kinds = split
        model.layers = nnx.Dict({})
        structure, self._rest = Structure.of(model)
        self._halves = Halves(structure, jnp.dtype(blueprint.config.compute_dtype))

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

    def _keys(self, shape: Shape) -> Iterator[_Key]:
        yield _Key("begin", shape)
        yield _Key("end", shape)
        before = None
        for layer, after in self._pairs():
            kind, number = self._kinds[layer.kind], layer.kind
            if kind.bank is None:
                yield _Key("dense", shape, number)
                before = layer
                continue
            if before is None or not self._joined(shape, before, layer):
                yield _Key("attend", shape, number)
            before = layer
            if self._joined(shape, layer, after):
                assert after is not None
                yield _Key("serve_attend", shape, number, after.kind)
                continue
            fit = self._all_fit(shape, kind)
            parts = [] if self._by_copy else ["serve"]
            if self._by_copy or not fit:
                parts += ["nothing", "streamed", "finish"]
            if not fit and not self._alike(kind):
                parts.append("held")
            yield from (_Key(part, self._tokens_of(shape), number) for part in parts)

    def _pairs(self) -> Iterator[tuple[HostedLayer, HostedLayer | None]]:
        """Each layer and the one after it."""
        return itertools.zip_longest(self._model_layers, self._model_layers[1:])

    def _all_fit(self, shape: Shape, kind: Kind) -> bool:
        """Whether all experts that a step can need fit the slots of a layer."""
        assert kind.bank is not None
        return min(shape.rows * (shape.tokens or 1) * kind.top_k, kind.bank.experts) <= kind.slots

    def _joined(self, shape: Shape, layer: HostedLayer, after: HostedLayer | None) -> bool:
        """Whether a layer's second half and the next one's first are one program."""
        if layer.at is None or after is None or after.at is None or self._by_copy:
            return False
        return self._all_fit(shape, self._kinds[layer.kind])

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
        x_BSD, context = begin(self._rest, self._history_RM, rows, where)
        routed: _Routed | None = None  # what the program before has done of a layer already
        for layer, after in self._pairs():
            if layer.at is None:
                run = self._program(_Key("dense", shape, layer.kind))
                pages = self._layers[layer.name]
                x_BSD, self._layers[layer.name] = run(layer.weights, x_BSD, context, pages)
                continue
            if routed is None:
                run = self._program(_Key("attend", shape, layer.kind))
                x_BSD, sent, probe_E, self._layers[layer.name] = run(
                    *self._to_attend(layer), x_BSD, *self._behind(layer, context)
                )
                routed = _Routed(x_BSD, sent, probe_E)
            x_BSD, routed = self._serve(layer, after, shape, routed, context)
        end = self._program(_Key("end", shape))
        return end(self._rest, x_BSD, rows)

    def _to_attend(self, layer: HostedLayer) -> tuple[Any, ...]:
        """What the first half of a layer is given before the residual."""
        return layer.weights, layer.probe

    def _behind(self, layer: HostedLayer, context: Any) -> tuple[Any, ...]:
        """What it is given behind the residual: the last is where experts are, if it may know."""
        assert layer.at is not None
        slot_E = self._experts.in_slots(layer.at)[1] if self._experts.config.bonus else None
        return context, self._layers[layer.name], slot_E

    def _serve(
        self,
        layer: HostedLayer,
        after: HostedLayer | None,
        shape: Shape,
        routed: _Routed,
        context: Any,
    ) -> tuple[jax.Array, _Routed | None]:
        """The host's turn, and the experts; of the next layer, too, what goes with them.

        Where nothing is likely to be missing, the device goes on with what the slots hold while the
        host is told of the choice, and does it once more if something was: the program writes the
        same pages again. So the way to the host and back takes no time where nothing is missing.
        """
        assert layer.at is not None
        experts, done = self._experts, None
        for array in (routed.sent[-1], routed.probe_E):
            if array is not None:
                array.copy_to_host_async()
        every = not self._by_copy and self._all_fit(shape, self._kinds[layer.kind])
        if every and experts.likely_whole(layer.at):
            given = experts.in_slots(layer.at)
            done = self._go_on(layer, after, shape, routed, context, *given)
        chosen_TK = np.asarray(routed.sent[-1])
        guess_E = None if routed.probe_E is None else np.asarray(routed.probe_E)
        need = experts.arrive(layer.at, chosen_TK, guess_E)
        if need.fits and not self._by_copy:
            given = experts.into_slots(need)
            if done is None or need.missing:
                done = self._go_on(layer, after, shape, routed, context, *given)
            experts.settle(need)
            return done
        shape = self._tokens_of(shape)
        y_ND = self._program(_Key("nothing", shape, layer.kind))()
        for wave in experts.waves(need, alike=self._alike(self._kinds[layer.kind])):
            run = self._program(_Key("held" if wave.stacked else "streamed", shape, layer.kind))
            y_ND = run(layer.weights, wave.weights, routed.sent, wave.slot_E, y_ND)
            wave.done = y_ND
        finish = self._program(_Key("finish", shape, layer.kind))
        return finish(layer.weights, routed.x_BSD, routed.sent, y_ND), None

    def _go_on(
        self,
        layer: HostedLayer,
        after: HostedLayer | None,
        shape: Shape,
        routed: _Routed,
        context: Any,
        weights: Expert,
        slot_E: jax.Array,
    ) -> tuple[jax.Array, _Routed | None]:
        """A layer's experts over its slots, and as much of the next layer as goes with them."""
        given = layer.weights, weights, routed.x_BSD, routed.sent, slot_E
        if not self._joined(shape, layer, after):
            run = self._program(_Key("serve", self._tokens_of(shape), layer.kind))
            return run(*given), None
        assert after is not None
        run = self._program(_Key("serve_attend", shape, layer.kind, after.kind))
        x_BSD, sent, probe_E, self._layers[after.name] = run(
            *given, *self._to_attend(after), *self._behind(after, context)
        )
        return x_BSD, _Routed(x_BSD, sent, probe_E)

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
            return run.lower(self._rest, self._history_RM, rows, where)
        if key.part == "end":
            return self._jit(halves.end).lower(self._rest, x_BSD, rows)
        kind = self._kinds[key.kind]
        layer = next(one for one in self._model_layers if one.kind == key.kind)
        context = {
            "positions_BS": of(shape.rows, columns),
            "mask_BS": of(shape.rows, columns, dtype=jnp.bool_),
            "tables_BN": of(shape.rows, shape.pages),
            "lengths_B": None if shape.begins else of(shape.rows),
        }
        if key.part == "dense":
            run = self._jit(partial(halves.dense, kind), (1, 3))
            return run.lower(layer.weights, x_BSD, context, self._layers[layer.name])
        bonus = self._experts.config.bonus
        if key.part == "attend":
            run = self._jit(partial(halves.attend, kind, bonus), (2, 4))
            return run.lower(*self._to_attend(layer), x_BSD, *self._behind(layer, context))
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
            case "serve_attend":
                after = next(one for one in self._model_layers if one.kind == key.after)
                both = kind, self._kinds[key.after], bonus
                run = self._jit(partial(halves.serve_attend, *both), (8,))
                given = layer.weights, bank(kind.slots), x_BSD, sent, slot_E
                rest = self._behind(after, context)
                return run.lower(*given, *self._to_attend(after), *rest)
            case "serve":
                run = self._jit(partial(halves.serve, kind))
                return run.lower(layer.weights, bank(kind.slots), x_BSD, sent, slot_E)
            case "held":
                run = self._jit(partial(halves.wave, kind, kind.slots))
                return run.lower(layer.weights, bank(kind.slots), sent, slot_E, copies_ND)
            case "streamed":
                run = self._jit(partial(halves.streamed, kind))
                weights = (bank(),) * kind.wave
                return run.lower(layer.weights, weights, sent, slot_E, copies_ND)
        run = self._jit(partial(halves.finish, kind), (1,))
        return run.lower(layer.weights, x_BSD, sent, copies_ND)

    def _jit(self, function: Any, donated: tuple[int, ...] = ()) -> Any:
        return jax.jit(self._mapped(function, P(), P()), donate_argnums=donated)
