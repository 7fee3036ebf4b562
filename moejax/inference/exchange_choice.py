"""How rows travel between devices in decoding steps: measured, with the model's own weights.

A decoding step has one token a text, so few rows on each device, and what counts is how long an
exchange takes to begin: bytes, by which `moejax.exchange.budget` chooses, say nothing about that.
Each of `ONE_WAVE` gives every row room, whatever the routing: devices need not agree on a number of
waves, and no loop waits for it. With few rows that room costs next to nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, cast, get_args

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import exchange
from moejax.config import ExchangeConfig, MoEConfig
from moejax.errors import UserError
from moejax.inference.compiling import compile_together
from moejax.layer import MoELayer
from moejax.placement.arrays import Placement
from moejax.training.state import Blueprint
from pallas_kernels.exchange import push
from sharding.mesh import TOKEN_AXES
from sharding.specs import specs_of

__all__ = [
    "ONE_WAVE",
    "UNMEASURED",
    "DecodeExchange",
    "Picked",
    "Timer",
    "median_seconds",
    "pick",
    "with_exchange",
]

DecodeExchange = Literal["auto", "config", "ring", "all_to_all", "remote"]
OneWave = Literal["ring", "all_to_all", "remote"]
ONE_WAVE: tuple[str, ...] = get_args(OneWave)
UNMEASURED: OneWave = "ring"  # the fewest operations of ours between two collectives

_CANDIDATES = (*ONE_WAVE, "config")
_NEAR = 0.03  # a candidate this much slower than the best may win: the first of those does
_LAYERS = 16  # that one program runs, so that starting it matters little
_ROUNDS = 2
_CALLS = 5
_CALL_SECONDS = 0.2  # after so many no further call

Timer = Callable[[str, int, Callable[[], Any]], float]
"""(exchange, rows of a device, what runs it and waits for its end) → seconds of a call."""


@dataclass(frozen=True)
class Picked:
    """A choice, and what it follows from.

    exchanges: for each number of rows of a device.
    seconds: of one layer of experts, for those numbers of rows that were measured; `config` is
        missing where it is the same as another.
    left_out: why the others were not measured.
    """

    exchanges: Mapping[int, str]
    seconds: Mapping[int, Mapping[str, float]]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        runs: list[tuple[str, int]] = []
        for rows, name in sorted(self.exchanges.items()):
            if not runs or runs[-1][0] != name:
                runs.append((name, rows))
        chosen = ", ".join(f"{name} from {rows} rows a device on" for name, rows in runs)
        if len(runs) == 1:
            chosen = runs[0][0]
        times = "; ".join(
            f"{rows} rows: " + ", ".join(f"{name} {1e3 * s:.3f}" for name, s in found.items())
            for rows, found in sorted(self.seconds.items())
        )
        without = "".join(f"; without {name}: {why}" for name, why in self.left_out.items())
        return f"decoding exchanges rows by {chosen} (ms a layer, {times}{without})"


def with_exchange(blueprint: Blueprint, name: str) -> Blueprint:
    """The same model with another exchange; it takes the same weights.

    Args:
        blueprint: model and mesh.
        name: one of `ONE_WAVE`, or `config`, which changes nothing.
    """
    if name == "config":
        return blueprint
    model: Any = blueprint.merge(blueprint.params, blueprint.biases)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MoELayer):
            module.config = _one_wave(module.config, name)
    return blueprint.around(model)


def _one_wave(config: MoEConfig, name: str) -> MoEConfig:
    """A layer whose exchange has room for all rows in one wave."""
    if name == "config":
        return config
    mode = cast(OneWave, name)
    changes: dict[str, Any] = {"bucket_rows": None, "bucket_slack": math.inf, "chunks": 1}
    changed: ExchangeConfig = replace(config.exchange, mode=mode, **changes)
    return replace(config, exchange=changed)


def median_seconds(name: str, rows: int, call: Callable[[], Any]) -> float:
    """The median of a few calls, after one that is not counted; a `Timer`."""
    del name, rows
    call()
    times: list[float] = []
    while len(times) < _CALLS and sum(times) < _CALL_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def pick(
    blueprint: Blueprint,
    weights: tuple[nnx.State, nnx.State],
    rows: Iterable[int],
    how: DecodeExchange = "auto",
    *,
    timer: Timer = median_seconds,
    seconds: float = 10.0,
    placement: Placement | None = None,
) -> Picked | None:
    """Chooses the exchange of decoding steps.

    Of the numbers of rows the least and the largest are measured; between two whose winners differ
    the one in the middle, too, as long as there is time. Others take what the nearest one has.

    Args:
        blueprint: model and mesh.
        weights: of the model, split by their use.
        rows: of a device, that decoding steps may have.
        how: `auto` measures; anything else is taken as it is.
        timer: measures a candidate; tests bring their own.
        seconds: after these only what has to be is measured.
        placement: of experts in slots, [L, …] on the mesh's devices; None: they are at home.

    Returns:
        None where there is nothing to choose: no experts, or one device along `expert`.

    Raises:
        UserError: what is asked for cannot run here; `auto` with several processes.
    """
    counts = sorted(set(rows))
    devices, slots = blueprint.shape.expert, _slots(blueprint, placement)
    if devices == 1 or all(group.layer.moe is None for group in blueprint.groups):
        return None
    if how != "auto":
        for count in counts:
            config = _one_wave(blueprint.config.moe, how)
            exchange.choose_for(config, tokens=count, devices=devices, slots=slots)
        return Picked(dict.fromkeys(counts, how), {}, {})
    if jax.process_count() > 1:
        raise UserError(
            f"--decode-exchange auto with {jax.process_count()} processes: each would choose for "
            f"itself; name one, such as {UNMEASURED}"
        )
    measurement = _Measurement(blueprint, weights, timer, placement)
    return measurement.pick(counts, time.monotonic() + seconds)


def _slots(blueprint: Blueprint, placement: Placement | None) -> int | None:
    """Of a device; None: as many as are needed at home."""
    if placement is None:
        return None
    return placement.slot_expert_P.shape[-1] // blueprint.shape.expert


class _Measurement:
    def __init__(
        self,
        blueprint: Blueprint,
        weights: tuple[Any, Any],
        timer: Timer,
        placement: Placement | None,
    ):
        self._blueprint, self._timer = blueprint, timer
        self._slots = _slots(blueprint, placement)
        first = jax.tree.map(lambda a: np.asarray(a)[0], placement)  # the group's, too
        self._placement = jax.device_put(first, NamedSharding(blueprint.mesh, P()))
        group = next(group for group in blueprint.groups if group.layer.moe is not None)
        self._group, self._scanned = group, group.scanned
        self._states = tuple(_of_layer(state, group.name) for state in weights)
        like = blueprint.params, blueprint.biases
        self._specs = tuple(specs_of(_of_layer(state, group.name)) for state in like)
        self._rows = NamedSharding(blueprint.mesh, P(TOKEN_AXES, None))
        self._seconds: dict[int, dict[str, float]] = {}
        self._left_out: dict[str, str] = {}
        if why := push.refusal("mosaic_gpu"):
            self._left_out["remote"] = f"its rows would go by XLA's all-to-all ({why})"

    def pick(self, counts: Sequence[int], end: float) -> Picked:
        self._measure([counts[0], counts[-1]])
        spans = [(0, len(counts) - 1)]
        while spans and time.monotonic() < end:
            low, high = spans.pop(0)
            if high - low > 1 and self._best(counts[low]) != self._best(counts[high]):
                middle = (low + high) // 2
                self._measure([counts[middle]])
                spans += [(low, middle), (middle, high)]
        known = [i for i, count in enumerate(counts) if count in self._seconds]
        exchanges = {}
        for i, count in enumerate(counts):
            nearest = min(known, key=lambda other: abs(other - i))
            exchanges[count] = self._best(counts[nearest])
        return Picked(exchanges, self._seconds, self._left_out)

    def _best(self, rows: int) -> str:
        found = {n: s for n, s in self._seconds[rows].items() if n not in self._left_out}
        if not found:
            return "config"  # and its step tells what is wrong
        limit = min(found.values()) * (1 + _NEAR)
        return next(name for name in _CANDIDATES if found.get(name, math.inf) <= limit)

    def _measure(self, counts: Iterable[int]) -> None:
        """Measures the candidates for these numbers of rows."""
        lowered: dict[tuple[int, str], Any] = {}
        for rows in dict.fromkeys(counts):
            self._seconds[rows] = {}
            for name in self._different(rows):
                with self._leaving_out(name):
                    lowered[rows, name] = self._lower(name, rows)
        futures, programs = dict(compile_together(lowered.items())), {}
        for key in lowered:
            with self._leaving_out(key[1]):
                programs[key] = futures[key].result()
        # More than once: the clocks of a device that had nothing to do rise first.
        for _ in range(_ROUNDS):
            for (rows, name), program in programs.items():
                if name not in self._left_out:
                    with self._leaving_out(name):
                        self._time(name, rows, program)

    @contextlib.contextmanager
    def _leaving_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except (NotImplementedError, UserError, jax.errors.JaxRuntimeError) as why:
            self._left_out[name] = " ".join(str(why).split())[:200]

    def _time(self, name: str, rows: int, program: Any) -> None:
        x_TD = self._tokens(rows)

        def call() -> None:
            jax.block_until_ready(program(self._states, x_TD, self._placement))

        seconds, found = self._timer(name, rows, call) / _LAYERS, self._seconds[rows]
        found[name] = min(seconds, found.get(name, math.inf))

    def _different(self, rows: int) -> list[str]:
        """The candidates without those that are the same as an earlier one."""
        found: dict[Any, str] = {}
        for name in _CANDIDATES:
            if name in self._left_out:
                continue
            budget: Any = name
            config, devices = self._blueprint.config.moe, self._blueprint.shape.expert
            try:
                budget = exchange.choose_for(
                    _one_wave(config, name), tokens=rows, devices=devices, slots=self._slots
                )
                budget = replace(budget, reason="")
            except UserError as why:
                self._left_out[name] = str(why)
                continue
            found.setdefault(budget, name)
        return list(found.values())

    def _tokens(self, rows: int) -> jax.Array:
        config, shape = self._blueprint.config, self._blueprint.shape
        size = rows * shape.data * shape.expert, config.d_model
        x_TD = np.random.default_rng(0).normal(size=size).astype(np.float32)
        return jax.device_put(x_TD.astype(jnp.dtype(config.compute_dtype)), self._rows)

    def _lower(self, name: str, rows: int) -> Any:
        variant = with_exchange(self._blueprint, name)
        model: Any = variant.merge(variant.params, variant.biases)
        graph, _ = nnx.split(model.layers[self._group.name].moe)

        def run(states: tuple[Any, Any], x_TD: jax.Array, placement: Any) -> jax.Array:
            if self._scanned:
                states = jax.tree.map(lambda stacked: stacked[0], states)

            def layer(_: Any, x_TD: jax.Array) -> jax.Array:
                y_TD, _ = nnx.merge(graph, *states)(x_TD, placement)
                y_TD = x_TD.astype(jnp.float32) + y_TD.astype(jnp.float32)
                size_T1 = lax.rsqrt(jnp.mean(y_TD**2, axis=1, keepdims=True) + 1e-6)
                return (y_TD * size_T1).astype(x_TD.dtype)

            return lax.fori_loop(0, _LAYERS, layer, x_TD)

        rows_spec = self._rows.spec
        specs: Any = {"in_specs": (self._specs, rows_spec, P()), "out_specs": rows_spec}
        mapped = jax.shard_map(run, mesh=self._blueprint.mesh, check_vma=False, **specs)
        return jax.jit(mapped).lower(self._states, self._tokens(rows), self._placement)


def _of_layer(state: nnx.State, group: str) -> nnx.State:
    """What belongs to the experts of a layer, or of several stacked ones."""
    place = ("layers", group, "moe")
    return nnx.from_flat_state(
        [(path[3:], v) for path, v in nnx.to_flat_state(state) if path[:3] == place]
    )
