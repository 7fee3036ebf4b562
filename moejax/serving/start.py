"""From flags to a model that runs: devices, mesh, weights, engine."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.errors import UserError
from moejax.offload.host_limit import allow_pinned_memory
from moejax.progress import NowAndThen
from moejax.serving.flags import EngineFlags, ModelFlags
from moejax.serving.locality import check_deterministic, check_limits, with_locality
from sharding.distributed import (
    check_same,
    fake_devices,
    from_first,
    is_first,
    num_processes,
    several,
)

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moejax.config import ModelConfig
    from moejax.data.tokenizer import Tokenizer
    from moejax.inference.engine import Engine, EngineSettings
    from moejax.inference.source import ModelSource
    from moejax.inference.stored import Keep
    from moejax.offload.experts import OffloadedExperts
    from moejax.serving.loop import EngineLoop
    from moejax.serving.text_model import TextModel
    from moejax.training.state import Blueprint
    from sharding.mesh import MeshShape

__all__ = [
    "follow",
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

    if getattr(flags, "offload", False):
        allow_pinned_memory()
    named = None if flags.mesh == "auto" else MeshShape.parse(flags.mesh)
    wanted = fake_devices(flags.devices or (named.size if named else num_processes()))
    # A program that called `main` may have started its devices; `make_mesh` tells if they are few.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", wanted)
    if named is not None:
        return named
    if getattr(flags, "offload", False):
        return MeshShape()
    some = range(1, len(jax.devices()) + 1)
    return MeshShape(expert=max(filter(model.holds_experts, some), default=1))


def load_model(
    source: ModelSource, shape: MeshShape, dtype: str, expert_weights: str = "none"
) -> tuple[Blueprint, Any, Any]:
    """The model on the mesh: blueprint, weights split by their use, selection biases.

    Raises:
        UserError: the mesh does not fit, or the weights are damaged or of another model.
    """
    import jax.numpy as jnp

    from moejax.training.state import load_weights

    blueprint = _blueprint(source, shape, dtype)
    compute = jnp.dtype(blueprint.config.compute_dtype)
    if expert_weights == "none":
        return blueprint, *load_weights(source.weights(blueprint), blueprint, compute)
    quantized, keep = _quantized(blueprint, expert_weights)
    return quantized, *load_weights(source.weights(blueprint, keep), quantized, compute)


def _blueprint(source: ModelSource, shape: MeshShape, dtype: str) -> Blueprint:
    from moejax.model.attention import choose_attention
    from moejax.training.state import Blueprint
    from sharding.mesh import make_mesh

    mesh = make_mesh(shape)
    model = source.config
    platform = mesh.devices.flat[0].platform
    if dtype == "auto":
        # Few CPUs multiply bfloat16 any faster.
        dtype = "float32" if platform == "cpu" else model.compute_dtype
    chosen: Any = dtype
    model = dataclasses.replace(model, compute_dtype=chosen)
    return Blueprint(model, mesh, attention=choose_attention(platform, model))


def _quantized(blueprint: Blueprint, expert_weights: str) -> tuple[Blueprint, Keep]:
    """The model with experts of 8 bits, and what makes each matrix one as soon as it is read.

    There is never room for all of them as they were.
    """
    from moejax.inference.expert_weights import quantized_blueprint, quantizing

    quantized = quantized_blueprint(blueprint, expert_weights)
    return quantized, quantizing(quantized, expert_weights)


def _load_offloaded(
    source: ModelSource, shape: MeshShape, flags: EngineFlags, settings: EngineSettings
) -> tuple[tuple[Blueprint, Any, Any], OffloadedExperts, EngineSettings]:
    """The model without its experts, those, and settings with as many pages as there is room for.

    Raises:
        UserError: there is more than one device, or too little memory on it.
    """
    from moejax.offload.load import OffloadedModel, device_memory, make_room
    from moejax.offload.sizes import parse_bytes

    if shape.size != 1:
        raise UserError(
            f"--offload on a mesh of {shape.size} devices: experts in host memory are computed on "
            "one; leave --mesh out, or --offload, if they fit the devices together"
        )
    config = flags.offload_config()
    model = dataclasses.replace(source.config, scan_layers=False)
    blueprint = _blueprint(dataclasses.replace(source, config=model), shape, flags.dtype)
    quantized = None
    if flags.expert_weights != "none":
        quantized = _quantized(blueprint, flags.expert_weights)
    offloaded = OffloadedModel(source, blueprint, quantized)
    offloaded.check(config)
    memory = device_memory(blueprint)
    if flags.device_memory:
        asked = parse_bytes(flags.device_memory, "--device-memory")
        if asked > memory:
            raise UserError(
                f"--device-memory {flags.device_memory}: the device has {memory} bytes "
                f"({memory / 2**30:.2f} GiB) free; give at most that, or leave it out"
            )
        memory = asked
    longest = settings.max_len or model.max_context
    room, pages = make_room(
        offloaded,
        config,
        memory=memory,
        page_len=settings.page_len,
        pages=settings.pages,
        wanted_pages=settings.max_rows * -(-longest // settings.page_len),
    )
    params, biases, store = offloaded.load(config)
    experts = offloaded.experts(store, room, config)
    settings = dataclasses.replace(settings, pages=pages)
    return (offloaded.parts.blueprint, params, biases), experts, settings


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
    from moejax.inference.engine import Engine, EngineSettings
    from moejax.inference.exchange_choice import UNMEASURED
    from moejax.inference.followers import Sharing
    from moejax.inference.placement_choice import choose_placement
    from moejax.inference.placing import ServingPlacement
    from moejax.serving.text_model import end_ids

    model = {"config": repr(source.config)}
    check_same("model", model, "give all processes the same model")
    settings = settings or flags.engine_settings()
    # Those of process 0, which may depend on what it is asked for.
    settings = EngineSettings(**from_first("settings", dataclasses.asdict(settings)))
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
    experts, given_pages = None, settings.pages
    if flags.offload:
        loaded, experts, settings = _load_offloaded(source, shape, flags, settings)
    else:
        loaded = load_model(source, shape, flags.dtype, flags.expert_weights)
    blueprint, params, biases = loaded
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
        offload=experts,
        sharing=Sharing.of_processes(),
    )
    wanted = settings.max_len or source.config.max_context
    if engine.max_len < wanted:
        why = f"--pages {given_pages} hold" if given_pages else "the free memory holds"
        note(f"texts of at most {engine.max_len} tokens, not {wanted}: {why} no more")
    how = flags.decode_exchange
    # Each process would find another one fastest.
    measure = (
        measure and not several() and not settings.deterministic and _have_speeds(blueprint.mesh)
    )
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
        if (offload := engine.stats().offload) is not None:
            note(str(offload))


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


def follow(flags: EngineFlags) -> None:
    """The part of a process other than 0: the same steps, until process 0 has no more.

    Args:
        flags: the same as there.

    Raises:
        UserError: as for `make_engine`.
    """
    from moejax.inference.source import open_model

    make_engine(open_model(flags.model or None), flags).follow()


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
    """A line for the person who started the program; of several processes the first says it."""
    if is_first():
        print(line, file=sys.stderr, flush=True)
