"""The flags with which a process joins others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from moejax.errors import UserError

__all__ = ["JoinFlags"]


@dataclass(frozen=True)
class JoinFlags:
    """How this process joins others; it belongs to the machine and is in no run's record.

    Attributes:
        distributed: join other processes: those of Slurm, Open MPI or Kubernetes, or as the next
            three flags say.
        coordinator: of process 0, as all others reach it.
        processes: how many there are.
        process: the number of this one, from 0.
        local_devices: the accelerators that this process uses; none: one a process under Slurm and
            Open MPI, else all.
        join_timeout: seconds to wait for all processes at the start.
    """

    distributed: bool = False
    coordinator: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")] = ""
    processes: int | None = None
    process: int | None = None
    local_devices: tuple[int, ...] = ()
    join_timeout: float = 300.0

    def check_joining(self) -> None:
        """Refuses flags that do not go together.

        Raises:
            UserError: they are given by half, or a number is out of range.
        """
        given = {
            "--coordinator": self.coordinator or None,
            "--processes": self.processes,
            "--process": self.process,
        }
        there = [f"{name} {value}" for name, value in given.items() if value is not None]
        lacking = [name for name, value in given.items() if value is None]
        if not self.distributed:
            if there or self.local_devices:
                told = there or [f"--local-devices {' '.join(map(str, self.local_devices))}"]
                raise UserError(
                    f"{' '.join(told)} without --distributed: add it, or leave them out"
                )
            return
        if there and lacking:
            raise UserError(
                f"{' '.join(there)} without {' and '.join(lacking)}: give all three, or none where "
                "Slurm, Open MPI or Kubernetes start the processes"
            )
        if self.processes is not None and self.processes < 1:
            raise UserError(f"--processes {self.processes}: must be at least 1")
        if self.process is not None and not 0 <= self.process < (self.processes or 0):
            raise UserError(
                f"--process {self.process} --processes {self.processes}: must lie between 0 and "
                f"{(self.processes or 0) - 1}"
            )
        if self.join_timeout <= 0:
            raise UserError(f"--join-timeout {self.join_timeout:g}: must be greater than 0")
        if any(device < 0 for device in self.local_devices):
            raise UserError(
                f"--local-devices {' '.join(map(str, self.local_devices))}: must not be negative"
            )
