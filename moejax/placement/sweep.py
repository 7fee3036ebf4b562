"""The frontier of traffic against loss: placements and ways of routing, measured on held-out text.

python -m moejax.placement sweep --devices 8 --replicas 2 --loss-budget 2% --out sweep.json

Every setting runs the same windows, so losses are compared document by document.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.placement.frontier import frontier, parse_budget, recommend
from moejax.placement.frontier_picture import draw_frontier, setting_in_words
from moejax.placement.sweep_config import SweepConfig, check_settings, localities_of
from moejax.training.files import disk_errors, write_atomically

if TYPE_CHECKING:
    from moejax.config import LocalityConfig, ModelConfig
    from moejax.placement.judge import Judged, Windows

__all__ = ["Sweep", "placements_of", "run"]

Rows = list[dict[str, Any]]


def _check_place(path: str) -> None:
    """Refuses a file that cannot be written, without touching one that is there."""
    with disk_errors(path):
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass


def placements_of(
    trace: Any, devices: int, hosts: int, replicas: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Contiguous, planned from a trace, and planned with copies; int32 [L, G·S], S alike in all.

    Args:
        trace: of other texts than those that judge.
        devices: G.
        hosts: of equal size.
        replicas: slots of each device for copies; 0: no placement with copies.
        seed: of the planner.
    """
    from moejax.placement.arrays import slots_at_home
    from moejax.placement.planner import plan
    from moejax.placement.replicas import add_replicas
    from moejax.placement.statistics import statistics_of
    from moejax.placement.topology import Topology

    lean = Topology.even(trace.num_experts, devices, hosts)
    wide = Topology(devices, lean.slots + replicas, lean.hosts)
    statistics = statistics_of(trace)
    home_P = slots_at_home(trace.num_experts, devices, wide.slots)
    once_LP = plan(statistics, lean, seed=seed).slots_LP
    planned_LGS = np.full((trace.num_layers, devices, wide.slots), -1, np.int32)
    planned_LGS[:, :, : lean.slots] = once_LP.reshape(trace.num_layers, devices, -1)
    found = {
        "contiguous": np.tile(home_P, (trace.num_layers, 1)),
        "planned": planned_LGS.reshape(trace.num_layers, -1),
    }
    if replicas:
        found["copies"] = add_replicas(once_LP, statistics, wide)
    return found


