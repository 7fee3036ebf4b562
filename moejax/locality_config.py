"""Configuration of routing that knows where experts live. Lossy, and off unless asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moejax.errors import UserError

__all__ = ["LocalityConfig"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class LocalityConfig:
    """How routing prefers experts that are near, see `moejax.routing.locality`.

    What a token gets then depends on the device that it is on, and on the placement. With one
    device along `expert` all experts are near, and routing is as without.

    Attributes:
        device_penalty: probabilities of experts on other devices are scaled by 1 − this for the
            choice, before any selection bias is added; 0 leaves them.
        host_penalty: likewise of experts on other hosts, at least `device_penalty`; 0 treats them
            as those on other devices. Where all devices share a host it has no effect.
        weights: weights of the chosen experts from the `plain` scores, or from the `scaled` ones.
        local_threshold: a token whose K-th best local probability is at least this uses local
            experts only; None: none does.
        local: experts on the token's own `device`, or on its `host`.
        max_devices: a token's experts lie on at most this many devices, its best ones; None: on
            any.
        max_hosts: likewise hosts, which are chosen first.
    """

    device_penalty: float = 0.0
    host_penalty: float = 0.0
    weights: Literal["plain", "scaled"] = "plain"
    local_threshold: float | None = None
    local: Literal["device", "host"] = "device"
    max_devices: int | None = None
    max_hosts: int | None = None

    def __post_init__(self) -> None:
        for name in "device_penalty", "host_penalty":
            value = getattr(self, name)
            _require(
                0 <= value < 1,
                f"{name}={value}: must be at least 0 and less than 1, which would forbid remote "
                "experts; local_threshold or max_devices does so",
            )
        _require(
            self.host_penalty == 0 or self.host_penalty >= self.device_penalty,
            f"host_penalty={self.host_penalty}: must be at least "
            f"device_penalty={self.device_penalty}, as another host is farther than another "
            "device; 0 takes the same",
        )
        threshold = self.local_threshold
        _require(
            threshold is None or 0 <= threshold <= 1,
            f"local_threshold={threshold}: a probability lies between 0 and 1; None is off",
        )
        for name in "max_devices", "max_hosts":
            value = getattr(self, name)
            _require(
                value is None or value >= 1,
                f"{name}={value}: a token needs at least 1; None is off",
            )

    @property
    def active(self) -> bool:
        """Whether anything of it changes the routing."""
        return self.scales or self.local_threshold is not None or self.limits

    @property
    def scales(self) -> bool:
        """Whether probabilities are scaled."""
        return self.device_penalty > 0 or self.host_penalty > 0

    @property
    def limits(self) -> bool:
        """Whether a token's devices or hosts are limited."""
        return self.max_devices is not None or self.max_hosts is not None

    @property
    def penalties(self) -> tuple[float, float, float]:
        """By distance: on the same device, on the same host, on another one."""
        return 0.0, self.device_penalty, self.host_penalty or self.device_penalty
