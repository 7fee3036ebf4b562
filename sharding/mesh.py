"""The mesh: `data` × `expert` × `tensor`, any sizes whose product the devices can hold."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from moejax.errors import UserError

__all__ = [
    "AXES",
    "DATA",
    "EXPERT",
    "TENSOR",
    "TOKEN_AXES",
    "MeshShape",
    "abstract_mesh",
    "in_turn",
    "make_mesh",
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
    """Lays the mesh over the first `shape.size` devices; axis types are Auto.

    Consecutive devices form the `tensor` axis, then `expert`, then `data`, so that the axes that
    talk most stay inside one host.

    Raises:
        UserError: the mesh needs more devices than there are.
    """
    devices = jax.devices() if devices is None else devices
    if shape.size > len(devices):
        raise UserError(
            f"mesh {shape} needs {shape.size} devices and there are {len(devices)}: shrink an axis"
            + (", or pass --devices for more fake ones" if devices[0].platform == "cpu" else "")
        )
    return jax.make_mesh(
        shape.sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: shape.size]
    )


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
