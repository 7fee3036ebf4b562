"""Kinds of devices that a step can be predicted for: data sheets, and what is reached of them.

Where `sharding/machines/` has measured figures of a kind they take the place of the data sheet's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moejax.errors import UserError
from sharding.flops import PEAK_FLOPS
from sharding.machine import Machine, machine_of

__all__ = ["KINDS", "DeviceKind", "Hardware", "find_kind", "hardware_of"]

PRODUCTS = 0.73
"""Of the peak in large products: 720 of 989 TFLOP/s on an H100 (docs/performance.md)."""
MEMORY = 0.9
"""Of the data sheet's memory bandwidth: 3.0 of 3.35 TB/s on an H100 (docs/performance.md)."""
LINKS = 0.62
"""Of the links' rate: the mean of all-to-all, all-gather and reduce-scatter at 256 MiB a device,
280 of 450 GB/s on four H200 (benchmarks/results/links_h200x4.json)."""
LINK_SECONDS = 40e-6
"""Of a collective inside a host however small it is (the same file, `latency_ms`)."""
HOST_LINKS = 0.8
"""Of the network's rate. An assumption, nothing was measured."""
HOST_LINK_SECONDS = 30e-6
"""More for each doubling of the hosts that a collective goes through. An assumption."""


@dataclass(frozen=True)
class DeviceKind:
    """What the vendor says of a device.

    name: as JAX reports it, and in `PEAK_FLOPS`.
    short: what people write.
    others: further names that JAX reports.
    platform: of JAX.
    memory: bytes of a device.
    usable: the share of it that JAX takes for arrays unless told otherwise.
    memory_bytes: bytes a second from memory.
    link_bytes: bytes a second that leave a device over the fast links, for one mesh axis.
    host_devices: devices that the fast links join: a host's GPUs, a pod's TPUs.
    host_link_bytes: bytes a second that leave a device for others beyond those.
    kernels: the backend of `pallas_kernels.fused_experts` that is made for it; empty: none is.
    torus: an axis is a ring of neighbours, so that an all-to-all passes through many devices.
    """

    name: str
    short: str
    others: tuple[str, ...]
    platform: Literal["gpu", "tpu"]
    memory: float
    usable: float
    memory_bytes: float
    link_bytes: float
    host_devices: int
    host_link_bytes: float
    kernels: str = ""
    torus: bool = False

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 peak, FLOP/s."""
        return PEAK_FLOPS[self.name]

    @property
    def usable_memory(self) -> float:
        """Bytes that JAX takes for arrays unless told otherwise."""
        return self.usable * self.memory


# JAX takes three quarters of a GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION). A TPU's is taken
# whole but for what the runtime needs; the share is an assumption.
_GPU, _TPU = 0.75, 0.95

# NVIDIA's data sheets of H100 SXM5, H200 SXM and A100 SXM4; NVLink one way; a network adapter for
# each GPU as in DGX H100 (400 Gb/s) and DGX A100 (200 Gb/s). Google's pages on the architecture of
# v5e, v5p and v6e; ICI one way over the two ports of one dimension of the torus; the data-centre
# network's share of a chip.
KINDS = (
    DeviceKind(
        name="NVIDIA H100 80GB HBM3",
        short="h100",
        others=(),
        platform="gpu",
        memory=80e9,
        usable=_GPU,
        memory_bytes=3.35e12,
        link_bytes=450e9,
        host_devices=8,
        host_link_bytes=50e9,
        kernels="mosaic_gpu",
    ),
    DeviceKind(
        name="NVIDIA H200",
        short="h200",
        others=(),
        platform="gpu",
        memory=141e9,
        usable=_GPU,
        memory_bytes=4.8e12,
        link_bytes=450e9,
        host_devices=8,
        host_link_bytes=50e9,
        kernels="mosaic_gpu",
    ),
    DeviceKind(
        name="NVIDIA A100-SXM4-80GB",
        short="a100",
        others=(),
        platform="gpu",
        memory=80e9,
        usable=_GPU,
        memory_bytes=2.039e12,
        link_bytes=300e9,
        host_devices=8,
        host_link_bytes=25e9,
    ),
    DeviceKind(
        name="TPU v5e",
        short="v5e",
        others=("TPU v5 lite",),
        platform="tpu",
        memory=16e9,
        usable=_TPU,
        memory_bytes=819e9,
        link_bytes=100e9,
        host_devices=256,
        host_link_bytes=3.1e9,
        kernels="mosaic_tpu",
        torus=True,
    ),
    DeviceKind(
        name="TPU v5p",
        short="v5p",
        others=("TPU v5",),
        platform="tpu",
        memory=95e9,
        usable=_TPU,
        memory_bytes=2.765e12,
        link_bytes=200e9,
        host_devices=6144,
        host_link_bytes=6.25e9,
        kernels="mosaic_tpu",
        torus=True,
    ),
    DeviceKind(
        name="TPU v6e",
        short="v6e",
        others=("TPU v6 lite",),
        platform="tpu",
        memory=32e9,
        usable=_TPU,
        memory_bytes=1.64e12,
        link_bytes=200e9,
        host_devices=256,
        host_link_bytes=12.5e9,
        kernels="mosaic_tpu",
        torus=True,
    ),
)


@dataclass(frozen=True)
class Hardware:
    """Devices to predict for.

    kind: by the data sheet.
    machine: rates that are reached.
    host_devices: devices that the fast links join.
    measured: whether the machine's figures are measured, and not the data sheet's times a share.
    """

    kind: DeviceKind
    machine: Machine
    host_devices: int
    measured: bool

    @property
    def host_link_bytes(self) -> float:
        """Bytes a second that leave a device for other hosts."""
        return HOST_LINKS * self.kind.host_link_bytes

    @property
    def source(self) -> str:
        """Where the rates come from, for people."""
        if not self.measured:
            return "from data sheets and the shares of them that H100 and H200 reach, not measured"
        return f"rates measured with {self.machine.devices} of them, jax {self.machine.jax}"


def find_kind(text: str) -> DeviceKind | None:
    """The kind of this name, short or as JAX reports it; None where it is not known."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    for kind in KINDS:
        if plain(text) in map(plain, (kind.name, kind.short, f"tpu{kind.short}", *kind.others)):
            return kind
    return None


