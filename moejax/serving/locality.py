"""Flags that make routing prefer near experts, in the place of what the model's config says."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from moejax.errors import UserError
from moejax.locality_config import LocalityConfig

if TYPE_CHECKING:
    from moejax.config import ModelConfig
    from moejax.inference.source import ModelSource
    from moejax.serving.flags import ModelFlags
    from sharding.mesh import MeshShape

__all__ = ["check_deterministic", "check_limits", "with_locality"]

_FIELDS = {
    "locality_penalty": "device_penalty",
    "locality_host_penalty": "host_penalty",
    "local_threshold": "local_threshold",
    "max_devices": "max_devices",
}


def with_locality(source: ModelSource, flags: ModelFlags) -> ModelSource:
    """The model with the flags' fields of `LocalityConfig`; without such flags as it is.

    Raises:
        UserError: a value is out of range, or the model has no experts.
    """
    values = {flag: getattr(flags, flag) for flag in _FIELDS}
    values = {flag: value for flag, value in values.items() if value is not None}
    told = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in values.items())
    config = source.config
    if flags.locality == "off":
        if values:
            raise UserError(f"--locality off with {told}: leave one of them out")
        moe = dataclasses.replace(config.moe, locality=LocalityConfig())
        return dataclasses.replace(source, config=dataclasses.replace(config, moe=moe))
    if not values:
        return source
    if not any(layer.moe is not None for layer in config.layers()):
        raise UserError(f"{told}: the model has no experts; leave the flags out")
    try:
        changed = {_FIELDS[flag]: value for flag, value in values.items()}
        locality: LocalityConfig = dataclasses.replace(config.moe.locality, **changed)
        moe = dataclasses.replace(config.moe, locality=locality)
    except UserError as error:
        raise UserError(f"{told}: {error}") from None
    return dataclasses.replace(source, config=dataclasses.replace(config, moe=moe))


def check_deterministic(model: ModelConfig, shape: MeshShape, deterministic: bool) -> None:
    """Refuses a text whose experts would depend on the device that it happens to be on.

    Raises:
        UserError: deterministic, while routing looks at distances on several devices.
    """
    if deterministic and model.moe.locality.active and shape.expert > 1:
        raise UserError(
            f"--deterministic with expert={shape.expert} and a model that prefers near experts: "
            "what a text gets depends on its device, and that on the other texts; take "
            "--locality off, use one device, or leave --deterministic out"
        )


def check_limits(model: ModelConfig, shape: MeshShape, slots: int | None) -> list[str]:
    """Refuses limits that leave a token too few experts, and tells what changes nothing.

    Args:
        model: with the flags' fields.
        shape: of the mesh.
        slots: of a device; None: as many as home needs.

    Returns:
        lines for the user.

    Raises:
        UserError: the limited devices or hosts have too few slots.
    """
    from moejax.layer import hosts_along_experts
    from moejax.placement.arrays import slots_at_home
    from moejax.routing.locality import check_room

    locality, devices = model.moe.locality, shape.expert
    if not locality.active or not any(layer.moe is not None for layer in model.layers()):
        return []
    if devices == 1:
        return ["routing prefers near experts, and on expert=1 all are near: nothing changes"]
    hosts = hosts_along_experts(model.moe, devices, None) or (0,) * devices
    for layer in model.layers():
        if layer.moe is not None:
            slots_P = slots_at_home(layer.moe.router.num_experts, devices)
            if slots is not None:
                slots_P = np.zeros(slots * devices, np.int32)
            check_room(locality, layer.moe.router.top_k, slots_P, hosts)
    lines = []
    if locality.max_devices is not None and locality.max_devices >= devices:
        lines.append(f"max_devices={locality.max_devices} of expert={devices}: limits nothing")
    if locality.host_penalty > locality.device_penalty and len(set(hosts)) == 1:
        lines.append(f"host_penalty={locality.host_penalty}: all devices are on one host")
    return lines
