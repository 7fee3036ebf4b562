"""How a run is laid over devices: what `sharding.recommend` chooses among."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moejax.config import RematPolicy
from moejax.training.config import TrainConfig
from sharding.mesh import MeshShape

__all__ = ["REMATS", "Layout"]

REMATS: tuple[RematPolicy, ...] = ("none", "dots", "local", "layer")


@dataclass(frozen=True)
class Layout:
    """What is chosen.

    mesh: sizes of the axes.
    accumulate: microbatches of a step.
    remat: what the backward recomputes.
    chunks: of an exchange.
    exchange_hosts: devices along `expert` in a host, for an exchange in two levels; None: in one.
    """

    mesh: MeshShape
    accumulate: int
    remat: RematPolicy
    chunks: int = 1
    exchange_hosts: int | None = None

    def of(self, config: TrainConfig) -> TrainConfig:
        """The run in this layout."""
        exchange = dataclasses.replace(
            config.model.moe.exchange, chunks=self.chunks, host_devices=self.exchange_hosts
        )
        moe = dataclasses.replace(config.model.moe, exchange=exchange)
        model = dataclasses.replace(config.model, remat=self.remat, moe=moe)
        return dataclasses.replace(
            config, model=model, mesh=str(self.mesh), accumulate=self.accumulate
        )

    def flags(self) -> list[str]:
        """The flags of `train.py` for it."""
        found = ["--mesh", str(self.mesh), "--accumulate", str(self.accumulate)]
        found += ["--model.remat", self.remat]
        if self.mesh.expert > 1:
            found += ["--model.moe.exchange.chunks", str(self.chunks)]
            found += ["--model.moe.exchange.host-devices", str(self.exchange_hosts)]
        return found
