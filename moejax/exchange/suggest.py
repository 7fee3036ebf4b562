"""`python -m moejax.exchange.suggest`: which mode and how many chunks, by measured figures.

Predicts the forward of one layer in every mode and number of chunks (`moejax.exchange.cost`) with
the figures of a machine (`python -m sharding.measure`), and prints them, the fastest first. That
chunks travel while others are computed is predicted for programs that are compiled with
`sharding.schedule.compile_overlapped`; `train.py` does not compile its own so yet. For Hopper GPUs
it is not predicted, and mode `remote` is among the ways.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from moejax.config import ExchangeMode, MoEConfig
from moejax.errors import UserError
from moejax.exchange.budget import Budget, choose_for
from moejax.exchange.cost import Prediction, Work, predict
from sharding.machine import Machine, machine_of, read_machine

__all__ = ["main", "suggest"]

CHUNKS = (1, 2, 4, 8)


def suggest(
    config: MoEConfig,
    machine: Machine,
    *,
    d_model: int,
    dtype: str,
    tokens: int,
    devices: int,
    tensor: int = 1,
) -> list[tuple[Budget, Prediction]]:
    """Every way to run a layer's exchange, the fastest first; of equals the simplest.

    Args:
        config: of the layer; its mode and chunks are not looked at.
        machine: figures of the devices and their links.
        d_model: D.
        dtype: of the rows and the weights.
        tokens: T of a device.
        devices: G along `expert`, all of one host.
        tensor: devices that an expert's hidden width is split over.

    Raises:
        UserError: the figures are of one device and say nothing of links, or there are more devices
            than experts.
        NotImplementedError: the exchange is one between hosts.
    """
    if devices > machine.devices == 1:
        raise UserError(
            f"{machine.device!r} was measured with 1 device: the links between {devices} are not "
            "known; measure again with several"
        )
    hidden = -(-config.experts.hidden // tensor)
    work = Work(d_model, hidden, config.experts.num_in, dtype, config.exchange.wire)
    modes: tuple[ExchangeMode, ...] = ("ring", "all_to_all") if devices > 1 else ("local",)
    budgets: dict[Budget, None] = {}  # each once, in order
    ways_to_go = list(product(CHUNKS, modes))
    if devices > 1 and _kernels_send_rows(config, machine, dtype):
        ways_to_go.append((1, "remote"))
    for chunks, mode in ways_to_go:
        exchange = replace(config.exchange, mode=mode, chunks=chunks)
        layer = replace(config, exchange=exchange)
        budgets[choose_for(layer, tokens=tokens, devices=devices)] = None
    ways = [(budget, predict(budget, work, machine)) for budget in budgets]
    return sorted(ways, key=lambda way: way[1].total)


def _kernels_send_rows(config: MoEConfig, machine: Machine, dtype: str) -> bool:
    """Whether mode `remote` runs as it is predicted."""
    exchange = config.exchange
    exact = all(form == "compute" for form in exchange.wire.formats)
    exact = exact and config.experts.together == 1
    one_host = exchange.host_devices is None
    return machine.hopper and dtype == "bfloat16" and exact and one_host and not config.experts.bias


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    from moejax.presets import PRESETS

    names = [name.replace("_", "-") for name in PRESETS]
    parser = ArgumentParser(prog="python -m moejax.exchange.suggest")
    parser.description = "Predicts a layer's forward in each mode and number of chunks."
    parser.add_argument("--preset", choices=names, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="of a device at once")
    parser.add_argument("--devices", type=int, required=True, help="along expert, of one host")
    parser.add_argument("--tensor", type=int, default=1, help="devices along tensor")
    parser.add_argument(
        "--machine", type=Path, help="figures written by python -m sharding.measure"
    )
    arguments = parser.parse_args(argv)
    try:
        for line in _lines(arguments):
            print(line)
    except (UserError, NotImplementedError) as error:
        sys.exit(f"suggest: {error}")


def _lines(arguments) -> list[str]:
    from moejax.presets import PRESETS

    model = PRESETS[arguments.preset.replace("-", "_")]().model
    if arguments.tokens < 1 or arguments.devices < 1 or arguments.tensor < 1:
        raise UserError("tokens, devices and tensor: each is at least 1")
    machine = _machine(arguments.machine)
    ways = suggest(
        model.moe,
        machine,
        d_model=model.d_model,
        dtype=model.compute_dtype,
        tokens=arguments.tokens,
        devices=arguments.devices,
        tensor=arguments.tensor,
    )
    lines = [f"{'mode':<12}{'chunks':>6}{'ms':>9}   of a chunk: dispatch, experts, combine"]
    for budget, time in ways:
        parts = (time.dispatch, time.experts, time.combine)
        chunk = ", ".join(f"{1e3 * part:.3f}" for part in parts)
        lines.append(f"{budget.mode:<12}{budget.chunks:>6}{1e3 * time.total:>9.3f}   {chunk}")
    best = ways[0][0]
    flags = f"--model.moe.exchange.mode {best.mode} --model.moe.exchange.chunks {best.chunks}"
    compiled = (
        " for programs compiled with sharding.schedule.compile_overlapped (train.py does not yet)"
    )
    return [*lines, f"fastest, as predicted{'' if machine.hopper else compiled}: {flags}"]


def _machine(path: Path | None) -> Machine:
    import jax

    if path is not None:
        return read_machine(path)
    device = jax.devices()[0].device_kind
    machine = machine_of(device)
    if machine is None:
        raise UserError(
            f"no figures of {device!r}: run python -m sharding.measure here, or name a file with "
            "--machine"
        )
    return machine


if __name__ == "__main__":
    main()
