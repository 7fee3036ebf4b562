"""The experts that a model chooses for some texts: counted, and token by token as a trace.

Shape letters: L layers with experts, E experts, K experts of a token, N tokens, B windows that run
at once, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.placement.counting import Counts, count
from moejax.placement.trace import Trace
from sharding.collectives import psum_statistics
from sharding.mesh import TOKEN_AXES
from sharding.specs import specs_of

if TYPE_CHECKING:
    from moejax.training.state import Blueprint

__all__ = ["Recording", "record", "trace_of"]

_WINDOW = 512
_TOGETHER = 8  # windows of each device that run at once


@dataclass(frozen=True)
class Recording:
    """What was chosen for some texts.

    pairs_LEE: int64 [L, E, E], tokens that chose both experts; symmetric, 0 on the diagonal.
    load_LE: int64 [L, E], tokens that chose an expert.
    num_tokens: N.
    experts_NLK: int16 [N, L, K], each token's experts, −1 for none in layers with fewer; None where
        it was not asked for.
    """

    pairs_LEE: np.ndarray
    load_LE: np.ndarray
    num_tokens: int
    experts_NLK: np.ndarray | None


def trace_of(
    blueprint: Blueprint,
    params: Any,
    biases: Any,
    documents: Sequence[np.ndarray],
    domains: Sequence[str] | None = None,
) -> Trace:
    """The trace of some texts, see `record`.

    Args:
        blueprint, params, biases, documents: see `record`.
        domains: a label of each document.
    """
    recording = record(blueprint, params, biases, documents, tokens=True)
    assert recording.experts_NLK is not None
    return Trace(
        recording.experts_NLK,
        np.array([len(document) for document in documents], np.int64),
        blueprint.config.moe.router.num_experts,
        None if domains is None else tuple(domains),
    )


def record(
    blueprint: Blueprint,
    params: Any,
    biases: Any,
    documents: Sequence[np.ndarray],
    *,
    tokens: bool,
) -> Recording:
    """Runs a model over texts and keeps which experts it chooses, before any drop.

    A document longer than a window of 512 tokens, or than the context, is cut into several, and the
    model sees nothing across a cut; nor across documents.

    Args:
        blueprint: model and mesh; the model has layers with experts.
        params, biases: its weights, split by their use, as `load_weights` gives them.
        documents: int [n] token ids each; at least one in all.
        tokens: keep every token's experts, N · L · K · 2 bytes in host memory.
    """
    window = min(_WINDOW, blueprint.config.max_context, max(map(len, documents)))
    run, total, kept = _program(blueprint), None, []
    where = NamedSharding(blueprint.mesh, P(TOKEN_AXES, None))
    devices = blueprint.shape.data * blueprint.shape.expert
    for tokens_BS, mask_BS in _batches(documents, window, devices):
        inputs = jax.device_put((tokens_BS, mask_BS), where)
        experts_LNK, counts = run(params, biases, *inputs)
        # Read at once: one program at a time, for fake devices' sake.
        new = jax.tree.map(lambda a: np.asarray(a).astype(np.int64), counts)
        total = new if total is None else jax.tree.map(np.add, total, new)
        if tokens:
            experts_NLK = np.moveaxis(np.asarray(experts_LNK), 0, 1)
            kept.append(experts_NLK[mask_BS.reshape(-1)])
    assert total is not None
    experts = np.concatenate(kept) if tokens else None
    return Recording(total.pairs_LEE, total.load_LE, sum(map(len, documents)), experts)


def _batches(
    documents: Sequence[np.ndarray], window: int, devices: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows in order, int32 and bool [B, S], B the same for all; masked where nothing is left."""
    pieces = [d[i : i + window] for d in documents for i in range(0, len(d), window)]
    together = devices * min(_TOGETHER, -(-len(pieces) // devices))
    for start in range(0, len(pieces), together):
        part = pieces[start : start + together]
        tokens_BS = np.zeros((together, window), np.int32)
        mask_BS = np.zeros((together, window), bool)
        for row, piece in enumerate(part):
            tokens_BS[row, : len(piece)] = piece
            mask_BS[row, : len(piece)] = True
        yield tokens_BS, mask_BS


def _program(blueprint: Blueprint) -> Any:
    """`(params, biases, tokens, mask) → (experts int16 [L, B · S, K], counts of all devices)`."""

    def run(
        params: Any, biases: Any, tokens_BS: jax.Array, mask_BS: jax.Array
    ) -> tuple[jax.Array, Counts]:
        model = blueprint.merge(params, biases)
        model.report_experts()
        aux = model(tokens_BS, token_mask_BS=mask_BS, inference=True).aux
        assert aux is not None and aux.experts_TK is not None
        counts = count(aux.experts_TK, blueprint.config.moe.router.num_experts)
        return aux.experts_TK.astype(jnp.int16), psum_statistics(counts, TOKEN_AXES)

    rows = P(TOKEN_AXES, None)
    return jax.jit(
        jax.shard_map(
            run,
            mesh=blueprint.mesh,
            in_specs=(specs_of(blueprint.params), blueprint.bias_specs, rows, rows),
            out_specs=(P(None, TOKEN_AXES, None), P()),
            check_vma=False,
        )
    )
