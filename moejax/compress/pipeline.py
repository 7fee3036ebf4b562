"""From a stored model to one with fewer experts, layer by layer.

Each layer is calibrated on what the layers before it return after they have been compressed: so it
is fitted to what it will be given, and can make good some of what they lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int32

from moejax.compress.budget import share_out, share_out_merges
from moejax.compress.changed import (
    changed_layer,
    check,
    notes,
    smaller_model,
    wanted_experts,
)
from moejax.compress.config import CompressConfig
from moejax.compress.experts import Sample
from moejax.compress.grouping import group, similarity, use
from moejax.compress.groups import grouped
from moejax.compress.joint_fit import fit_together
from moejax.compress.layers import (
    LayerRunner,
    StoredLayers,
    Weights,
    bank_of,
    experts_of,
    replaced,
    router_of,
    table_of,
    whole_name,
)
from moejax.compress.merge import merge
from moejax.compress.prune import keep, saliency
from moejax.compress.sharing import to_shared
from moejax.config import LayerConfig, ModelConfig

__all__ = ["Compressed", "LayerReport", "compress"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    layer: its number.
    before, after: its experts.
    error: norm of the change of what its experts, shared ones included, return for the calibration
        text, over the norm of that, both given the same.
    used: experts of a token afterwards, in the mean; where several chosen ones became one, fewer
        than before.
    """

    layer: int
    before: int
    after: int
    error: float
    used: float


@dataclass(frozen=True)
class Compressed:
    """A model with fewer or smaller experts.

    config: the model, its layers not scanned.
    changed: the weights that are new, by name, such as `params/layers.3.moe.bank.w_in`.
    removed: names of weights that the model has no longer.
    reports: of the layers with experts.
    """

    config: ModelConfig
    changed: dict[str, np.ndarray]
    removed: frozenset[str]
    reports: tuple[LayerReport, ...]


def compress(
    stored: StoredLayers,
    calibration_WS: Int32[np.ndarray, "W S"],
    config: CompressConfig,
    say: Say = lambda line: None,
) -> Compressed:
    """Merges, prunes, shares or groups the experts of a model.

    Args:
        stored: the model.
        calibration_WS: token ids.
        config: how.
        say: is told of each layer.

    Raises:
        UserError: the model has no such number of experts, or cannot be compressed so.
    """
    model, layers = stored.config, stored.config.layers()
    check(model, config)
    run = LayerRunner(model)
    first_WSD = stored.read("params/embedding.w")[calibration_WS]
    for line in notes(model, config):
        say(line)
    counts = _counts(stored, run, first_WSD, config, say)
    outputs = model.moe.router.num_outputs if config.method == "merge" else None
    side_by_side = config.group if config.method == "group" else None
    given_WSD = first_WSD
    changed: dict[str, np.ndarray] = {}
    removed: set[str] = set()
    reports: list[LayerReport] = []
    numbers = [0] * len(layers)
    for index, layer in enumerate(layers):
        weights = stored.layer(index)
        before = run(layer, weights, given_WSD)
        if layer.moe is None:
            given_WSD = before.x_WSD
            continue
        assert before.sample is not None and before.y_TD is not None
        new, numbers[index] = smaller(weights, layer, before.sample, counts[index], config)
        now = changed_layer(layer, numbers[index], outputs, config.sharing, side_by_side)
        after = run(now, new, given_WSD)
        assert after.sample is not None and after.y_TD is not None
        norm = float(np.linalg.norm(before.y_TD)) or 1.0
        error = float(np.linalg.norm(after.y_TD - before.y_TD)) / norm
        used = float((after.sample.experts_TK >= 0).sum(1).mean())
        reports.append(
            LayerReport(index, layer.moe.router.num_experts, numbers[index], error, used)
        )
        say(
            f"layer {index}: {reports[-1].before} experts become {numbers[index]}, {used:.2f} for "
            f"a token; output error {error:.1%}"
        )
        for name, array in new.items():
            if weights.get(name) is not array:
                changed[whole_name(name, index)] = array
        removed |= {whole_name(name, index) for name in weights.keys() - new.keys()}
        given_WSD = after.x_WSD
    final = smaller_model(model, numbers, outputs, config.sharing, side_by_side)
    return Compressed(final, changed, frozenset(removed), tuple(reports))


def smaller(
    weights: Weights, layer: LayerConfig, sample: Sample, count: int, config: CompressConfig
) -> tuple[dict[str, np.ndarray], int]:
    """A layer's weights with fewer or smaller experts.

    Args:
        weights: of the layer.
        layer: it as it was.
        sample: tokens of the calibration text.
        count: experts afterwards, unless a threshold says.
        config: how.

    Returns:
        The weights, and the number of experts.
    """
    experts = experts_of(weights, layer)
    if config.method == "share":
        sharing = config.sharing
        return replaced(weights, to_shared(experts, sharing.kind, sharing.rank, sample)), count
    if config.method == "group":
        now = changed_layer(layer, count, None, config.sharing, config.group)
        return grouped(weights, layer, now, sample, config.group), count
    if config.method == "prune":
        kept = keep(saliency(experts, sample, config.prune.saliency), count)
        pruned = bank_of(experts.take(kept))
        return replaced(weights, pruned, router_of(weights).take(kept)), count
    table_E = group(experts, sample, count, layer, config)
    one_each = merge(
        experts,
        table_E,
        sample,
        refit=config.merge.fit != "none",
        weights=config.merge.weights,
        ridge=config.merge.ridge,
    )
    if config.merge.fit == "together" and one_each.num_experts < experts.num_experts:
        one_each = fit_together(
            *(one_each, experts, table_E, sample),
            sweeps=config.merge.sweeps,
            ridge=config.merge.ridge,
        )
    table_R = table_of(weights)
    table_R = table_E if table_R is None else table_E[table_R]
    return replaced(weights, bank_of(one_each), table_R=table_R), one_each.num_experts


def _counts(
    stored: StoredLayers,
    run: LayerRunner,
    x_WSD: Float[np.ndarray, "W S D"],
    config: CompressConfig,
    say: Say,
) -> Sequence[int]:
    """Experts of each layer afterwards; dense layers' 0."""
    layers, wanted = stored.config.layers(), wanted_experts(stored.config, config)
    with_experts = [i for i, layer in enumerate(layers) if layer.moe is not None]
    if not config.by_layer:
        # A layer that has fewer already keeps them.
        most = [layer.moe.router.num_experts if layer.moe else 0 for layer in layers]
        if config.method == "group" and config.group.lossy:
            return [number // config.group.size for number in most]
        return [min(wanted, number) for number in most]
    found: list[np.ndarray] = []
    uses: list[np.ndarray | None] = []
    for index, layer in enumerate(layers):
        weights = stored.layer(index)
        passed = run(layer, weights, x_WSD)
        x_WSD = passed.x_WSD
        if passed.sample is None:
            continue
        experts = experts_of(weights, layer)
        if config.method == "prune":
            found.append(saliency(experts, passed.sample, config.prune.saliency))
        else:
            found.append(similarity(experts, passed.sample, config))
            uses.append(use(experts, passed.sample, config))
        say(f"layer {index}: looked at")
    total = min(wanted * len(found), sum(stored.config.expert_numbers))
    fewest = max(layer.moe.router.top_k for layer in layers if layer.moe)
    if config.method == "prune":
        kept = share_out(found, total, fewest)
    else:
        known = [each for each in uses if each is not None]
        kept = share_out_merges(found, total, fewest, known or None)
    counts = [0] * len(layers)
    for index, count in zip(with_experts, kept, strict=True):
        counts[index] = count
    return counts
