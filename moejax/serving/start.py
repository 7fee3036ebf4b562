"""From flags to a model that runs: devices, mesh, weights, engine."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.progress import NowAndThen
from moejax.serving.flags import EngineFlags, ModelFlags
from moejax.serving.locality import check_deterministic, check_limits, with_locality

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moejax.config import ModelConfig
    from moejax.data.tokenizer import Tokenizer
    from moejax.inference.engine import Engine, EngineSettings
    from moejax.inference.source import ModelSource
    from moejax.serving.loop import EngineLoop
    from moejax.serving.text_model import TextModel
    from moejax.training.state import Blueprint
    from sharding.mesh import MeshShape

__all__ = [
    "keep_compiled_programs",
    "load_model",
    "make_engine",
    "note",
    "reading_notes",
    "running_loop",
    "running_model",
    "start_devices",
]


def start_devices(flags: ModelFlags, model: ModelConfig) -> MeshShape:
    """The mesh that the flags name, after making the (fake) devices it needs.

    Raises:
        UserError: the text names no mesh.
    """
    import jax

    from sharding.mesh import MeshShape

    named = None if flags.mesh == "auto" else MeshShape.parse(flags.mesh)
    wanted = flags.devices or (named.size if named else 1)
    # A program that called `main` may have started its devices; `make_mesh` tells if they are few.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", wanted)
    if named is not None:
        return named
    return MeshShape(expert=min(len(jax.devices()), model.moe.router.num_experts))


def load_model(
    source: ModelSource, shape: MeshShape, dtype: str, expert_weights: str = "none"
) -> tuple[Blueprint, Any, Any]:
    """The model on the mesh: blueprint, weights split by their use, selection biases.

    Raises:
        UserError: the mesh does not fit, or the weights are damaged or of another model.
    """
    import jax.numpy as jnp

    from moejax.inference.expert_weights import quantized_blueprint, quantizing
    from moejax.model.attention import choose_attention
    from moejax.training.state import Blueprint, load_weights
    from sharding.mesh import make_mesh

    mesh = make_mesh(shape)
    model = source.config
    platform = mesh.devices.flat[0].platform
    if dtype == "auto":
        # Few CPUs multiply bfloat16 any faster.
        dtype = "float32" if platform == "cpu" else model.compute_dtype
    chosen: Any = dtype
    model = dataclasses.replace(model, compute_dtype=chosen)
    blueprint = Blueprint(model, mesh, attention=choose_attention(platform, model))
    if expert_weights == "none":
        return blueprint, *load_weights(source.weights(blueprint), blueprint, jnp.dtype(dtype))
    # Each matrix is quantized as soon as it is read: there is never room for all of them.
    quantized = quantized_blueprint(blueprint, expert_weights)
    flat = source.weights(blueprint, quantizing(quantized, expert_weights))
    return quantized, *load_weights(flat, quantized, jnp.dtype(dtype))


def make_engine(
    source: ModelSource,
    flags: EngineFlags,
    settings: EngineSettings | None = None,
    *,
    measure: bool = False,
) -> Engine:
    """The engine that the flags ask for.

    Args:
        source: the model.
        flags: how it runs.
        settings: of the engine; None takes those of the flags.
        measure: let `--decode-exchange auto` measure. Else, with deterministic settings, which
            should not depend on a clock, and on fake devices it takes a fixed one.

    Raises:
        UserError: whatever a user can mend.
    """
    from moejax.inference.engine import Engine
    from moejax.inference.exchange_choice import UNMEASURED
    from moejax.inference.placement_choice import choose_placement
    from moejax.inference.placing import ServingPlacement
    from moejax.serving.text_model import end_ids

    settings = settings or flags.engine_settings()
    source = with_locality(source, flags)
    shape = start_devices(flags, source.config)
    check_deterministic(source.config, shape, settings.deterministic)
    keep_compiled_programs()
    placement = choose_placement(
        flags.placement,
        source.config,
        shape,
        replicas=flags.replicas,
        every=flags.rebalance_every,
        folder=flags.placement_log,
        deterministic=settings.deterministic,
    )
    slots = None if placement is None else placement.slots(shape.expert)
    for line in check_limits(source.config, shape, slots):
        note(line)
    blueprint, params, biases = load_model(source, shape, flags.dtype, flags.expert_weights)
    placing = None
    if placement is not None:
        placing = ServingPlacement(blueprint, params, placement, tell=note)
        blueprint, params = placing.blueprint, placing.params
    engine = Engine(
        blueprint,
        params,
        biases,
        num_ids=None if source.tokenizer is None else source.tokenizer.vocab_size,
        end_ids=end_ids(source),
        settings=settings,
        placing=placing,
    )
    wanted = settings.max_len or source.config.max_context
    if engine.max_len < wanted:
        why = f"--pages {settings.pages} hold" if settings.pages else "the free memory holds"
        note(f"texts of at most {engine.max_len} tokens, not {wanted}: {why} no more")
    how = flags.decode_exchange
    measure = measure and not settings.deterministic and _have_speeds(blueprint.mesh)
    if how == "auto" and not measure:
        how = UNMEASURED
    picked = engine.pick_exchange(how)
    if picked is not None and picked.seconds:
        note(str(picked))
    return engine


def _have_speeds(mesh: Mesh) -> bool:
    """Whether its devices have speeds of their own; fake ones share a processor."""
    return mesh.devices.flat[0].platform != "cpu"


@contextlib.contextmanager
def running_loop(engine: Engine, tokenizer: Tokenizer) -> Iterator[EngineLoop]:
    """The loop that runs an engine, ended with the context."""
    from moejax.serving.loop import EngineLoop

    loop = EngineLoop(engine, tokenizer).start()
    try:
        yield loop
    finally:
        loop.stop()
        engine.close()


@contextlib.contextmanager
def running_model(
    flags: EngineFlags,
    name: str = "",
    *,
    warm_up: bool = False,
    chats: bool = True,
    prefix_reuse: bool = True,
) -> Iterator[tuple[TextModel, EngineLoop]]:
    """The model and the loop that runs it, ended with the context.

    Args:
        flags: which model, and how.
        name: for clients; empty takes that of the folder.
        warm_up: compile all steps first.
        chats: see `TextModel.open`.
        prefix_reuse: see `EngineSettings`.

    Raises:
        UserError: whatever a user can mend.
    """
    from moejax.inference.source import open_model
    from moejax.serving.text_model import TextModel

    settings = dataclasses.replace(flags.engine_settings(), prefix_reuse=prefix_reuse)
    source = open_model(flags.model or None, progress=reading_notes())
    model = TextModel.open(source, name, chats=chats)
    try:
        engine = make_engine(source, flags, settings, measure=True)
        if warm_up:
            _warm_up(engine)
        with running_loop(engine, model.tokenizer) as loop:
            yield model, loop
    finally:
        model.close()


def reading_notes() -> Callable[[int, int], None]:
    """Tells now and then how much of the weights has been read; see `open_model`."""
    tell = NowAndThen(note)
    return lambda done, total: tell(f"read {done / 1e9:.1f} of {total / 1e9:.1f} GB of weights")


def _warm_up(engine: Engine) -> None:
    start, tell = time.monotonic(), NowAndThen(note)
    count = engine.warm_up(lambda done, total: tell(f"compiled {done} of {total} steps"))
    note(f"compiled {count} steps in {time.monotonic() - start:.1f} s")


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache, so that the next start is quick."""
    import jax

    folder = Path.home() / ".cache" / "moejax" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
    except (OSError, RuntimeError):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def note(line: str) -> None:
    """A line for the person who started the program."""
    print(line, file=sys.stderr, flush=True)
