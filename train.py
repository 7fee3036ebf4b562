"""Trains a Mixture-of-Experts language model, expert-parallel over a mesh.

python train.py                                   the tiny preset on fake CPU devices
python train.py --preset small --data TEXT        one GPU
python train.py --dry-run --preset mixtral-8x7b --mesh expert=8,data=8
python train.py --dry-run --preset mixtral-8x7b --plan-for h100 --plan-devices 64
python train.py --init-from FOLDER --data TEXT    begins with a model's weights
python train.py --run runs/NAME                   continues that run if it exists
python train.py --run runs/NAME --replay FILE     looks into a batch that the run has kept
python train.py --distributed                     one of the processes of a cluster's job
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moejax.cli import parse, run_main
from moejax.errors import AgreedError, UserError
from moejax.presets import PRESETS
from moejax.training.config import TrainConfig
from moejax.training.config_json import config_to_json
from moejax.training.init_from import check_initialised, starting_config, tokenizer_of_weights
from sharding.distributed import (
    check_same,
    fails_together,
    fake_devices,
    from_first,
    is_first,
    joined,
    say,
)
from sharding.join_flags import JoinFlags
from sharding.plan_flags import PlanFlags

if TYPE_CHECKING:
    from sharding.mesh import MeshShape

_DESCRIPTION = "Trains a Mixture-of-Experts language model, expert-parallel over a mesh."
PRESET_NAMES = tuple(name.replace("_", "-") for name in PRESETS)

FIXED = (
    *("model", "init_from", "seed"),
    *(f"data.{name}" for name in ("vocab", "tokenizer", "seq_len", "batch_size")),
    *(f"data.{name}" for name in ("held_out", "held_out_paths")),
)
"""What a run keeps when it is continued: the weights' shapes and which tokens a step reads."""

FREE = (
    *("model.scan_layers", "model.remat"),
    *(
        f"model.moe.exchange.{name}"
        for name in ("mode", "bucket_rows", "bucket_slack", "chunks", "reserve_sms", "host_devices")
    ),
)
"""Of those, what belongs to the machine and not to the model."""


