"""Flags that make routing prefer near experts, in the place of what the model's config says."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moejax.errors import UserError
from moejax.locality_config import LocalityConfig

if TYPE_CHECKING:
    from moejax.config import ModelConfig
    from moejax.inference.source import ModelSource
    from moejax.serving.flags import ModelFlags
    from sharding.mesh import MeshShape

__all__ = ["check_deterministic", "with_locality"]

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
    if not values:
        return source
    told = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in values.items())
    config = source.config
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
            "what a text gets depends on its device, and that on the other texts; set "
            "--locality-penalty 0 and the like, use one device, or leave --deterministic out"
        )
