"""The mesh: `data` × `expert` × `tensor`, any sizes whose product the devices can hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from moejax.errors import UserError
from sharding.distributed import host_of

__all__ = [
    "AXES",
    "DATA",
    "EXPERT",
    "TENSOR",
    "TOKEN_AXES",
    "MeshShape",
    "abstract_mesh",
    "hosts_along_expert",
    "hosts_of_devices",
    "in_turn",
    "make_mesh",
    "over_hosts",
    "runs_in_turn",
]

Arrays = TypeVar("Arrays")

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
AXES = (DATA, EXPERT, TENSOR)
TOKEN_AXES = (DATA, EXPERT)  # tokens are split over both


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the three axes, in devices."""

    data: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1:
                raise UserError(f"mesh {name}={getattr(self, name)}: an axis has at least 1 device")

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The sizes in the order of `AXES`."""
        return (self.data, self.expert, self.tensor)

    def __str__(self) -> str:
        return ",".join(f"{n}={s}" for n, s in zip(AXES, self.sizes))

    @staticmethod
    def parse(text: str) -> MeshShape:
        """Reads `data=2,expert=4,tensor=1` (axes left out have size 1) or `2x4x1`.

        Raises:
            UserError: the text is neither.
        """
        rule = f"mesh {text!r}: write data=2,expert=4,tensor=1 (any subset) or 2x4x1"
        if re.fullmatch(r"\d+x\d+x\d+", text.strip()):
            return MeshShape(*map(int, text.strip().split("x")))
        sizes: dict[str, int] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, equals, size = (s.strip() for s in part.partition("="))
            if not equals or name not in AXES or not size.isdigit() or name in sizes:
                raise UserError(rule)
            sizes[name] = int(size)
        if not sizes:
            raise UserError(rule)
        return MeshShape(**sizes)


def make_mesh(shape: MeshShape, devices: list[jax.Device] | None = None) -> Mesh:
    """Lays the mesh over `shape.size` devices; axis types are Auto.

    The axes that talk most stay inside one host where they fit, see `over_hosts`. TPUs are laid as
    JAX does it, along their torus, which goes through hosts.

    Raises:
        UserError: the mesh needs more devices than there are, or leaves a process without one.
    """
    devices = jax.devices() if devices is None else devices
    if shape.size > len(devices):
        raise UserError(
            f"mesh {shape} needs {shape.size} devices and there are {len(devices)}: shrink an axis"
            + (", or pass --devices for more fake ones" if devices[0].platform == "cpu" else "")
        )
    types = (AxisType.Auto,) * 3
    if devices[0].platform == "tpu":
        mesh = jax.make_mesh(shape.sizes, AXES, axis_types=types, devices=devices[: shape.size])
    else:
        mesh = Mesh(over_hosts(shape, devices, host_of), AXES, axis_types=types)
    idle = {d.process_index for d in devices} - {d.process_index for d in mesh.devices.flat}
    if idle:
        raise UserError(
            f"mesh {shape}: uses {shape.size} of {len(devices)} devices, none of process "
            f"{min(idle)}: grow an axis or start fewer processes"
        )
    return mesh


def over_hosts(
    shape: MeshShape, devices: Sequence[Any], host_of: Callable[[Any], int]
) -> np.ndarray:
    """Devices in the places of a mesh: `tensor`, and then `expert`, inside a host where they fit.

    As many groups of `expert` × `tensor` devices as fit are taken whole from one host each. What is
    left of the hosts makes up the other groups, of neighbouring hosts, and of these again each
    `tensor` group lies in one host as long as that can be.

    Args:
        shape: of the mesh; there are at least as many devices.
        devices: those of a host in the order in which they are to be neighbours.
        host_of: a number for the machine that a device is in.

    Returns:
        devices, object [data, expert, tensor].
    """
    hosts: dict[int, list[Any]] = {}
    for device in devices:
        hosts.setdefault(host_of(device), []).append(device)
    block = shape.expert * shape.tensor
    whole: list[Any] = []
    rows: list[Any] = []
    rest: list[Any] = []
    for there in hosts.values():
        in_blocks = len(there) // block * block
        in_rows = in_blocks + (len(there) - in_blocks) // shape.tensor * shape.tensor
        whole += there[:in_blocks]
        rows += there[in_blocks:in_rows]
        rest += there[in_rows:]
    laid = np.empty(shape.size, object)
    laid[:] = (whole + rows + rest)[: shape.size]
    return laid.reshape(shape.sizes)


def hosts_along_expert(mesh: Mesh) -> tuple[int, ...]:
    """The host of each device along `expert`, by numbers that mean nothing beyond that.

    Of the first group; others may lie otherwise where groups and hosts do not divide each other.
    """
    return tuple(host_of(device) for device in mesh.devices[0, :, 0])


def hosts_of_devices(mesh: Mesh) -> np.ndarray:
    """The host of each device, int [data, expert, tensor], numbered as by `hosts_along_expert`."""
    return np.array([host_of(device) for device in mesh.devices.flat]).reshape(mesh.devices.shape)


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """A mesh without devices, to trace and lower for machines that are not here."""
    return AbstractMesh(shape.sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def runs_in_turn(mesh: Mesh) -> bool:
    """Whether a program must have ended before another one starts.

    Fake devices share one pool of threads, in which two programs under way may wait for each other.
    """
    return mesh.devices.flat[0].platform == "cpu" and mesh.size > 1


def in_turn(mesh: Mesh, arrays: Arrays) -> Arrays:
    """What a program gave, when another one may be started: see `runs_in_turn`."""
    return jax.block_until_ready(arrays) if runs_in_turn(mesh) else arrays