def main(argv: list[str] | None = None) -> int:
    """The script; returns the exit code."""
    return run_main(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    config, joining, planning = read_all_flags(argv)
    with joined(joining):
        train(config, planning, argv)


def train(config: TrainConfig, planning: PlanFlags | None = None, argv: Sequence[str] = ()) -> None:
    """Trains, evaluates, and says what came out.

    Args:
        config: the run.
        planning: what a dry run predicts for.
        argv: the command line, for the one that a dry run recommends.

    Raises:
        UserError: whatever a user can mend.
    """
    from moejax.training.host_memory import keep_freed_memory
    from sharding.compression.hosts import contradiction
    from sharding.mesh import hosts_along_expert, hosts_of_devices, make_mesh, runs_in_turn

    keep_freed_memory()
    check_same("flags", config_to_json(config), "start all processes with the same ones")
    shape = choose_mesh(config)
    if config.dry_run:
        from sharding.dry_run import dry_run

        for line in dry_run(config, shape, planning or PlanFlags(), argv):
            say(line)
        return

    from moejax.data.prefetch import Prefetcher
    from moejax.model.attention import choose_attention
    from moejax.training.checkpoint import Checkpoints
    from moejax.training.evaluate import Evaluator
    from moejax.training.interrupt import AgreedStop, Interrupt
    from moejax.training.report import StepTimer, explain_layer
    from moejax.training.residuals import make_reducer
    from moejax.training.rundir import RunDir
    from moejax.training.session import Session
    from moejax.training.state import Blueprint
    from moejax.training.step import compiler_options, make_train_step
    from moejax.training.text import prepare_text

    # What may be refused comes before the run's record is written.
    mesh = make_mesh(shape)
    device = mesh.devices.flat[0]
    attention = choose_attention(device.platform, config.model, deterministic=config.deterministic)
    blueprint = Blueprint(config.model, mesh, hosts_along_expert(mesh), attention)
    check_batch(config, shape)
    if config.replay:
        from moejax.training.replay import replay

        for line in replay(config, blueprint, config.replay):
            say(line)
        return
    reducer = make_reducer(blueprint, config)

    with (
        RunDir.create_or_open(run_path(config), primary=is_first()) as run,
        Checkpoints(run.checkpoints_path, config.keep) as checkpoints,
        Interrupt() as signals,
        fails_together(),
    ):
        run.check_shared()
        stop = AgreedStop(signals, mesh)
        say(f"{shape} on {device.device_kind}; run directory {run.path}")
        if device.platform != "cpu":
            for line in explain_layer(config, shape):
                say(line)
        wrong = contradiction(config.grad_compression.hosts, hosts_of_devices(mesh))
        for line in filter(None, (reducer.explain(), wrong)):
            say(line)
        # Process 0 decides: what it writes from here on others may see early or late.
        resuming = from_first("resuming", run.check_config(config, FIXED, FREE))
        tokenizer = run.load_tokenizer() if resuming else None
        text = prepare_text(config, tokenizer or tokenizer_of_weights(config))
        check_same("text", text.record, "give all hosts the same files and the same packages")
        say(describe_text(text.record))
        session = Session(run, checkpoints, blueprint, config, text)
        state = session.restore() if resuming else None
        if state is None:
            state = session.begin()
        state = session.start_counting(state)
        run.bind_config(config, FIXED, FREE)
        run.save_tokenizer(text.tokenizer)
        first = int(state.step)
        run.cut_metrics(first + 1)  # rows are numbered by steps done

        options = compiler_options(config, device.platform)
        train_step = make_train_step(blueprint, config, compiler_options=options)
        evaluator = Evaluator(
            blueprint,
            text.windows,
            batch_size=config.data.batch_size,
            loss_chunk=config.loss_chunk,
        )
        timer = StepTimer(config.steps - first, config.data.batch_size * config.data.seq_len)

        step = first
        # Metrics are read one step late, so that a device never waits for the host.
        late = not runs_in_turn(blueprint.mesh)
        waiting: tuple[int, Any] | None = None
        with Prefetcher(session.batch, first) as batches:
            while step < config.steps and session.stopped is None and not stop.agreed():
                state, metrics = train_step(state, next(batches), session.placing.arrays)
                if waiting is not None:
                    session.log(*waiting, timer)
                step += 1
                waiting = (step, metrics)
                if not late:
                    session.log(*waiting, timer)
                    waiting = None
                evaluating = due(step, config.eval_every, config.steps)
                saving = due(step, config.save_every, config.steps)
                counted = due(step, config.placement_stats_every, config.steps)
                counted &= config.placement_stats
                looking = session.placing.is_due(step)
                if evaluating or saving or counted or looking:
                    if waiting is not None:
                        session.log(*waiting, timer)
                        waiting = None
                    if session.stopped is not None:
                        break
                    with timer.paused():
                        if evaluating:
                            session.evaluate(step, state, evaluator)
                        if saving:
                            session.save(state)
                        if counted:
                            session.write_placement_stats(state)
                        if looking:
                            session.placing.look(step, state)
        if waiting is not None:
            session.log(*waiting, timer)
        with timer.paused():
            session.save(state)
            session.write_placement_stats(state)
            unfinished = step < config.steps or session.stopped is not None
            session.finish(state, evaluator, timer, stopped=unfinished or stop.at_last())
        if session.stopped is not None:
            checkpoints.wait()  # what is told to be there
            raise AgreedError(session.stopped)
        if unfinished:
            path = shlex.quote(str(run.path))
            say(f"stopped after step {step}; continue with: python train.py --run {path}")


@dataclass(frozen=True)
class TrainFlags(PlanFlags, JoinFlags, TrainConfig):
    """A run, what its flags start from, how this process joins others, and what is planned for.

    Attributes:
        preset: name of the preset.
    """

    preset: Annotated[
        str,
        tyro.conf.arg(
            metavar="NAME",
            help=f"What the other flags start from: {', '.join(PRESET_NAMES)}. A run that is "
            "continued starts from its own flags instead.",
        ),
    ] = ""


def read_flags(argv: list[str]) -> TrainConfig:
    """The configuration of `read_all_flags`."""
    return read_all_flags(argv)[0]


def read_all_flags(argv: list[str]) -> tuple[TrainConfig, JoinFlags, PlanFlags]:
    """The configuration from a preset, or the run that is continued, and the flags, which win.

    Returns:
        the configuration, how this process joins others, and what a dry run predicts for.

    Raises:
        UserError: a flag or a value does not fit, or the run's own record cannot be read.
    """
    default, name = starting_point(argv)
    values = {f.name: getattr(default, f.name) for f in dataclasses.fields(TrainConfig)}
    flags = parse(TrainFlags(**values, preset=name), argv, "train.py", _DESCRIPTION)
    config = TrainConfig(**{name: getattr(flags, name) for name in values})
    joining = JoinFlags(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(JoinFlags)})
    joining.check_joining()
    planning = PlanFlags(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(PlanFlags)})
    planning.check_planning(config.dry_run)
    config.grad_compression.check_read(default.grad_compression)
    if config.init_from:
        if not default.run:
            check_initialised(config, default)
        config = dataclasses.replace(config, init_from=str(Path(config.init_from).absolute()))
        return config, joining, planning
    needed = max(config.data.vocab, 257)  # both count the end of a document
    if not config.data.tokenizer and config.model.vocab_size < needed:
        model = dataclasses.replace(config.model, vocab_size=needed)
        config = dataclasses.replace(config, model=model)
    return config, joining, planning


