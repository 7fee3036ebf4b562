"""What a sweep reads: the model, the texts that judge it, and a trace of others to place by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.data.corpus import Document
    from moejax.data.tokenizer import Tokenizer
    from moejax.inference.source import ModelSource
    from moejax.placement.sweep import Sweep
    from moejax.placement.sweep_config import SweepConfig

__all__ = ["HELD_OUT", "open_texts", "prepare", "some_tokens"]

HELD_OUT = 0.05  # of the standard library, by the hash of the path, as the packaged model has it
_LONGEST = 1024  # tokens of a document that experts are placed by


def open_texts(config: SweepConfig) -> tuple[ModelSource, list[Document], list[Document]]:
    """The model, texts that judge it, and others to place by.

    Raises:
        UserError: one of them cannot be read, or the model has no layer with experts.
    """
    from moejax.data.corpus import split_held_out
    from moejax.data.sources import load_standard_library
    from moejax.inference.source import open_model

    source = open_model(None if config.model == "packaged" else config.model)
    source.need_tokenizer()
    if not any(layer.moe for layer in source.config.layers()):
        raise UserError(f"{source.path}: the model has no layer with experts")
    source.config.check_equal_experts("a sweep over placements")
    if config.window > source.config.max_context:
        raise UserError(
            f"--window {config.window}: longer than the model's context of "
            f"{source.config.max_context}"
        )
    if config.text:
        judged, planned = _load("--text", config.text), _load("--plan-text", config.plan_text)
        both = {d.text for d in judged} & {d.text for d in planned}
        if both:
            raise UserError(
                f"--text and --plan-text: {len(both)} texts are in both; take other texts to place "
                "experts by than to judge by"
            )
    else:
        planned, judged = split_held_out(load_standard_library().documents, HELD_OUT)
    return source, judged, planned


def _load(flag: str, paths: Sequence[str]) -> list[Document]:
    from moejax.data.sources import load_corpus

    try:
        return list(load_corpus(list(paths)).documents)
    except UserError as error:
        # The reader speaks of the flag of train.py.
        raise UserError(f"{flag} {str(error).removeprefix('--data ')}") from None


def prepare(
    config: SweepConfig,
    source: ModelSource,
    judged: Sequence[Document],
    planned: Sequence[Document],
    say: Callable[[str], None],
) -> tuple[Sweep, dict[str, Any]]:
    """Records a trace, places experts by it, and cuts the texts that judge.

    Computes in float32, with layers scanned. The trace is of routing without regard to places:
    what the model's own locality chooses depends on a placement that is yet to be found.

    Returns:
        The sweep, and the model's weights in logical order.

    Raises:
        UserError: there are too few devices.
    """
    import jax
    from jax import numpy as jnp

    from moejax.config import LocalityConfig
    from moejax.layer import hosts_along_experts
    from moejax.placement.judge import windows_of
    from moejax.placement.record import trace_of
    from moejax.placement.sweep import Sweep, placements_of
    from moejax.training.state import Blueprint, load_weights
    from sharding.mesh import MeshShape, make_mesh

    mesh = make_mesh(MeshShape(expert=config.devices))
    hosts = None
    if config.hosts > 1:
        size = config.devices // config.hosts
        hosts = tuple(device // size for device in range(config.devices))
    model = dataclasses.replace(source.config, compute_dtype="float32", scan_layers=True)
    model = dataclasses.replace(
        model, moe=dataclasses.replace(model.moe, locality=LocalityConfig())
    )
    hosts = hosts_along_experts(model.moe, config.devices, hosts)
    plain = Blueprint(model, mesh, hosts)
    flat = jax.block_until_ready(source.weights(plain))
    tokenizer = source.need_tokenizer()
    trace = trace_of(
        plain,
        *load_weights(flat, plain, jnp.float32),
        some_tokens(planned, tokenizer, config.plan_tokens, config.seed),
    )
    windows = windows_of(judged, tokenizer, config.window, config.windows)
    say(
        f"experts placed by {trace.num_tokens} tokens of {len(trace.lens)} texts, judged by "
        f"{int(windows.mask_NS.sum())} tokens of {len(set(windows.document_N))} others"
    )
    num_hosts = 1 if hosts is None else len(set(hosts))
    placements = placements_of(trace, config.devices, num_hosts, config.replicas, config.seed)
    return Sweep(model, windows, placements, mesh, hosts), flat


def some_tokens(
    documents: Sequence[Document], tokenizer: Tokenizer, tokens: int, seed: int
) -> list[np.ndarray]:
    """About so many tokens of documents in a random order, the first 1,024 of each."""
    from moejax.data.pipeline import tokenize

    taken: list[np.ndarray] = []
    for i in np.random.default_rng(seed).permutation(len(documents)):
        if sum(map(len, taken)) >= tokens:
            break
        taken.append(tokenize([documents[i]], tokenizer)[:_LONGEST])
    return taken
