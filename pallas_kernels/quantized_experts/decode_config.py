"""How a product of 8-bit weights with few rows is cut up, and which stage a step uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax import lax

from pallas_kernels.hopper.compat import sm_count
from pallas_kernels.hopper.tiles import HALF
from pallas_kernels.quantized_experts.format import BLOCK

__all__ = ["COLUMNS", "DecodeConfig", "Rings", "choose_decode"]

RING = 192 * 1024  # bytes of all stages, or less where
SHARED = 224 * 1024  # they and what a tile ends with have to fit
COLUMNS = (8, 16, 32, 64)
_FEW = 32  # columns up to which a tile is 64 rows of the weights


@dataclass(frozen=True)
class DecodeConfig:
    """Sizes of a product.

    columns: token rows of a tile, 8, 16, 32 or 64.
    row_parts: warpgroups side by side, 64 rows of the weights each.
    phases: warpgroups that take turns along the contraction; each has a ring.
    stages: of a ring.
    sms: streaming multiprocessors that are used.
    lag: steps between starting a gather and waiting for it, fewer than there are stages.
    band: chunks that are swept over all rows of the weights together.
    """

    columns: int
    row_parts: int
    phases: int
    stages: int
    sms: int
    lag: int = 1
    band: int = 4

    def __post_init__(self) -> None:
        for name, allowed in (("columns", COLUMNS), ("row_parts", (1, 2)), ("phases", (1, 2))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)} is none of {allowed}")
        most = self.stages if self.phases > 1 else self.stages - 1  # a short tile fills one ring
        if not 1 <= self.lag <= most:
            raise ValueError(f"lag={self.lag} with stages={self.stages}: must be from 1 to {most}")

    @property
    def multiplying(self) -> int:
        """Warpgroups that multiply."""
        return self.row_parts * self.phases

    @property
    def rows(self) -> int:
        """Rows of the weights in a tile."""
        return self.row_parts * HALF


def choose_decode(assignments: int, slots: int, parts: int, **sizes: int) -> DecodeConfig:
    """A good cut.

    Args:
        assignments: rows of all slots together.
        slots: matrices.
        parts: accumulators side by side.
        sizes: fields of the result that are given.
    """
    mean = assignments / slots
    most = mean + 4 * mean**0.5  # most slots of a uniform routing have fewer
    columns = sizes.pop("columns", next((c for c in COLUMNS if c >= most), COLUMNS[-1]))
    row_parts = sizes.pop("row_parts", 1 if columns <= _FEW else 2)
    phases = sizes.pop("phases", 2 if row_parts == 1 else 1)
    stage = parts * row_parts * HALF * BLOCK + columns * BLOCK * 2
    ending = row_parts * HALF * columns * (2 + (4 * parts if phases > 1 else 0))
    stages = sizes.pop("stages", min(RING, SHARED - ending) // phases // stage)
    sms = sizes.pop("sms", sm_count())
    lag = sizes.pop("lag", max(1, min(4, stages * phases // 2)))
    return DecodeConfig(columns, row_parts, phases, stages, sms, lag, **sizes)


@dataclass(frozen=True)
class Rings:
    """Which stage a step uses: the steps of a tile take turns among the phases' rings."""

    config: DecodeConfig
    k_steps: int

    def count(self, phase: Any) -> Any:
        """Steps of a tile in a phase."""
        return lax.div(self.k_steps + (self.config.phases - 1) - phase, self.config.phases)

    def turn(self, tile: Any, k: Any) -> tuple[Any, Any]:
        """(phase, how often its ring was used before) of a step."""
        phase = lax.rem(k, self.config.phases)
        return phase, tile * self.count(phase) + lax.div(k, self.config.phases)

    def slot(self, phase: Any, turn: Any) -> Any:
        """The stage of a ring's turn."""
        return phase * self.config.stages + lax.rem(turn, self.config.stages)
