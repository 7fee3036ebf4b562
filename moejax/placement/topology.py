"""What the planner knows of the devices: slots, hosts, speeds, room."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moejax.errors import UserError

__all__ = ["Topology"]


@dataclass(frozen=True)
class Topology:
    """Devices along `expert`.

    Attributes:
        devices: G.
        slots: S, the slots of every device; a shape, the same for all.
        hosts: the host of each device, whole numbers; None: all on one.
        speeds: how fast each device is, in any unit; its load is divided by it. None: alike.
        room: how many slots of each device may be filled, at most S; None: all.
    """

    devices: int
    slots: int
    hosts: tuple[int, ...] | None = None
    speeds: tuple[float, ...] | None = None
    room: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.devices < 1 or self.slots < 1:
            raise UserError(
                f"devices={self.devices}, slots={self.slots}: there must be at least one of each"
            )
        for name in ("hosts", "speeds", "room"):
            values = getattr(self, name)
            if values is not None and len(values) != self.devices:
                raise UserError(
                    f"{name}: {len(values)} values for {self.devices} devices: give each one"
                )
        for speed in self.speeds or ():
            if not (math.isfinite(speed) and speed > 0):
                raise UserError(f"speeds: {speed}: must be positive; give no room instead of 0")
        for room in self.room or ():
            if not 0 <= room <= self.slots:
                raise UserError(f"room: {room}: must lie between 0 and slots={self.slots}")

    @classmethod
    def even(cls, num_experts: int, devices: int, hosts: int = 1) -> Topology:
        """Devices alike, just enough slots, hosts of equal size in order.

        Raises:
            UserError: hosts do not divide the devices.
        """
        if hosts < 1 or devices % hosts:
            raise UserError(f"hosts={hosts}: must divide devices={devices}")
        host_G = tuple(d // (devices // hosts) for d in range(devices))
        slots = -(-num_experts // devices)
        return cls(devices, slots, host_G if hosts > 1 else None)

    @property
    def host_G(self) -> np.ndarray:
        """int64 [G], hosts numbered from 0 in the order of their first device."""
        if self.hosts is None:
            return np.zeros(self.devices, np.int64)
        _, first, inverse = np.unique(np.array(self.hosts), return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[inverse.reshape(-1)].astype(np.int64)

    @property
    def num_hosts(self) -> int:
        """H."""
        return int(self.host_G.max()) + 1

    @property
    def room_G(self) -> np.ndarray:
        """int64 [G], slots that may be filled."""
        return np.array(self.room or (self.slots,) * self.devices, np.int64)

    @property
    def speed_G(self) -> np.ndarray:
        """float64 [G], shares of the whole speed: they sum to 1; 0 where there is no room."""
        speed_G = np.array(self.speeds or (1.0,) * self.devices) * (self.room_G > 0)
        return speed_G / max(speed_G.sum(), 1e-300)

    def check_fits(self, num_experts: int) -> None:
        """Every expert must find a slot.

        Raises:
            UserError: there are too few.
        """
        total = int(self.room_G.sum())
        if total < num_experts:
            raise UserError(
                f"room: {total} slots on {self.devices} devices for {num_experts} experts; raise "
                "slots or room, or take more devices"
            )
