"""What all compiled steps have in common: rows from the host, the texts of slots, drawing tokens.

Shape letters: B rows (of all devices outside the shard_map, of this one inside), M tokens that a
slot's history holds, V vocabulary, W and F columns of packed rows.

A step is the model's programs, which end with logits, and one that draws tokens, for each number
of rows and `Level`. What the host says of the rows travels as two int32 arrays, what the devices
answer as one: a transfer for each small array would take longer than a small step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.inference.compiling import compile_together
from moejax.inference.drawing import Drawn, Level, choose
from moejax.inference.exchange_choice import DecodeExchange, Picked, Timer
from moejax.inference.params import MAX_LOGPROBS
from moejax.inference.scheduler import Plan
from moejax.inference.shapes import Shape
from moejax.inference.step_rows import COLUMNS, choices_of, rows_of, write_rows
from moejax.inference.texts import Text
from moejax.model.cache import LayerCache, init_pages
from moejax.training.state import Blueprint
from sharding.arrays import put
from sharding.collectives import all_gather
from sharding.mesh import TOKEN_AXES, in_turn

__all__ = ["StepPrograms"]


@dataclass(frozen=True)
class _Drawing:
    """A program that draws: for so many rows of each device, which may ask for so much."""

    rows: int
    level: Level


class StepPrograms(ABC):
    """The pages and texts on the mesh, and the steps over them; a subclass runs the model.

    Args:
        blueprint: model and mesh.
        num_ids: ids from here on are never chosen.
        slots: texts of each device.
        pages: of each device.
        page_len: positions of a page.
        max_len: most tokens of a text.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        *,
        num_ids: int,
        slots: int,
        pages: int,
        page_len: int,
        max_len: int,
    ):
        config, mesh = blueprint.config, blueprint.mesh
        self._blueprint = blueprint
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

        def draw(logits: Any, history: Any, rows: Any, level: Level) -> Any:
            run = self._mapped(partial(self._draw, level), (by_row,) * 3, (by_row, P()))
            return run(logits, history, rows)

        self._jitted_draw = jax.jit(draw, donate_argnums=1, static_argnames="level")
        # Compiled by hand, so that a shape is known to be compiled once and for all.
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}

        def remember(history_RM: jax.Array, slots_B: jax.Array, tokens_BM: jax.Array) -> jax.Array:
            return history_RM.at[slots_B].set(tokens_BM, mode="drop")

        remember = self._mapped(remember, (by_row, P(TOKEN_AXES), by_row), by_row)
        jitted = jax.jit(remember, donate_argnums=0)
        self._remember = jitted.lower(self._history_RM, *self._history({})).compile()

    @abstractmethod
    def pick_exchange(
        self, rows: Iterable[int], how: DecodeExchange, timer: Timer | None = None
    ) -> Picked | None:
        """Chooses how decoding steps of so many rows exchange them; see `exchange_choice.pick`."""

    @abstractmethod
    def _logits(self, shape: Shape, rows: jax.Array, where: jax.Array) -> jax.Array:
        """Runs the model: float32 [B, V] of the last token of each row."""

    @abstractmethod
    def _keys(self, shape: Shape) -> Iterable[Hashable]:
        """The programs of the model that a step of this shape may run."""

    @abstractmethod
    def _lower_model(self, key: Any) -> jax.stages.Lowered:
        """One of them."""

    def reset(self) -> None:
        """Empties the pages; programs stay, and experts where they are."""
        del self._layers, self._history_RM  # room for the new ones
        self._layers, self._history_RM = self._fresh()

    def compiled(self) -> int:
        """How many programs have been compiled."""
        return len(self._compiled)

    def run(self, plan: Plan) -> Drawn:
        """Starts a step; what it draws can be read when it has ended."""
        self._remember_prompts(plan)
        rows = write_rows(plan, self._devices, self._slots)
        return self._start(rows.rows_BF, rows.where_BW, plan.shape, rows.level)

    def _start(
        self, rows_BF: np.ndarray, where_BW: np.ndarray, shape: Shape, level: Level
    ) -> Drawn:
        draw = self._program(_Drawing(shape.rows, level))
        rows, where = put((rows_BF, where_BW), self._rows)
        logits = in_turn(self._blueprint.mesh, self._logits(shape, rows, where))
        self._history_RM, drawn = draw(logits, self._history_RM, rows)
        drawn.copy_to_host_async()
        in_turn(self._blueprint.mesh, self._history_RM)
        return Drawn(drawn, self._top)

    def compile_all(
        self,
        shapes: Sequence[Shape],
        report: Callable[[int, int], None] | None = None,
        levels: Iterable[Level] = tuple(Level),
    ) -> int:
        """Compiles the steps of these shapes, several at once; see `Engine.warm_up`."""
        wanted = [key for shape in shapes for key in self._keys(shape)]
        rows = sorted({shape.rows for shape in shapes})
        wanted += [_Drawing(n, level) for n in rows for level in levels]
        missing = [key for key in dict.fromkeys(wanted) if key not in self._compiled]
        lowered = ((key, self._lower(key)) for key in missing)
        for done, (key, program) in enumerate(compile_together(lowered), 1):
            self._compiled[key] = program.result()
            if report is not None:
                report(done, len(missing))
        return len(missing)

    def _mapped(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        specs: Any = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(function, mesh=self._blueprint.mesh, check_vma=False, **specs)

    def _packed_rows(self, rows: int, columns: int, dtype: Any = jnp.int32) -> Any:
        """The shape of an array with a row for each of the step's, of all devices."""
        shape = (self._devices * rows, columns)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)

    def _lower(self, key: Any) -> jax.stages.Lowered:
        if not isinstance(key, _Drawing):
            return self._lower_model(key)
        logits = self._packed_rows(key.rows, self._blueprint.config.padded_vocab, jnp.float32)
        rows = self._packed_rows(key.rows, COLUMNS)
        return self._jitted_draw.lower(logits, self._history_RM, rows, level=key.level)

    def _program(self, key: Hashable) -> jax.stages.Compiled:
        if key not in self._compiled:
            self._compiled[key] = self._lower(key).compile()
        return self._compiled[key]

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
        return put(slots_B, by_device), put(tokens_BM, self._rows)

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
