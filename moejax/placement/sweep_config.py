"""What a sweep measures: its flags, the ways of routing among them, and what is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from moejax.config import LocalityConfig
from moejax.errors import UserError
from moejax.placement.frontier import parse_budget
from moejax.placement.frontier_picture import picture_form

if TYPE_CHECKING:
    from moejax.config import ModelConfig

__all__ = ["SweepConfig", "check_settings", "localities_of"]

_File = Annotated[str, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class SweepConfig:
    """Measures traffic and loss of placements and of routing that knows them.

    Attributes:
        model: a run, a folder of ours or of transformers; `packaged`: the model of the package.
        text: files, folders or globs to judge by; none: what the packaged model never saw of the
            standard library.
        plan_text: likewise of other texts, from which experts are placed; none: the rest of the
            standard library.
        devices: along `expert`.
        hosts: of equal size, in order.
        replicas: slots of each device for second copies; 0: placements without copies alone.
        penalties: of experts on other devices, each alone and with each limit.
        max_devices: limits of a token's devices, each alone and with each penalty; those that
            limit nothing, of as many devices as there are, are left out.
        thresholds: local experts alone where the last of them has this probability.
        weights: of the outputs, from the scores as they are or as they are scaled.
        loss_budget: how much the loss may rise: 2% or 0.02.
        window: tokens of a window; at most the model's context.
        windows: of a document, at most.
        plan_tokens: to place experts by.
        seed: of the planner, and of the texts that it sees.
        out: .json to write, anew after each setting.
        picture: .svg, .png or .pdf to write; empty: none.
    """

    model: Annotated[str, tyro.conf.arg(metavar="DIR")] = "packaged"
    text: tuple[str, ...] = ()
    plan_text: tuple[str, ...] = ()
    devices: int = 8
    hosts: int = 1
    replicas: int = 2
    penalties: tuple[float, ...] = (0.3,)
    max_devices: tuple[int, ...] = (3, 2)
    thresholds: tuple[float, ...] = ()
    weights: Literal["plain", "scaled"] = "plain"
    loss_budget: str = "2%"
    window: int = 512
    windows: int = 2
    plan_tokens: int = 32_768
    seed: int = 0
    out: _File = "sweep.json"
    picture: _File = ""

    def __post_init__(self) -> None:
        parse_budget(self.loss_budget)
        for name in ("devices", "hosts", "window", "windows", "plan_tokens"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1"
                )
        if self.devices < 2 or self.devices % self.hosts:
            raise UserError(
                f"--devices {self.devices} --hosts {self.hosts}: there must be two devices or "
                "more, and as many on each host"
            )
        if self.replicas < 0 or self.seed < 0:
            raise UserError(f"--replicas {self.replicas} --seed {self.seed}: must not be negative")
        if bool(self.text) != bool(self.plan_text):
            raise UserError(
                "--text and --plan-text: give both, so that experts are not placed by the texts "
                "that judge them, or neither"
            )
        if not self.out:
            raise UserError("--out FILE: name the file to write")
        if self.picture:
            picture_form(self.picture)
        localities_of(self)  # refuses what no setting may have


def localities_of(config: SweepConfig) -> list[LocalityConfig]:
    """What is tried beside routing without regard to places, which comes first."""
    weights: Any = config.weights
    found = [
        LocalityConfig(device_penalty=penalty, max_devices=limit, weights=weights)
        for limit in (None, *(m for m in config.max_devices if m < config.devices))
        for penalty in (0.0, *config.penalties)
    ]
    found += [LocalityConfig(local_threshold=t) for t in config.thresholds]
    return list(dict.fromkeys(found))


def check_settings(config: SweepConfig, model: ModelConfig) -> None:
    """Refuses what a model cannot run, before anything is measured.

    Args:
        config: devices, replicas and ways of routing.
        model: whose experts it is about.

    Raises:
        UserError: a way of routing is not for this router, a limit leaves a token too few experts,
            or rows go in two levels.
    """
    from moejax.placement.judge import check_levels
    from moejax.routing.locality import check_room

    check_levels(model, config.devices)
    router = model.moe.router
    top_k = max(layer.moe.router.top_k for layer in model.layers() if layer.moe is not None)
    slots = -(-router.num_experts // config.devices) + config.replicas
    every_P = np.zeros(config.devices * slots, np.int32)  # a step knows only how many there are
    for locality in localities_of(config):
        dataclasses.replace(model.moe, locality=locality)
        check_room(locality, top_k, every_P, [0] * config.devices)
