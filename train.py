"""Trains a Mixture-of-Experts language model, expert-parallel over a mesh.

python train.py                                   the tiny preset on fake CPU devices
python train.py --preset small --data.paths TEXT  one GPU
python train.py --dry-run --preset mixtral-8x7b --mesh expert=8,data=8
python train.py --run runs/NAME                   continues that run if it exists
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from moejax.cli import parse, run_main
from moejax.errors import UserError
from moejax.presets import PRESETS
from moejax.training.config import TrainConfig


def main(argv: list[str] | None = None) -> None:
    """The script: reads the flags, trains, evaluates, and says what came out."""
    config = read_flags(sys.argv[1:] if argv is None else argv)

    from sharding.mesh import make_mesh

    shape = choose_mesh(config)
    if config.dry_run:
        from sharding.planner import format_plan, plan

        print(format_plan(plan(config, shape)))
        return

    import jax

    from moejax.data.prefetch import Prefetcher
    from moejax.model.attention import choose_attention
    from moejax.training.checkpoint import Checkpoints
    from moejax.training.evaluate import Evaluator
    from moejax.training.interrupt import Interrupt
    from moejax.training.report import StepTimer
    from moejax.training.rundir import RunDir
    from moejax.training.session import Session
    from moejax.training.state import Blueprint, init_state
    from moejax.training.step import compiler_options, make_train_step
    from moejax.training.text import prepare_text

    with (
        RunDir.create_or_open(run_path(config), primary=jax.process_index() == 0) as run,
        Interrupt() as stop,
    ):
        resuming = run.bind_config(config)
        mesh = make_mesh(shape)
        device = mesh.devices.flat[0]
        attention = choose_attention(device.platform, config.model)
        blueprint = Blueprint(config.model, mesh, attention=attention)
        say(f"{shape} on {device.device_kind}; run directory {run.path}")

        text = prepare_text(config, run.load_tokenizer() if resuming else None)
        run.save_tokenizer(text.tokenizer)
        say(describe_text(text.record))

        checkpoints = Checkpoints(run.checkpoints_path, config.keep)
        session = Session(run, checkpoints, blueprint, config, text)
        state = session.restore() if resuming else None
        if state is None:
            state = jax.block_until_ready(init_state(blueprint, config.seed))
        first = int(state.step)
        run.cut_metrics(first + 1)  # rows are numbered by steps done

        options = compiler_options(config, device.platform)
        train_step = make_train_step(blueprint, config, compiler_options=options)
        evaluator = Evaluator(blueprint, config, text.windows)
        timer = StepTimer(config.steps - first, config.data.batch_size * config.data.seq_len)

        step = first
        # Metrics are read one step late, so that a device never waits for the host. Fake devices
        # share one pool of threads, in which two programs in flight may wait for each other.
        late = device.platform != "cpu"
        waiting: tuple[int, Any] | None = None
        with Prefetcher(session.batch, first) as batches:
            while step < config.steps and not stop.requested:
                state, metrics = train_step(state, next(batches), None)
                if waiting is not None:
                    session.log(*waiting, timer)
                step += 1
                waiting = (step, metrics)
                if not late:
                    session.log(*waiting, timer)
                    waiting = None
                evaluating = due(step, config.eval_every, config.steps)
                saving = due(step, config.save_every, config.steps)
                if evaluating or saving:
                    if waiting is not None:
                        session.log(*waiting, timer)
                        waiting = None
                    with timer.paused():
                        if evaluating:
                            session.evaluate(step, state, evaluator)
                        if saving:
                            session.save(state)
        if waiting is not None:
            session.log(*waiting, timer)
        with timer.paused():
            session.save(state)
            session.finish(state, evaluator, timer, stopped=step < config.steps)
        checkpoints.close()
        if step < config.steps:
            say(f"stopped after step {step}; continue with: python train.py --run {run.path}")


def read_flags(argv: list[str]) -> TrainConfig:
    """The configuration from `--preset NAME` and the other flags; flags win."""
    rest, name = [], "tiny"
    words = iter(argv)
    for word in words:
        if word == "--preset":
            name = next(words, "")
        elif word.startswith("--preset="):
            name = word.partition("=")[2]
        elif word in ("--data", "--data.paths"):
            rest.append("--data.paths")
        elif word.startswith("--vocab"):
            rest.append(word.replace("--vocab", "--data.vocab", 1))
        else:
            rest.append(word)
    presets = {preset.replace("_", "-"): make for preset, make in PRESETS.items()}
    if name.replace("_", "-") not in presets:
        raise UserError(f"--preset {name!r}: no such preset; choose one of {', '.join(presets)}")
    default = presets[name.replace("_", "-")]()
    config = parse(default, rest, prog="train.py", description=__doc__)
    needed = max(config.data.vocab, 257)  # both count the end of a document
    if not config.data.tokenizer and config.model.vocab_size < needed:
        model = dataclasses.replace(config.model, vocab_size=needed)
        config = dataclasses.replace(config, model=model)
    return config


def choose_mesh(config: TrainConfig):
    """The mesh that the flags name; `auto` lays the experts over what there is.

    Without an accelerator there are as many (fake) devices as the mesh needs, 8 for `auto`.
    """
    import jax

    from sharding.mesh import MeshShape

    named = None if config.mesh == "auto" else MeshShape.parse(config.mesh)
    if config.dry_run and named:
        return named
    jax.config.update("jax_num_cpu_devices", config.devices or (named.size if named else 8))
    if named:
        return named
    experts = config.model.moe.router.num_experts
    count = len(jax.devices())
    expert = max(n for n in range(1, min(count, experts, 8) + 1) if count % n == 0)
    return MeshShape(data=count // expert, expert=expert)


def run_path(config: TrainConfig):
    """Where the run lives: as asked for, the newest to resume, or a new directory."""
    from moejax.training.rundir import latest_run, new_run_path

    if config.run:
        return config.run
    if config.resume:
        newest = latest_run()
        if newest is None:
            raise UserError("--resume: there is no run under runs/; start one without the flag")
        return newest
    return new_run_path(name=f"{config.model.num_layers}x{config.model.d_model}")


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


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
