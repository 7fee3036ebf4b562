"""What `train.py --dry-run` prints: the plan of a run, its predicted step, recommended layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax

from moejax.errors import UserError
from moejax.training.config import TrainConfig
from sharding.device_kinds import KINDS, Hardware, find_kind, hardware_of
from sharding.mesh import MeshShape
from sharding.plan_flags import PlanFlags
from sharding.planner import format_plan, plan
from sharding.recommend import recommend
from sharding.recommend_text import format_prediction, format_recommendation
from sharding.step_time import predict_plan

__all__ = ["dry_run"]

REPLACED = (
    *("--mesh", "--accumulate", "--model.remat"),
    *("--model.moe.exchange.chunks", "--model.moe.exchange.host-devices"),
)
"""Flags that a recommended layout gives anew."""


def dry_run(
    config: TrainConfig, mesh: MeshShape, flags: PlanFlags, argv: Sequence[str]
) -> Iterator[str]:
    """The lines, one after the other, since some take seconds.

    Args:
        config: the run.
        mesh: that it asks for.
        flags: what it is planned for.
        argv: words of the command line, from which that of a recommended layout is made.

    Raises:
        UserError: the run does not fit the mesh, the kind of device is not known, or no rates are
            known for the run's dtype.
    """
    hardware = _hardware(flags)
    local = jax.local_devices()[0]
    made = plan(
        config,
        mesh,
        platform=hardware.kind.platform if hardware else local.platform,
        kernels=hardware.kind.kernels if hardware else "",
    )
    predicted, reason = None, ""
    if hardware is None:
        known = ", ".join(kind.short for kind in KINDS)
        reason = f"{local.device_kind!r} is none of those with known rates: --plan-for {known}"
    else:
        try:
            predicted = predict_plan(made, hardware)
        except UserError as error:
            if flags.plan_for:
                raise
            reason = str(error)
    yield format_plan(made)
    yield ""
    if predicted is None:
        yield f"no step time is predicted: {reason}"
        return
    assert hardware is not None
    limit = None if flags.plan_for else made.device_memory
    needed = made.memory.total if limit is None else None
    yield from format_prediction(predicted, hardware, mesh.size, needed)
    if flags.plan_devices:
        found = recommend(config, hardware, flags.plan_devices, limit=limit)
        yield ""
        yield from format_recommendation(found, ["python", "train.py", *_without(argv)])


def _hardware(flags: PlanFlags) -> Hardware | None:
    """What to predict for; None where the machine here is none that is known."""
    if flags.plan_for:
        return hardware_of(flags.plan_for, flags.plan_host_devices)
    here = jax.local_devices()[0].device_kind
    if find_kind(here) is not None:
        return hardware_of(here, flags.plan_host_devices)
    if flags.plan_devices:
        known = ", ".join(kind.short for kind in KINDS)
        raise UserError(
            f"--plan-devices {flags.plan_devices}: of {here!r}, the devices here, no rates are "
            f"known; add --plan-for with one of {known}"
        )
    return None


def _without(argv: Sequence[str]) -> list[str]:
    """The words of a command line that also run what was planned."""
    kept, skip = [], False
    for word in argv:
        name = word.split("=")[0].replace("_", "-")
        if skip and not word.startswith("--"):
            continue
        skip = name.startswith("--plan-") or name in REPLACED
        if not skip and name not in ("--dry-run", "--no-dry-run"):
            kept.append(word)
        skip = skip and "=" not in word
    return kept
