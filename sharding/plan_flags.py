"""The flags that say for which devices a run is planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from moejax.errors import UserError

__all__ = ["PlanFlags"]


@dataclass(frozen=True)
class PlanFlags:
    """What `--dry-run` predicts for; it belongs to no run's record.

    Attributes:
        plan_for: kind of device whose step time is predicted: h100, h200, a100, v5e, v5p, v6e, or a
            name that JAX reports. Empty: the devices of this machine, if they are such.
        plan_devices: recommend layouts for so many of them; 0: only predict the run as it is.
        plan_host_devices: devices that share a host; 0: as many as the vendor builds together.
    """

    plan_for: Annotated[str, tyro.conf.arg(metavar="KIND")] = ""
    plan_devices: int = 0
    plan_host_devices: int = 0

    def check_planning(self, dry_run: bool) -> None:
        """Refuses flags that do not go together.

        Args:
            dry_run: whether the run is only planned.

        Raises:
            UserError: nothing is planned, or a number is negative.
        """
        for flag, value in (
            ("--plan-for", self.plan_for),
            ("--plan-devices", self.plan_devices),
            ("--plan-host-devices", self.plan_host_devices),
        ):
            if value and not dry_run:
                raise UserError(f"{flag} {value} without --dry-run: add it, or leave this out")
            if isinstance(value, int) and value < 0:
                raise UserError(f"{flag} {value}: must be 0 or more")
