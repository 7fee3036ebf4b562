"""The compiled steps: pieces of prompts and single tokens, over the pages of all devices.

Shape letters: B rows (of all devices outside the shard_map, of this one inside), S tokens of a
row, N pages of its table, M tokens that a slot's history holds, V vocabulary, W and F columns of
packed rows.

A step is two programs, the model's, one for each `Shape`, and one that draws tokens, for each
number of rows and `Level`. Steps that decode may exchange the rows of experts in their own way, for
each number of rows (`exchange_choice`). What the host says of the rows travels as two int32 arrays,
what the devices answer as one: a transfer for each small array would take longer than a small step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.inference import exchange_choice
from moejax.inference.compiling import compile_together
from moejax.inference.drawing import Drawn, Level, choose
from moejax.inference.exchange_choice import DecodeExchange, Picked, Timer
from moejax.inference.params import MAX_LOGPROBS
from moejax.inference.placing import ServingPlacement
from moejax.inference.scheduler import Plan
from moejax.inference.shapes import Shape
from moejax.inference.step_rows import COLUMNS, choices_of, pages_and_tokens, rows_of, write_rows
from moejax.inference.texts import Text
from moejax.model.cache import KVCache, LayerCache, init_pages, page_specs
from moejax.placement import counting
from moejax.training.state import Blueprint
from sharding.collectives import all_gather
from sharding.mesh import TENSOR, TOKEN_AXES, in_turn
from sharding.specs import specs_of

__all__ = ["Programs"]


@dataclass(frozen=True)
class _Forward:
    """A program of the model: for a shape, with an exchange of `exchange_choice`."""

    shape: Shape
    exchange: str

    @property
    def rows(self) -> int:
        return self.shape.rows


@dataclass(frozen=True)
class _Drawing:
    """A program that draws: for so many rows of each device, which may ask for so much."""

    rows: int
    level: Level


class Programs:
    """The model with its pages on the mesh, and the steps over them.

    Args:
        blueprint: model and mesh.
        params: weights split by their use, as from `load_weights`.
        biases: selection biases, likewise.
        num_ids: ids from here on are never chosen.
        slots: texts of each device.
        pages: of each device.
        page_len: positions of a page.
        max_len: most tokens of a text.
        one_wave: no exchange may need a further wave: a row's sums would have another order then,
            and its bits depend on the other rows.
        placing: holds the weights, if experts lie in slots; `params` is not looked at then.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        params: Any,
        biases: Any,
        *,
        num_ids: int,
        slots: int,
        pages: int,
        page_len: int,
        max_len: int,
        one_wave: bool = False,
        placing: ServingPlacement | None = None,
    ):
        config, mesh = blueprint.config, blueprint.mesh
        self._blueprint = blueprint
        self._prompts: str = exchange_choice.UNMEASURED if one_wave else "config"
        names: dict[str, None] = dict.fromkeys(["config", self._prompts])
        self._variants = {n: exchange_choice.with_exchange(blueprint, n) for n in names}
        self._exchanges: Mapping[int, str] = {}
        self._params = params if placing is None else None
        self._biases, self._placing = biases, placing
        self._num_ids = num_ids
        self._slots = slots
        self._devices = blueprint.shape.data * blueprint.shape.expert
        self._top = min(MAX_LOGPROBS, config.padded_vocab)
        by_row = P(TOKEN_AXES, None)
        self._rows = NamedSharding(mesh, by_row)
        total = self._devices * pages

        def fresh() -> tuple[dict[str, LayerCache], jax.Array]:
            dtype = jnp.dtype(config.compute_dtype)
            layers = init_pages(config, total, page_len, dtype, mesh)
            # One more than a text may have: its last token is written as well.
            shape = (slots * self._devices, max_len + 1)
            return layers, jnp.zeros(shape, jnp.int32, device=self._rows)

        self._fresh = fresh
        # What stays on the devices: the pages; the tokens of the text in each slot, those drawn
        # and, of texts with penalties, the prompt, too.
        self._layers, self._history_RM = fresh()
        weight_specs: Any = (specs_of(blueprint.params), blueprint.bias_specs)
        layer_specs: Any = page_specs(config)

        def mapped(function: Any, in_specs: Any, out_specs: Any) -> Any:
            specs: Any = {"in_specs": in_specs, "out_specs": out_specs}
            return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)

        def step(
            weights: Any,
            layers: Any,
            history: Any,
            rows: Any,
            where: Any,
            placement: Any,
            counters: Any,
            key: _Forward,
        ) -> Any:
            counted = counting.COUNTERS_SPEC
            arrays = (weight_specs, layer_specs, by_row, by_row, by_row, P(), counted)
            run = mapped(partial(self._step, key), arrays, (layer_specs, by_row, counted))
            return run(weights, layers, history, rows, where, placement, counters)

        def draw(logits: Any, history: Any, rows: Any, level: Level) -> Any:
            run = mapped(partial(self._draw, level), (by_row,) * 3, (by_row, P()))
            return run(logits, history, rows)

        # Compiled by hand, so that a shape is known to be compiled once and for all.
        self._jitted_step = jax.jit(step, donate_argnums=(1, 6), static_argnames="key")
        self._jitted_draw = jax.jit(draw, donate_argnums=1, static_argnames="level")
        self._compiled: dict[_Forward | _Drawing, jax.stages.Compiled] = {}

        def remember(history_RM: jax.Array, slots_B: jax.Array, tokens_BM: jax.Array) -> jax.Array:
            return history_RM.at[slots_B].set(tokens_BM, mode="drop")

        remember = mapped(remember, (by_row, P(TOKEN_AXES), by_row), by_row)
        jitted = jax.jit(remember, donate_argnums=0)
        self._remember = jitted.lower(self._history_RM, *self._history({})).compile()

    def reset(self) -> None:
        """Empties the pages; programs stay, and experts where they are."""
        if self._placing is not None:
            self._placing.reset()
        del self._layers, self._history_RM  # room for the new ones
        self._layers, self._history_RM = self._fresh()

    def pick_exchange(
        self, rows: Iterable[int], how: DecodeExchange, timer: Timer | None = None
    ) -> Picked | None:
        """Chooses how decoding steps of so many rows exchange them; see `exchange_choice.pick`."""
        timer = timer or exchange_choice.median_seconds
        placement, _ = self._placed
        picked = exchange_choice.pick(
            self._blueprint, self._weights, rows, how, timer=timer, placement=placement
        )
        self._exchanges = {} if picked is None else picked.exchanges
        for name in {*self._exchanges.values()} - self._variants.keys():
            self._variants[name] = exchange_choice.with_exchange(self._blueprint, name)
        return picked

    @property
    def _weights(self) -> tuple[Any, Any]:
        return self._params if self._placing is None else self._placing.params, self._biases

    @property
    def _placed(self) -> tuple[Any, Any]:
        """Where experts are, and how often they were chosen; None for what nobody asks for."""
        placing = self._placing
        return (None, None) if placing is None else (placing.arrays, placing.counters)

    def compiled(self) -> int:
        """How many programs have been compiled."""
        return len(self._compiled)

    def run(self, plan: Plan) -> Drawn:
        """Starts a step; what it draws can be read when it has ended."""
        self._remember_prompts(plan)
        rows = write_rows(plan, self._devices, self._slots)
        return self._start(rows.rows_BF, rows.where_BW, plan.shape, rows.level)

    def compile_all(
        self,
        shapes: Sequence[Shape],
        report: Callable[[int, int], None] | None = None,
        levels: Iterable[Level] = tuple(Level),
    ) -> int:
        """Compiles the steps of these shapes, several at once; see `Engine.warm_up`."""
        wanted: list[_Forward | _Drawing] = [self._forward(shape) for shape in shapes]
        rows = sorted({shape.rows for shape in shapes})
        wanted += [_Drawing(n, level) for n in rows for level in levels]
        missing = [key for key in wanted if key not in self._compiled]
        lowered = ((key, self._lower(key)) for key in missing)
        for done, (key, program) in enumerate(compile_together(lowered), 1):
            self._compiled[key] = program.result()
            if report is not None:
                report(done, len(missing))
        return len(missing)

    def _forward(self, shape: Shape) -> _Forward:
        prompts = self._prompts
        exchange = prompts if shape.tokens else self._exchanges.get(shape.rows, prompts)
        return _Forward(shape, exchange)

    def _lower(self, key: _Forward | _Drawing) -> jax.stages.Lowered:
        def of(columns: int, dtype: Any) -> jax.ShapeDtypeStruct:
            shape = (self._devices * key.rows, columns)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)

        rows = of(COLUMNS, jnp.int32)
        if isinstance(key, _Drawing):
            logits = of(self._blueprint.config.padded_vocab, jnp.float32)
            return self._jitted_draw.lower(logits, self._history_RM, rows, level=key.level)
        state = self._weights, self._layers, self._history_RM
        where = of(key.shape.pages + key.shape.tokens, jnp.int32)
        return self._jitted_step.lower(*state, rows, where, *self._placed, key=key)

    def _program(self, key: _Forward | _Drawing) -> jax.stages.Compiled:
        if key not in self._compiled:
            self._compiled[key] = self._lower(key).compile()
        return self._compiled[key]

    def _start(
        self, rows_BF: np.ndarray, where_BW: np.ndarray, shape: Shape, level: Level
    ) -> Drawn:
        step = self._program(self._forward(shape))
        draw = self._program(_Drawing(shape.rows, level))
        rows, where = jax.device_put((rows_BF, where_BW), self._rows)
        state = self._weights, self._layers, self._history_RM
        self._layers, logits, counters = step(*state, rows, where, *self._placed)
        if self._placing is not None:
            self._placing.counted(counters)
        logits = in_turn(self._blueprint.mesh, logits)
        self._history_RM, drawn = draw(logits, self._history_RM, rows)
        drawn.copy_to_host_async()
        in_turn(self._blueprint.mesh, self._history_RM)
        return Drawn(drawn, self._top)

    def _remember_prompts(self, plan: Plan) -> None:
        """Writes the texts that penalties look at and that are new in their slots."""
        queues = [[w.text for w in works if w.first and w.text.penalized] for works in plan.rows]
        for i in range(max(map(len, queues))):
            texts = {device: queue[i] for device, queue in enumerate(queues) if i < len(queue)}
            self._history_RM = self._remember(self._history_RM, *self._history(texts))

    def _history(self, texts: dict[int, Text]) -> tuple[jax.Array, jax.Array]:
        """The slot and the tokens of a text on each device, laid over the mesh."""
        slots_B = np.full(self._devices, self._slots, np.int32)
        tokens_BM = np.zeros((self._devices, self._history_RM.shape[1]), np.int32)
        for device, text in texts.items():
            slots_B[device] = text.slot
            tokens_BM[device, : len(text.tokens)] = text.tokens
        by_device = NamedSharding(self._rows.mesh, P(TOKEN_AXES))
        return jax.device_put(slots_B, by_device), jax.device_put(tokens_BM, self._rows)

    def _step(
        self,
        key: _Forward,
        weights: Any,
        layers: dict[str, LayerCache],
        history_RM: jax.Array,
        rows_BF: jax.Array,
        where_BW: jax.Array,
        placement: Any = None,
        counters: counting.Counts | None = None,
    ) -> tuple[dict[str, LayerCache], jax.Array, counting.Counts | None]:
        """Appends tokens to each row; inside the shard_map. The pages, logits [B, V], counters."""
        count_B, length_B, slot_B = rows_of(rows_BF)
        table_BN, tokens_BS = pages_and_tokens(where_BW, key.shape)
        if tokens_BS is None:
            # The token drawn last, which the host may not know yet.
            at = history_RM.at[slot_B, length_B]
            tokens_BS = at.get(mode="fill", fill_value=0)[:, None]
        mask_BS = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32) < count_B[:, None]
        model = self._variants[key.exchange].merge(*weights)
        if counters is not None:
            model.report_experts(counting.sample_stride(tokens_BS.size, counting.STEP_TOKENS))
        out = model(
            tokens_BS,
            placement=placement,
            token_mask_BS=mask_BS,
            cache=KVCache(layers, None if key.shape.begins else length_B, table_BN),
            inference=True,
        )
        assert out.cache is not None
        if counters is not None:
            assert out.aux is not None and out.aux.experts_TK is not None
            experts = self._blueprint.config.moe.router.num_experts
            new = counting.count(out.aux.experts_TK, experts)
            counters = counting.add_step(counters, new, 1.0)
        last_B = jnp.maximum(count_B - 1, 0)
        hidden_BD = jnp.take_along_axis(out.hidden_BSD, last_B[:, None, None], axis=1)[:, 0]
        return out.cache.layers, all_gather(model.logits(hidden_BD), TENSOR, 1), counters

    def _draw(
        self, level: Level, logits_BV: jax.Array, history_RM: jax.Array, rows_BF: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Draws a token for each row; inside the shard_map. The histories, and `Drawn.packed`."""
        count_B, length_B, slot_B = rows_of(rows_BF)
        choice = choices_of(rows_BF)
        length_B = length_B + count_B
        token_B, drawn_BW = choose(
            level,
            logits_BV,
            length_B,
            slot_B,
            choice,
            history_RM,
            num_ids=self._num_ids,
            top=self._top,
        )
        history_RM = history_RM.at[slot_B, length_B].set(token_B, mode="drop")
        return history_RM, all_gather(drawn_BW, TOKEN_AXES)
