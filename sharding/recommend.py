"""Which mesh, microbatches, recomputation and chunks suit a run on so many devices.

Every layout is predicted by closed formulas (`sharding.step_time`), which take milliseconds. Only
the fastest are traced (`sharding.planner`), one after the other, until enough of them fit the
device's memory: a tracing takes seconds, and more the more layers are not scanned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moejax.errors import UserError
from moejax.model.attention import choose_attention
from moejax.model.decoder import check_mesh
from moejax.training.config import TrainConfig
from moejax.training.residuals import reducer_of
from moejax.training.state import Blueprint
from sharding.device_kinds import Hardware
from sharding.layout import REMATS, Layout
from sharding.local_weights import weights_of
from sharding.memory import Memory, least_activations, memory_of
from sharding.mesh import AXES, MeshShape, abstract_mesh
from sharding.plan_text import format_bytes
from sharding.planner import Plan, after_warmup, plan
from sharding.step_time import Prediction, neighbours, predict_plan, predict_step
from sharding.traffic_formulas import expected_collectives, tokens_at_once
from sharding.zero import storage_tree

__all__ = ["MOST_DEVICES", "LeftOut", "Planned", "Recommendation", "recommend"]

MOST_DEVICES = 4096
CHUNKS = (1, 2, 4)
MOST_TRACINGS = 16
ALIKE = 0.8
"""Of a layout's activations, what others of its mesh have for a token at least, by experience."""
SLOWER = "what may fit is predicted to be slower than those above"


@dataclass(frozen=True)
class Planned:
    """A layout whose step was traced."""

    layout: Layout
    plan: Plan
    prediction: Prediction


@dataclass(frozen=True)
class LeftOut:
    """A mesh, or a layout of it, that is not recommended, and why."""

    mesh: MeshShape
    reason: str


@dataclass(frozen=True)
class Recommendation:
    """What to run.

    hardware: predicted for.
    limit: bytes of a device that a run may use.
    best: one layout for each mesh, those that fit the memory, fastest first.
    too_large: those that were traced and do not fit.
    left_out: meshes without a layout in `best`.
    tracings: how many were made.
    """

    hardware: Hardware
    limit: float
    best: tuple[Planned, ...]
    too_large: tuple[Planned, ...]
    left_out: tuple[LeftOut, ...]
    tracings: int


@dataclass(frozen=True)
class _Guess:
    """A layout predicted by formulas: seconds, tokens at once, memory without activations."""

    layout: Layout
    seconds: float
    tokens: int
    fixed: Memory


def recommend(
    config: TrainConfig,
    hardware: Hardware,
    devices: int,
    *,
    limit: float | None = None,
    most: int = 5,
) -> Recommendation:
    """Looks for the fastest layouts whose memory suffices.

    The batch, the sequence and the model are the run's; so are the exchange's mode and wire. The
    first of `best` is the fastest of all layouts that fit as the plan estimates memory, unless
    `MOST_TRACINGS` ended the search before.

    Args:
        config: the run; its mesh, accumulate, remat, chunks and host_devices are not looked at.
        hardware: what it would run on.
        devices: how many there are, all of which are used.
        limit: bytes of a device that arrays may take; None: what JAX takes unless told otherwise.
        most: layouts to return.

    Raises:
        UserError: the number of devices is out of range, or no rates are known for the dtype.
    """
    if not 1 <= devices <= MOST_DEVICES:
        raise UserError(f"--plan-devices {devices}: must lie between 1 and {MOST_DEVICES}")
    config = after_warmup(config)
    search = _Search(config, hardware, hardware.kind.usable_memory if limit is None else limit)
    guesses = [guess for mesh in _meshes(devices) for guess in search.guesses(mesh)]
    guesses.sort(key=lambda guess: guess.seconds)
    for at, guess in enumerate(guesses):
        if len(search.fitting) == most:
            for later in guesses[at:]:
                search.reasons[later.layout.mesh] = SLOWER
            break
        search.look(guess)
    return search.result()