class Sweep:
    """One model, the texts that judge it, and placements.

    Args:
        model: configuration; its routing without regard to places is what others are compared to.
        windows: the texts.
        placements: int32 [L, G·S] by name; the first is what others are compared to.
        mesh: of the devices.
        hosts: of each device along `expert`.
    """

    def __init__(
        self,
        model: ModelConfig,
        windows: Windows,
        placements: dict[str, np.ndarray],
        mesh: Any,
        hosts: tuple[int, ...] | None = None,
    ) -> None:
        self._model, self._windows, self._hosts = model, windows, hosts
        self.placements, self.mesh = placements, mesh
        # One program serves all placements.
        self._replicas = max(
            int(np.bincount(s[s >= 0]).max()) for slots in placements.values() for s in slots
        )
        self._judges: dict[LocalityConfig, Any] = {}
        self.base: Judged | None = None
        """The first placement without regard to places, of the first weights measured."""

    def with_locality(self, locality: LocalityConfig) -> ModelConfig:
        """The model with another way of routing."""
        moe = dataclasses.replace(self._model.moe, locality=locality)
        return dataclasses.replace(self._model, moe=moe)

    def arrays(self, name: str) -> Any:
        """A placement as a step takes it, [L, …]."""
        from moejax.placement.controller import stacked

        experts = self._model.moe.router.num_experts
        return stacked(self.placements[name], experts, self._replicas)

    def rows(
        self,
        flat: dict[str, Any],
        localities: Sequence[LocalityConfig],
        names: Sequence[str] | None = None,
        **more: Any,
    ) -> Iterator[dict[str, Any]]:
        """Measures weights under placements and ways of routing, one row after the other.

        Args:
            flat: weights in logical order, `params/…` and `bias/…`.
            localities: ways of routing.
            names: of placements; None: all.
            more: goes into the rows.
        """
        for locality in localities:
            for name in self.placements if names is None else names:
                began = time.perf_counter()
                judged = self.judge(flat, locality, name)
                seconds = round(time.perf_counter() - began, 1)
                yield {**self.row(judged, locality, name), **more, "seconds": seconds}

    def judge(self, flat: dict[str, Any], locality: LocalityConfig, name: str) -> Judged:
        """Measures one setting."""
        from jax import numpy as jnp

        from moejax.placement.judge import Judge
        from moejax.training.state import Blueprint, load_weights

        if locality not in self._judges:
            blueprint = Blueprint(self.with_locality(locality), self.mesh, self._hosts)
            self._judges[locality] = blueprint, Judge(blueprint, self._windows)
        blueprint, judge = self._judges[locality]
        weights = load_weights(flat, blueprint, jnp.dtype(self._model.compute_dtype))
        judged = judge(*weights, self.placements[name], self._replicas)
        self.base = self.base or judged
        return judged

    def row(self, judged: Judged, locality: LocalityConfig, name: str) -> dict[str, Any]:
        """What a results file says of a setting."""
        from moejax.placement.judge import relative_increase

        assert self.base is not None
        increase, error = relative_increase(judged.nll_D, self.base.nll_D)
        return {
            "placement": name,
            "penalty": locality.device_penalty,
            "local_threshold": locality.local_threshold,
            "max_devices": locality.max_devices,
            "weights": locality.weights,
            "remote_sends": round(judged.remote_sends, 4),
            "remote_sends_ratio": round(judged.remote_sends / self.base.remote_sends, 4),
            "loss": round(judged.bits_per_byte, 5),
            "loss_increase": round(increase, 5),
            "loss_increase_error": round(error, 5),
            "score_mass_kept": round(judged.score_mass_kept, 4),
            "fanout": round(judged.fanout, 4),
            **({"network_rows": round(judged.network_rows, 4)} if self._hosts else {}),
            "load_max_mean": round(judged.load_max_mean, 4),
        }


def run(config: SweepConfig, say: Callable[[str], None] = print) -> Rows:
    """The command: measures, writes, draws and recommends.

    Raises:
        UserError: something is refused, before anything is measured; or the disk is full.
    """
    from moejax.placement.sweep_texts import open_texts, prepare

    for path in filter(None, (config.out, config.picture)):
        _check_place(path)
    source, judged, planned = open_texts(config)
    check_settings(config, source.config)
    sweep, flat = prepare(config, source, judged, planned, say)
    settings, budget = localities_of(config), parse_budget(config.loss_budget)
    rows: Rows = []
    best: int | None = None
    for row in sweep.rows(flat, settings):
        rows.append(row)
        points = [(row["remote_sends"], row["loss_increase"]) for row in rows]
        best = recommend(points, budget)
        told = {
            "complete": len(rows) == len(settings) * len(sweep.placements),
            "frontier": frontier(points),
            "loss_budget": budget,
            "recommended": best,
        }
        with disk_errors(config.out):
            write_atomically(config.out, json.dumps({"rows": rows, **told}, indent=2) + "\n")
        say(
            f"{setting_in_words(row)}: {row['remote_sends']:.3f} remote sends, loss "
            f"{row['loss_increase']:+.2%} ± {row['loss_increase_error']:.2%}, score mass "
            f"{row['score_mass_kept']:.3f}, load {row['load_max_mean']:.2f}"
        )
    if config.picture:
        series = [(name, [r for r in rows if r["placement"] == name]) for name in sweep.placements]
        ringed = [] if best is None else [rows[best]]
        draw_frontier(config.picture, series, [(1.0, budget)], ringed)
    if best is None:
        say(f"nothing keeps the loss within {config.loss_budget}")
    else:
        less = 1 - rows[best]["remote_sends_ratio"]
        say(
            f"recommended within {config.loss_budget}: {setting_in_words(rows[best])}, "
            f"{less:.0%} fewer remote sends"
        )
    return rows
