"""What a run does with steps whose loss or gradient is not finite, or far above the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moejax.errors import UserError

__all__ = ["AnomalyConfig"]


@dataclass(frozen=True)
class AnomalyConfig:
    """Steps that would harm the weights; see docs/training.md.

    A step is a spike where its loss or the norm of its gradient lies more than `sigma` standard
    deviations above the mean of the last `window` steps, as in OLMo's skipping optimizer.

    Attributes:
        nonfinite: a loss or gradient with NaN or infinity. `skip`: weights and optimizer stay as
            they are, the next step takes the next batch. `stop`: the run ends with the checkpoint
            before that step. `ignore`: nobody looks.
        spike: likewise; `report` says so and goes on.
        sigma: how far above the mean a spike lies.
        window: steps that mean and deviation are taken of; half as many have to be there first.
        most_in_a_row: so many steps are skipped one after the other before the run stops.
        dumps: batches of such steps that are kept in the run directory, beside those that stop it.
    """

    nonfinite: Literal["skip", "stop", "ignore"] = "skip"
    spike: Literal["report", "skip", "stop", "ignore"] = "report"
    sigma: float = 6.0
    window: int = 128
    most_in_a_row: int = 10
    dumps: int = 10

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise UserError(f"sigma={self.sigma}: must be greater than 0")
        if self.window < 4:
            raise UserError(f"window={self.window}: must be at least 4, for a deviation to be told")
        if self.most_in_a_row < 1:
            raise UserError(f"most_in_a_row={self.most_in_a_row}: must be at least 1")
        if self.dumps < 0:
            raise UserError(f"dumps={self.dumps}: must be 0 or more")

    @property
    def active(self) -> bool:
        """Whether anything is looked at."""
        return self.nonfinite != "ignore" or self.spike != "ignore"