def hardware_of(text: str, host_devices: int = 0) -> Hardware:
    """The figures of a kind of device: measured ones where there are some.

    Args:
        text: a name, short or as JAX reports it.
        host_devices: devices that the fast links join; 0: as the vendor builds them.

    Raises:
        UserError: the kind is not known, or the number is negative.
    """
    kind = find_kind(text)
    if kind is None:
        known = ", ".join(kind.short for kind in KINDS)
        raise UserError(f"--plan-for {text!r}: no such kind of device; choose one of {known}")
    if host_devices < 0:
        raise UserError(f"--plan-host-devices {host_devices}: must be 0, for the usual, or more")
    sheet = Machine(
        device=kind.name,
        devices=kind.host_devices,
        product_flops=PRODUCTS * kind.peak_flops,
        memory_bytes=MEMORY * kind.memory_bytes,
        link_bytes=LINKS * kind.link_bytes,
        link_seconds=LINK_SECONDS,
        jax="data sheet",
    )
    found = next(filter(None, map(machine_of, (kind.name, *kind.others))), None)
    return Hardware(
        kind, _whole(found, sheet), host_devices or kind.host_devices, found is not None
    )


def _whole(found: Machine | None, sheet: Machine) -> Machine:
    """Measured figures; those of one device say nothing of links, which the data sheet does."""
    if found is None:
        return sheet
    if found.devices > 1:
        return found
    return Machine(
        found.device,
        sheet.devices,
        found.product_flops,
        found.memory_bytes,
        sheet.link_bytes,
        sheet.link_seconds,
        found.jax,
    )
