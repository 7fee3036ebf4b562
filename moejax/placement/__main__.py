"""Plans and measures placements from routing traces, and routing that knows them from texts.

python -m moejax.placement plan --trace FILE --devices 8 --out plan.npz
python -m moejax.placement measure --trace FILE --plan plan.npz
python -m moejax.placement sweep --devices 8 --loss-budget 2% --out sweep.json --picture sweep.png
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

from moejax.cli import parse, run_main
from moejax.errors import UserError
from moejax.placement import sweep
from moejax.placement.arrays import slots_at_home
from moejax.placement.choice_reference import reference
from moejax.placement.evaluate import Measures, mean_of, measure_trace
from moejax.placement.plan_file import read_slots, write_slots
from moejax.placement.planner import HOST_WEIGHT, plan
from moejax.placement.statistics import statistics_of
from moejax.placement.sweep_config import SweepConfig
from moejax.placement.topology import Topology
from moejax.placement.trace import Trace, read_trace

__all__ = ["MeasureConfig", "PlanConfig", "main"]

_PROG = "python -m moejax.placement"
_File = Annotated[str, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class PlanConfig:
    """Plans where experts live, from what tokens chose.

    Attributes:
        trace: .npz with `experts` [tokens, layers, choices] and `lens`, tokens of each document.
        out: .npz to write.
        devices: devices along `expert`.
        slots: of a device; 0: just enough.
        hosts: of equal size, in order.
        speeds: of the devices, in any unit; none: alike.
        room: how many slots of each device may be filled; none: all.
        load_cap: the largest device load over the mean.
        host_weight: what a remote host costs, in remote devices.
        present: .npz of the placement now.
        most_moved: experts of a layer that may change their device; −1: any.
        seconds: time for all layers; 0: a first plan; −1: as long as most of the gain takes.
        held_out: share of the documents that the plan does not see and is measured on.
        seed: of the search, and of dividing the documents.
    """

    trace: _File = ""
    out: _File = "plan.npz"
    devices: int = 8
    slots: int = 0
    hosts: int = 1
    speeds: tuple[float, ...] = ()
    room: tuple[int, ...] = ()
    load_cap: float = 1.05
    host_weight: float = HOST_WEIGHT
    present: _File = ""
    most_moved: int = -1
    seconds: float = -1.0
    held_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out {self.held_out}: must lie between 0 and 1")
        if self.seed < 0 or self.slots < 0 or self.devices < 1:
            raise UserError(
                f"--seed {self.seed} --slots {self.slots} --devices {self.devices}: must not be "
                "negative, and there must be a device"
            )


@dataclass(frozen=True)
class MeasureConfig:
    """Measures a placement on what tokens chose.

    Attributes:
        trace: .npz with `experts` [tokens, layers, choices] and `lens`, tokens of each document.
        plan: .npz that `plan` wrote.
        hosts: of equal size, in order.
    """

    trace: _File = ""
    plan: _File = "plan.npz"
    hosts: int = 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_main(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> None:
    if argv[:1] == ["plan"]:
        _plan(parse(PlanConfig(), argv[1:], f"{_PROG} plan"))
    elif argv[:1] == ["measure"]:
        _measure(parse(MeasureConfig(), argv[1:], f"{_PROG} measure"))
    elif argv[:1] == ["sweep"]:
        _sweep(parse(SweepConfig(), argv[1:], f"{_PROG} sweep"))
    elif argv in (["-h"], ["--help"]):
        print(__doc__)
    else:
        raise UserError(
            f"{argv[0] if argv else 'no mode'}: write {_PROG} plan, measure or sweep; see --help"
        )


def _plan(config: PlanConfig) -> None:
    whole = _open(config.trace)
    seen, unseen = whole, whole
    if config.held_out:
        seen, unseen = whole.split(1 - config.held_out, config.seed)
    even = Topology.even(whole.num_experts, config.devices, config.hosts)
    topology = Topology(
        config.devices,
        config.slots or max(even.slots, *config.room, 0),
        even.hosts,
        config.speeds or None,
        config.room or None,
    )
    present_LP = None
    if config.present:
        present_LP, devices = read_slots(config.present)
        if devices != config.devices:
            raise UserError(f"{config.present}: is for {devices} devices, not {config.devices}")
    statistics = statistics_of(seen)
    began = time.monotonic()
    found = plan(
        statistics,
        topology,
        load_cap=config.load_cap,
        host_weight=config.host_weight,
        present_LP=present_LP,
        most_moved=None if config.most_moved < 0 else config.most_moved,
        seconds=None if config.seconds < 0 else config.seconds,
        seed=config.seed,
    )
    took = (time.monotonic() - began) / whole.num_layers
    write_slots(config.out, found.slots_LP, config.devices)
    print(f"{whole.num_layers} layers, {1e3 * took:.1f} ms each; cut {found.cut_L.mean():.3f}")
    if present_LP is not None:
        print(f"experts that move: {found.moved_L.mean():.1f} a layer")
    lacking = np.flatnonzero(~found.load_kept_L)
    if len(lacking):
        print(
            f"load cap {config.load_cap} not kept in layers {' '.join(map(str, lacking))}: "
            f"up to {found.load_L.max():.2f}; replicas would help"
        )
    told = "unseen documents" if config.held_out else "the trace itself"
    _tell(f"planned, on {told}", measure_trace(unseen, found.slots_LP, topology))
    if present_LP is not None:
        _tell("present", measure_trace(unseen, present_LP, topology))
        return
    home_LP = np.tile(slots_at_home(whole.num_experts, even.devices), (whole.num_layers, 1))
    _tell("contiguous", measure_trace(unseen, home_LP, even))


def _measure(config: MeasureConfig) -> None:
    trace = _open(config.trace)
    slots_LP, devices = read_slots(config.plan)
    if len(slots_LP) != trace.num_layers:
        raise UserError(
            f"{config.plan}: has {len(slots_LP)} layers, {config.trace} {trace.num_layers}; plan "
            "from a trace of the same model"
        )
    hosts = Topology.even(devices, devices, config.hosts).hosts
    topology = Topology(devices, slots_LP.shape[1] // devices, hosts)
    counts = [np.bincount(s[s >= 0], minlength=trace.num_experts) for s in slots_LP]
    if any(len(count) > trace.num_experts or (count < 1).any() for count in counts):
        raise UserError(
            f"{config.plan}: does not hold each of the {trace.num_experts} experts of "
            f"{config.trace}; plan from a trace of the same model"
        )
    replicated = any((count > 1).any() for count in counts)
    measures = measure_trace(trace, slots_LP, topology, choose=reference if replicated else None)
    for layer, one in enumerate(measures):
        _tell(f"layer {layer}", [one])
    _tell("mean", measures)


def _sweep(config: SweepConfig) -> None:
    import jax

    # A program that called `main` may have started its devices; `make_mesh` tells if they are few.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", config.devices)
    sweep.run(config, lambda line: print(line, flush=True))


def _open(path: str) -> Trace:
    if not path:
        raise UserError("--trace FILE: give a file with the choices of a router")
    return read_trace(path)


def _tell(name: str, measures: Sequence[Measures]) -> None:
    mean = mean_of(measures)
    print(
        f"{name}: fan-out {mean.fanout:.3f}, remote sends {mean.remote_sends:.3f}, "
        f"remote hosts {mean.remote_hosts:.3f}, load max/mean {mean.load_max_mean:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