def _meshes(devices: int) -> Iterator[MeshShape]:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor in divisors:
        for expert in divisors:
            if devices // tensor % expert == 0:
                yield MeshShape(devices // tensor // expert, expert, tensor)


@dataclass
class _Search:
    config: TrainConfig
    hardware: Hardware
    limit: float
    fitting: dict[MeshShape, Planned] = field(default_factory=dict)
    too_large: list[Planned] = field(default_factory=list)
    reasons: dict[MeshShape, str] = field(default_factory=dict)
    tracings: int = 0
    # Tokens at once and bytes of activations of traced layouts without room, by layout but for its
    # microbatches, and but for its chunks and levels, which change little. A larger microbatch
    # needs as much, a smaller one at least its share: some of it does not shrink.
    _known: dict[Layout, list[tuple[int, float]]] = field(default_factory=dict)
    _shapes: dict[int, Any] = field(default_factory=dict)

    @cached_property
    def _experts(self) -> int:
        return self.config.model.fewest_experts

    @cached_property
    def _fused(self) -> bool:
        platform, deterministic = self.hardware.kind.platform, self.config.deterministic
        chosen = choose_attention(platform, self.config.model, deterministic=deterministic)
        return chosen == "cudnn"

    def guesses(self, mesh: MeshShape) -> Iterator[_Guess]:
        """All layouts of a mesh that may fit; why none does is in `reasons`."""
        batch, parts = self.config.data.batch_size, mesh.data * mesh.expert
        try:
            if mesh.expert > self._experts == 1:
                raise UserError("there are no experts to split over `expert`")
            check_mesh(self.config.model, mesh)
            params = self._params(mesh.expert)
            storage = storage_tree(params, dict(zip(AXES, mesh.sizes)))
            reducer = reducer_of(params, storage, mesh, self.config)
        except UserError as error:
            self.reasons[mesh] = str(error).partition(": ")[2] or str(error)  # the mesh is told
            return
        if batch % parts:
            why = f"batch_size={batch} is no multiple of data × expert = {parts}"
            self.reasons[mesh] = f"{why}; {-(-batch // parts) * parts} is"
            return
        weights = weights_of(self.config, mesh, params, storage)
        smallest = float("inf")
        for layout in self._layouts(mesh, batch // parts):
            config = layout.of(self.config)
            fixed = memory_of(config, mesh, params, storage, None, reducer)
            least = fixed.at_least(least_activations(config, mesh, fused_attention=self._fused))
            smallest = min(smallest, least)
            if least > self.limit:
                continue
            formulas = expected_collectives(config, mesh, params, storage, reducer)
            found = predict_step(config, mesh, weights, formulas, self.hardware)
            yield _Guess(layout, found.time.total, tokens_at_once(config, mesh), fixed)
        if smallest > self.limit:
            self.reasons[mesh] = self._needs(smallest, "or more")

    def _params(self, expert: int) -> Any:
        """Global shapes, which depend on the mesh only where experts are padded."""
        key = expert if self._experts % expert else 1
        if key not in self._shapes:
            mesh = abstract_mesh(MeshShape(expert=key))
            self._shapes[key] = Blueprint(self.config.model, mesh).params
        return self._shapes[key]

    def _layouts(self, mesh: MeshShape, examples: int) -> Iterator[Layout]:
        levels: list[int | None] = [None]
        chunks: tuple[int, ...] = (1,)
        if mesh.expert > 1:
            mode = self.config.model.moe.exchange.mode
            _, near, hosts = neighbours(mesh, ("expert",), self.hardware.host_devices)
            if hosts > 1 and 1 < near < mesh.expert and mesh.expert % near == 0:
                levels += [near] if mode != "remote" else []
            chunks = CHUNKS if self.hardware.kind.torus else (1,)
        for accumulate in (n for n in range(1, examples + 1) if examples % n == 0):
            for remat in REMATS:
                if remat == "local" and mesh.expert * mesh.tensor == 1:
                    continue  # a layer that sends nothing: `layer`
                for count in chunks:
                    for level in levels:
                        yield Layout(mesh, accumulate, remat, count, level)

    def look(self, guess: _Guess) -> None:
        """Traces a layout unless its mesh has a faster one, or it is known not to fit."""
        layout, mesh = guess.layout, guess.layout.mesh
        if mesh in self.fitting:
            return
        exactly = dataclasses.replace(layout, accumulate=1)
        alike = dataclasses.replace(exactly, chunks=1, exchange_hosts=None)
        known = self._known.get(exactly, []), self._known.get(alike, [])
        activations = max(
            share * activations * min(1.0, guess.tokens / tokens)
            for share, seen in zip((1.0, ALIKE), known)
            for tokens, activations in [*seen, (1, 0.0)]
        )
        least = guess.fixed.at_least(activations)
        if least > self.limit:
            self.reasons[mesh] = self._needs(least, f"or more with remat={layout.remat}")
            return
        if self.tracings == MOST_TRACINGS:
            self.reasons[mesh] = f"not looked at: {MOST_TRACINGS} faster layouts were traced"
            return
        self.tracings += 1
        try:
            kind = self.hardware.kind
            made = plan(layout.of(self.config), mesh, platform=kind.platform, kernels=kind.kernels)
        except UserError as error:
            self.reasons[mesh] = str(error)
            return
        found = Planned(layout, made, predict_plan(made, self.hardware))
        if made.memory.total <= self.limit:
            self.fitting[mesh] = found
            return
        self.too_large.append(found)
        self.reasons[mesh] = self._needs(made.memory.total, f"with remat={layout.remat}")
        activations = made.memory.kept + made.memory.working
        for key in {exactly, alike}:
            self._known.setdefault(key, []).append((guess.tokens, activations))

    def _needs(self, count: float, what: str) -> str:
        return f"needs {format_bytes(count)} {what}, of {format_bytes(self.limit)}"

    def result(self) -> Recommendation:
        """What was found, in order."""

        def seconds(planned: Planned) -> float:
            return planned.prediction.time.total

        left_out = [LeftOut(m, why) for m, why in self.reasons.items() if m not in self.fitting]
        return Recommendation(
            self.hardware,
            self.limit,
            tuple(sorted(self.fitting.values(), key=seconds)),
            tuple(sorted(self.too_large, key=seconds)),
            tuple(sorted(left_out, key=lambda one: one.mesh.sizes)),
            self.tracings,
        )