def starting_point(argv: list[str]) -> tuple[TrainConfig, str]:
    """The configuration that the flags change, and the preset's name or empty.

    Raises:
        UserError: there is no such preset, or the folder to begin with cannot be used.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--run", "--init-from", "--init_from"):
        parser.add_argument(flag, nargs="?", const="")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    known, _ = parser.parse_known_args(argv)
    if known.preset is None:
        from moejax.training.rundir import RunDir, latest_run

        run = Path(known.run) if known.run else latest_run() if known.resume else None
        if run is not None and (run / "config.json").exists():
            stored = RunDir(run).read_config(TrainConfig)
            return dataclasses.replace(
                stored, run=str(run), resume=False, dry_run=False, replay=""
            ), ""
        if known.init_from:
            return starting_config(known.init_from, None), ""
    name = (known.preset if known.preset is not None else "tiny").replace("_", "-")
    if name not in PRESET_NAMES:
        raise UserError(
            f"--preset {known.preset!r}: no such preset; choose one of {', '.join(PRESET_NAMES)}"
        )
    preset = PRESETS[name.replace("-", "_")]()
    return starting_config(known.init_from, preset) if known.init_from else preset, name


def choose_mesh(config: TrainConfig) -> MeshShape:
    """The mesh that the flags name; `auto` lays the experts over the devices, two or more on each.

    Without an accelerator there are as many (fake) devices as the mesh needs, 8 for `auto`.
    """
    import jax

    from sharding.mesh import MeshShape

    named = None if config.mesh == "auto" else MeshShape.parse(config.mesh)
    if config.dry_run and named:
        return named
    # A program that called `main` may have started its devices; `make_mesh` tells if they are few.
    total = config.devices or (named.size if named else 8)
    here = fake_devices(total, asked=bool(config.devices))
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", here)
    if named:
        return named
    experts = config.model.fewest_experts
    count = len(jax.devices())
    some = range(1, min(count, max(1, experts // 2), 8) + 1)
    fitting = (n for n in some if count % n == 0 and config.model.holds_experts(n))
    expert = max(fitting, default=1)
    return MeshShape(data=count // expert, expert=expert)


def check_batch(config: TrainConfig, shape: MeshShape) -> None:
    """Every device gets equally many examples of a microbatch.

    Raises:
        UserError: they cannot be split so.
    """
    parts, batch = shape.data * shape.expert * config.accumulate, config.data.batch_size
    if batch % parts:
        fitting = -(-batch // parts) * parts
        raise UserError(
            f"batch_size={batch}: must be a multiple of data × expert × accumulate = {shape.data} "
            f"× {shape.expert} × {config.accumulate} = {parts}; pass --data.batch-size {fitting}"
        )


def run_path(config: TrainConfig) -> str | Path:
    """Where the run lives: as asked for, the newest to resume, or a new directory.

    All processes get what process 0 finds: clocks differ.
    """
    from moejax.training.rundir import latest_run, new_run_path

    path: str | Path | None = config.run
    if not path and config.resume:
        path = latest_run()
        if path is None:
            raise UserError("--resume: there is no run under runs/; start one without the flag")
    path = path or new_run_path(name=f"{config.model.num_layers}x{config.model.d_model}")
    return from_first("run directory", str(path))


def describe_text(record: dict) -> str:
    """One line about the data."""
    return (
        f"{record['training_bytes'] / 1e6:.1f} MB of training text, "
        f"{record['training_tokens'] / 1e6:.1f} M tokens; {record['held_out_bytes'] / 1e6:.2f} MB "
        f"in {record['held_out_files']} held-out files; sha256 {record['corpus_sha256'][:12]}"
    )


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, but not at the end, is due."""
    return bool(every) and step % every == 0 and step < last


if __name__ == "__main__":
    sys.exit(main())
