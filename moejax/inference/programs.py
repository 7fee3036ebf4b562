"""The compiled steps: pieces of prompts and single tokens, over the pages of all devices.

Shape letters: B rows (of all devices outside the shard_map, of this one inside), S tokens of a
row, N pages of its table, M tokens that a slot's history holds, V vocabulary, W and F columns of
packed rows.

A step is two programs: the model's, one for each `Shape`, and one that draws tokens. Steps that
decode may exchange the rows of experts in their own way, for each number of rows
(`exchange_choice`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.inference import exchange_choice
from moejax.inference.exchange_choice import DecodeExchange, Picked, Timer
from moejax.inference.placing import ServingPlacement
from moejax.inference.shapes import Shape
from moejax.inference.step_programs import StepPrograms
from moejax.inference.step_rows import COLUMNS, pages_and_tokens, rows_of, step_tokens
from moejax.model.cache import KVCache, LayerCache, page_specs
from moejax.placement import counting
from moejax.training.state import Blueprint
from sharding.collectives import all_gather
from sharding.mesh import TENSOR
from sharding.specs import specs_of

__all__ = ["Programs"]


@dataclass(frozen=True)
class _Forward:
    """A program of the model: for a shape, with an exchange of `exchange_choice`."""

    shape: Shape
    exchange: str


class Programs(StepPrograms):
    """The model with its pages on the mesh, and the steps over them.

    Args:
        blueprint: model and mesh.
        params: weights split by their use, as from `load_weights`.
        biases: selection biases, likewise.
        one_wave: no exchange may need a further wave: a row's sums would have another order then,
            and its bits depend on the other rows.
        placing: holds the weights, if experts lie in slots; `params` is not looked at then.
        sizes: num_ids, slots, pages, page_len and max_len, see `StepPrograms`.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        params: Any,
        biases: Any,
        *,
        one_wave: bool = False,
        placing: ServingPlacement | None = None,
        **sizes: int,
    ):
        super().__init__(blueprint, **sizes)
        self._prompts: str = exchange_choice.UNMEASURED if one_wave else "config"
        names: dict[str, None] = dict.fromkeys(["config", self._prompts])
        self._variants = {n: exchange_choice.with_exchange(blueprint, n) for n in names}
        self._exchanges: Mapping[int, str] = {}
        self._params = params if placing is None else None
        self._biases, self._placing = biases, placing
        weight_specs: Any = (specs_of(blueprint.params), blueprint.bias_specs)
        layer_specs: Any = page_specs(blueprint.config)
        by_row, counted = self._rows.spec, counting.COUNTERS_SPEC
        arrays = (weight_specs, layer_specs, by_row, by_row, by_row, P(), counted)

        def step(*state: Any, key: _Forward) -> Any:
            run = self._mapped(partial(self._step, key), arrays, (layer_specs, by_row, counted))
            return run(*state)

        self._jitted_step = jax.jit(step, donate_argnums=(1, 6), static_argnames="key")

    def reset(self) -> None:
        """Empties the pages; programs stay, and experts where they are."""
        if self._placing is not None:
            self._placing.reset()
        super().reset()

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

    def _keys(self, shape: Shape) -> list[_Forward]:
        return [self._forward(shape)]

    def _forward(self, shape: Shape) -> _Forward:
        prompts = self._prompts
        exchange = prompts if shape.tokens else self._exchanges.get(shape.rows, prompts)
        return _Forward(shape, exchange)

    def _lower_model(self, key: _Forward) -> jax.stages.Lowered:
        shape = key.shape
        rows = self._packed_rows(shape.rows, COLUMNS)
        where = self._packed_rows(shape.rows, shape.pages + shape.tokens)
        state = self._weights, self._layers, self._history_RM
        return self._jitted_step.lower(*state, rows, where, *self._placed, key=key)

    def _logits(self, shape: Shape, rows: jax.Array, where: jax.Array) -> jax.Array:
        step = self._program(self._forward(shape))
        state = self._weights, self._layers, self._history_RM
        self._layers, logits, counters = step(*state, rows, where, *self._placed)
        if self._placing is not None:
            self._placing.counted(counters)
        return logits

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
        count_B, length_B, _ = rows_of(rows_BF)
        table_BN, tokens_BS = pages_and_tokens(where_BW, key.shape)
        tokens_BS = step_tokens(tokens_BS, history_RM, rows_BF)
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
