"""What a placement and a way of routing cost on held-out text: loss, traffic and load, measured.

The model runs over the mesh as it is trained and served, and the layers themselves say what moved
and where tokens were served. Each device gets one window of a batch: windows are dealt to devices
in turn, those of a document to several.

Shape letters: N windows, S tokens of a window, B windows that run at once, L layers with experts,
A groups of devices along `expert`, G devices of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.data.pipeline import held_out_windows
from moejax.errors import UserError
from moejax.placement.controller import stacked
from sharding.collectives import psum_statistics
from sharding.mesh import DATA, EXPERT, TOKEN_AXES
from sharding.specs import specs_of

if TYPE_CHECKING:
    from moejax.config import ModelConfig
    from moejax.data.corpus import Document
    from moejax.data.tokenizer import Tokenizer
    from moejax.moe_aux import MoEAux
    from moejax.training.state import Blueprint

__all__ = ["Judge", "Judged", "Windows", "check_levels", "relative_increase", "windows_of"]


@dataclass(frozen=True)
class Windows:
    """Text to judge by.

    Attributes:
        tokens_NS1: int32 [N, S + 1], inputs and targets.
        mask_NS: bool [N, S], where there is text; elsewhere nothing is routed or counted.
        document_N: int64 [N], which document a window is of.
        num_bytes: of the text in these windows, in proportion to its tokens.
    """

    tokens_NS1: np.ndarray
    mask_NS: np.ndarray
    document_N: np.ndarray
    num_bytes: float


@dataclass(frozen=True)
class Judged:
    """What one setting does; traffic is of a token and layer.

    Attributes:
        nll_D: float64, nats of each document.
        bits_per_byte: of all of them.
        remote_sends: devices other than its own that a token is sent to, by the layer's counters.
        network_rows: of these, devices of other hosts; several of one host count each.
        fanout: devices that serve a token, its own included.
        load_max_mean: the largest device's assignments over the mean of the devices, by the slots
            that the layer reports; mean over batches and layers.
        score_mass_kept: of the probability of the experts that routing would choose without regard
            to places, the share of those it chooses; 1 without such routing.
    """

    nll_D: np.ndarray
    bits_per_byte: float
    remote_sends: float
    network_rows: float
    fanout: float
    load_max_mean: float
    score_mass_kept: float


def windows_of(
    documents: Sequence[Document], tokenizer: Tokenizer, window: int, most: int
) -> Windows:
    """Windows of documents, at most some of each, spread evenly over it.

    Args:
        documents: the texts.
        tokenizer: the model's.
        window: tokens S.
        most: windows of a document, so that a long one does not outweigh the others.
    """
    tokens, masks, numbers, size = [], [], [], 0.0
    for number, document in enumerate(documents):
        found = held_out_windows([document], tokenizer, window)
        count = len(found.tokens)
        chosen = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
        tokens.append(found.tokens[chosen])
        masks.append(found.mask[chosen])
        numbers += [number] * len(chosen)
        size += document.num_bytes * float(found.mask[chosen].sum() / found.mask.sum())
    return Windows(np.concatenate(tokens), np.concatenate(masks), np.array(numbers, np.int64), size)


def relative_increase(nll_D: np.ndarray, base_D: np.ndarray) -> tuple[float, float]:
    """How much larger a loss is than another of the same documents, and its standard error.

    The ratio of sums; documents are what varies (the linearised error of a ratio, with D − 1 in
    the variance). The error is 0 with one document, of which nothing can be said.

    Args:
        nll_D: float64 [D].
        base_D: float64 [D].
    """
    ratio = float(nll_D.sum() / base_D.sum())
    count = len(base_D)
    rest_D = nll_D - ratio * base_D
    error = np.sqrt((rest_D**2).sum() * count / max(count - 1, 1)) / base_D.sum()
    return ratio - 1, float(error)


def check_levels(config: ModelConfig, devices: int) -> None:
    """Refuses an exchange in two levels, whose rows are counted otherwise.

    Args:
        config: the model.
        devices: along `expert`.

    Raises:
        UserError: it has two.
    """
    size = config.moe.exchange.host_devices
    if size is not None and 1 < size < devices:
        raise UserError(
            f"exchange.host_devices={size} with expert={devices} devices: rows go to a host and "
            "are spread there, so they do not say how many devices serve a token; take "
            "host_devices=None, and say with --hosts which devices share a host"
        )


class Judge:
    """Runs one model over the windows, under any placement with the same number of slots.

    Args:
        blueprint: model and mesh; what it says of locality holds.
        windows: the text; one runs on each device at a time.

    Raises:
        UserError: see `check_levels`.
    """

    def __init__(self, blueprint: Blueprint, windows: Windows) -> None:
        check_levels(blueprint.config, blueprint.shape.expert)
        self._blueprint, self._windows = blueprint, windows
        self._rows = blueprint.shape.data * blueprint.shape.expert
        self._program = _program(blueprint)

    def __call__(self, params: Any, biases: Any, slots_LP: np.ndarray, max_replicas: int) -> Judged:
        """Measures a placement.

        Args:
            params, biases: as from `load_weights`.
            slots_LP: int32 [L, G·S], the expert in each slot, −1 for none.
            max_replicas: R.
        """
        blueprint, windows = self._blueprint, self._windows
        experts = blueprint.config.moe.router.num_experts
        placement = stacked(slots_LP, experts, max_replicas)
        where = NamedSharding(blueprint.mesh, P(TOKEN_AXES, None))
        nll_N, moves, kept, loads = [], [], [], []
        for first in range(0, len(windows.tokens_NS1), self._rows):
            part = slice(first, first + self._rows)
            fill = self._rows - len(windows.tokens_NS1[part])
            tokens = np.pad(windows.tokens_NS1[part], ((0, fill), (0, 0)))
            mask = np.pad(windows.mask_NS[part], ((0, fill), (0, 0)))
            inputs = jax.device_put((tokens, mask), where)
            # One program at a time, for fake devices' sake.
            nll_B, aux, load_LAG = jax.device_get(self._program(params, biases, *inputs, placement))
            nll_N.append(nll_B.astype(np.float64)[: self._rows - fill])
            moves.append(_moves(aux))
            kept.append(_kept(aux))
            loads.append(_uneven(load_LAG))
        here, near, far, tokens = np.sum(moves, axis=0)
        nll_D = np.bincount(windows.document_N, np.concatenate(nll_N))
        return Judged(
            nll_D,
            float(nll_D.sum() / np.log(2) / windows.num_bytes),
            float((near + far) / tokens),
            float(far / tokens),
            float((here + near + far) / tokens),
            float(np.mean(np.concatenate(loads))),
            float(np.sum(kept) / tokens),
        )


def _moves(aux: MoEAux) -> np.ndarray:
    """Rows that stay, that go to the host and to others, and tokens; float64, of all layers."""
    counters = aux.counters
    numbers = counters.rows_self, counters.rows_host, counters.rows_network, aux.num_tokens
    return np.array([np.sum(n, dtype=np.float64) for n in numbers])


def _kept(aux: MoEAux) -> float:
    """The shares of score mass kept, summed over tokens and layers."""
    kept = aux.kept
    return float(np.sum(aux.num_tokens if kept is None else kept, dtype=np.float64))


def _uneven(load_LAG: np.ndarray) -> np.ndarray:
    """The largest load over the mean, of each layer and group that has any; float64."""
    load_NG = load_LAG.reshape(-1, load_LAG.shape[-1]).astype(np.float64)
    load_NG = load_NG[load_NG.any(1)]
    return load_NG.max(1) / load_NG.mean(1)


def _program(blueprint: Blueprint) -> Any:
    """`(params, biases, tokens, mask, placement) → (nll [B], aux of all devices, load [L, A, G])`.

    Loads are int32 assignments.
    """

    def run(
        params: Any, biases: Any, tokens_BS: jax.Array, mask_BS: jax.Array, placement: Any
    ) -> tuple[jax.Array, MoEAux, jax.Array]:
        model = blueprint.merge(params, biases)
        layers = [block.moe for block in model.layers.values() if block.moe is not None]
        columns = max(layer.config.router.top_k for layer in layers)
        for layer in layers:
            layer.report_slots(columns)
        out = model(tokens_BS[:, :-1], token_mask_BS=mask_BS, placement=placement, inference=True)
        nll_BS = model.nll(out.hidden_BSD, tokens_BS[:, 1:])
        aux = out.aux
        assert aux is not None and aux.slots_TK is not None
        slots = placement.slot_expert_P.shape[-1] // blueprint.shape.expert
        load_LG = _loads(aux.slots_TK, slots, blueprint.shape.expert)
        nll_B = jnp.sum(jnp.where(mask_BS, nll_BS, 0.0), axis=1)
        return nll_B, replace(aux, slots_TK=None).over_devices(), load_LG[:, None]

    rows = P(TOKEN_AXES, None)
    mapped = jax.shard_map(
        run,
        mesh=blueprint.mesh,
        in_specs=(specs_of(blueprint.params), blueprint.bias_specs, rows, rows, P()),
        out_specs=(P(TOKEN_AXES), P(), P(None, DATA, None)),
        check_vma=False,
    )
    return jax.jit(mapped)


def _loads(slots_LTK: jax.Array, slots: int, devices: int) -> jax.Array:
    """Assignments of each device of this group along `expert`, from all of them; int32 [L, G]."""
    # An empty slot, −1, is on device −1, which nobody is.
    device_LTK = slots_LTK // jnp.int32(slots)
    mine_LTKG = device_LTK[..., None] == jnp.arange(devices, dtype=jnp.int32)
    return psum_statistics(jnp.sum(mine_LTKG, axis=(1, 2), dtype=jnp.int32), EXPERT)
