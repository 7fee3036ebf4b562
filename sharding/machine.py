"""Measured figures of a machine, by the name of its devices, for `moejax.exchange.suggest`.

They lie in `sharding/machines/<device>.json`, written by `python -m sharding.measure` on such a
machine. Where none are known nothing is predicted. No layer reads them: the exchange's mode `auto`
goes by counted bytes alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

from moejax.errors import UserError
from pallas_kernels.tuning.table import device_slug

__all__ = [
    "Machine",
    "exchange_seconds",
    "machine_file",
    "machine_of",
    "read_machine",
    "write_machine",
]

MACHINES = Path(__file__).parent / "machines"
HOPPER = ("H100", "H200", "H800", "H20")
"""In the names of devices of capability 9.0."""


@dataclass(frozen=True)
class Machine:
    """One kind of device and the links between those of one host.

    device: its name, as JAX reports it.
    devices: how many were measured together.
    product_flops: FLOP/s of a device in large bfloat16 expert products.
    memory_bytes: bytes a second that a device reads from its memory.
    link_bytes: bytes a second that leave a device in a large all-to-all; 0 with one device.
    link_seconds: what an all-to-all takes however small it is; 0 with one device.
    jax: its version.
    """

    device: str
    devices: int
    product_flops: float
    memory_bytes: float
    link_bytes: float
    link_seconds: float
    jax: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "str":
                good = isinstance(value, str) and value != ""
            else:
                good = isinstance(value, int if field.type == "int" else int | float)
                good = good and not isinstance(value, bool) and math.isfinite(value)
                alone = field.name.startswith("link_") and self.devices == 1
                good = good and (value == 0 if alone else value > 0)
            if not good:
                raise ValueError(f"{field.name} is {value!r}")

    @property
    def hopper(self) -> bool:
        """Whether the devices are NVIDIA GPUs of capability 9.0, by their name."""
        return any(name in self.device for name in HOPPER)


def exchange_seconds(machine: Machine, sent: float) -> float:
    """Seconds of a collective in which each device sends so many bytes to others of its host.

    Args:
        machine: with more than one device.
        sent: bytes that leave a device.
    """
    return machine.link_seconds + sent / machine.link_bytes


def machine_file(device: str) -> Path:
    """Where the figures of a device lie, or would lie."""
    return MACHINES / f"{device_slug(device)}.json"


def read_machine(path: Path) -> Machine:
    """Reads figures and checks them.

    Raises:
        UserError: the file cannot be read, or is not what `python -m sharding.measure` writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("an object is expected")
        known = {field.name for field in fields(Machine)}
        if set(content) != known:
            raise ValueError(f"fields {sorted(set(content) ^ known)} are missing or unknown")
        return Machine(**content)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no figures of a machine: {error}; measure it again") from None


def write_machine(machine: Machine, path: Path) -> None:
    """Writes figures where `read_machine` reads them.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(machine), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name another file") from None


@lru_cache
def machine_of(device: str) -> Machine | None:
    """The figures of a kind of device, None where nobody measured it.

    Args:
        device: as JAX names it, such as `jax.devices()[0].device_kind`.
    """
    path = machine_file(device)
    return read_machine(path) if path.is_file() else None
