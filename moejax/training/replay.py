"""A batch once more, with the weights before it: which examples and which parameters stand out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.model.canonical import canonical
from moejax.training.anomaly_log import Dump, read_dump
from moejax.training.checkpoint import Checkpoints
from moejax.training.config import TrainConfig
from moejax.training.rundir import RunDir
from moejax.training.state import (
    Blueprint,
    TrainState,
    from_logical,
    in_logical_order,
    logical_targets,
)
from moejax.training.step import BATCH_SPEC, forward
from sharding.arrays import put
from sharding.collectives import all_gather
from sharding.mesh import TOKEN_AXES
from sharding.zero import gather_weights, scatter_gradients

__all__ = ["Findings", "examine", "replay"]

SHOWN = 5
"""Examples and parameters that are told."""


@dataclass(frozen=True)
class Findings:
    """What weights make of a batch.

    examples: float32 [accumulate, examples], mean loss of each in nats a token.
    norms: of the gradient of the whole loss, by parameter, layers apart.
    broken_gradients: numbers that are not finite in it, likewise.
    broken_weights: in the weights, likewise.
    """

    examples: np.ndarray
    norms: dict[str, float]
    broken_gradients: dict[str, int]
    broken_weights: dict[str, int]

    @property
    def norm(self) -> float:
        """Of the whole gradient."""
        return math.sqrt(sum(norm**2 for norm in self.norms.values()))


def replay(config: TrainConfig, blueprint: Blueprint, path: str) -> Iterator[str]:
    """Lines about a kept batch, for people.

    Reads the run's newest checkpoint before that step; nothing is written, and the run may go on
    meanwhile. Experts are at home, gradients exact.

    Args:
        config: the run, with its directory in `run`.
        blueprint: its model on the devices here.
        path: the file.

    Raises:
        UserError: the file, the run or a checkpoint is not there, or they do not fit together.
    """
    if not config.run:
        raise UserError(f"--replay {path}: name the run that kept it, too: --run FOLDER")
    dump = read_dump(path)
    shares = blueprint.shape.data * blueprint.shape.expert
    if dump.tokens.shape[1] % shares:
        raise UserError(
            f"--replay {path}: {dump.tokens.shape[1]} examples at a time over {shares} devices "
            "along data × expert: choose a --mesh that divides them"
        )
    run = RunDir(Path(config.run))
    with Checkpoints(run.checkpoints_path, config.keep) as checkpoints:
        steps = checkpoints.steps()
        before = [step for step in steps if step < dump.step]
        if not before:
            raise UserError(
                f"{run.checkpoints_path}: no checkpoint from before step {dump.step}: there are "
                f"{', '.join(map(str, steps)) or 'none'}; keep more of them with --keep"
            )
        flat = checkpoints.restore(before[-1], logical_targets(blueprint), partial=True)
    yield f"step {dump.step}: {dump.what}"
    late = dump.step - 1 - before[-1]
    yield f"weights: of step {before[-1]}, " + (
        f"{late} steps before those that it began with" if late else "those that it began with"
    )
    if dump.tokens.max(initial=0) >= config.model.vocab_size:
        raise UserError(f"{path}: has tokens that the model does not know: it is of another run")
    found = examine(blueprint, config, from_logical(flat, blueprint), dump.tokens)
    yield from _told(dump, found, run)


def examine(
    blueprint: Blueprint, config: TrainConfig, state: TrainState, tokens: np.ndarray
) -> Findings:
    """What weights make of a batch.

    Args:
        blueprint, config: model and run.
        state: with the weights.
        tokens: int32 [accumulate, examples, S + 1].
    """
    total = tokens[0, :, 1:].size

    def look(masters: Any, biases: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        weights = gather_weights(masters, blueprint.storage, config.model.compute_dtype)

        def share(weights: Any, micro: jax.Array) -> tuple[jax.Array, jax.Array]:
            model, hidden_BSD, extra, _ = forward(blueprint, config, weights, biases, micro)
            nll_BS = model.nll(hidden_BSD, micro[:, 1:], chunk=config.loss_chunk or None)
            return jnp.sum(nll_BS) / total + extra, jnp.mean(nll_BS, axis=1)

        def add(sums: Any, micro: jax.Array) -> tuple[Any, jax.Array]:
            grads, examples_B = jax.grad(share, has_aux=True)(weights, micro)
            parts = batch.shape[0]
            sums = jax.tree.map(lambda s, g: s + g.astype(jnp.float32) / parts, sums, grads)
            return sums, examples_B

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        grads, examples = jax.lax.scan(add, zeros, batch)
        return scatter_gradients(grads, blueprint.storage), all_gather(examples, TOKEN_AXES, dim=1)

    mapped = jax.shard_map(
        look,
        mesh=blueprint.mesh,
        in_specs=(blueprint.stored_specs, blueprint.bias_specs, BATCH_SPEC),
        out_specs=(blueprint.stored_specs, P()),
        check_vma=False,
    )

    def all_of_it(state: TrainState, batch: jax.Array) -> Any:
        grads, examples = mapped(state.masters, state.biases, batch)
        values = {name: in_logical_order(v) for name, v in canonical(grads).items()}
        weights = {name: in_logical_order(v) for name, v in canonical(state.masters).items()}
        norms = {name: jnp.sqrt(jnp.sum(jnp.square(value))) for name, value in values.items()}
        return examples, norms, _broken(values), _broken(weights)

    batch = put(tokens, NamedSharding(blueprint.mesh, BATCH_SPEC))
    examples, norms, gradients, weights = jax.device_get(jax.jit(all_of_it)(state, batch))
    return Findings(
        examples,
        {name: float(norm) for name, norm in norms.items()},
        {name: int(count) for name, count in gradients.items()},
        {name: int(count) for name, count in weights.items()},
    )


def _broken(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.sum(~jnp.isfinite(v), dtype=jnp.int32) for name, v in values.items()}


def _told(dump: Dump, found: Findings, run: RunDir) -> Iterator[str]:
    examples = found.examples.reshape(-1)
    mean = float(np.mean(examples))
    yield f"loss {mean:.4f} (in the run {dump.loss:.4f}), norm of the gradient {found.norm:.4g} "
    yield f"  (in the run {dump.grad_norm:.4g})"
    tokens = dump.tokens.reshape(-1, dump.tokens.shape[-1])
    tokenizer = run.load_tokenizer()
    # NaN first, then the largest.
    order = np.lexsort((-np.nan_to_num(examples, nan=np.inf), np.isfinite(examples)))
    for number in order[:SHOWN]:
        text = "" if tokenizer is None else repr(tokenizer.decode(tokens[number].tolist())[:60])
        yield f"  example {number}: {examples[number]:.4f} nats a token {text}"
    for what, counts in (("weights", found.broken_weights), ("gradient", found.broken_gradients)):
        broken = {name: count for name, count in counts.items() if count}
        yield f"{what}: not finite in {len(broken)} of {len(counts)} parameters"
        for name, count in list(broken.items())[:SHOWN]:
            yield f"  {name}: {count} numbers"
    finite = {name: norm for name, norm in found.norms.items() if math.isfinite(norm)}
    yield "largest norms of the gradient:"
    for name in sorted(finite, key=lambda name: -finite[name])[:SHOWN]:
        yield f"  {name}: {finite[name]:.4g}"
