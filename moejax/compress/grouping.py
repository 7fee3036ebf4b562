"""Which experts of a layer become one, as the command is asked."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int32

from moejax.compress.clusters import cluster, frequencies, score_mass
from moejax.compress.config import CompressConfig
from moejax.compress.experts import LayerExperts, Sample
from moejax.compress.similarity import output_agreement, output_similarity, parameter_similarity
from moejax.config import LayerConfig

__all__ = ["group", "similarity", "use"]


def group(
    experts: LayerExperts, sample: Sample, count: int, layer: LayerConfig, config: CompressConfig
) -> Int32[np.ndarray, " E"]:
    """The group of each expert, see `moejax.compress.clusters.cluster`.

    Args:
        experts: of the layer.
        sample: tokens of the calibration text.
        count: groups, unless a threshold says; then at least as many as experts of a token.
        layer: the layer.
        config: how.
    """
    assert layer.moe is not None
    similarity_EE, threshold = similarity(experts, sample, config), config.merge.threshold
    if threshold is not None:
        # By similarity alone: what a merge costs is in units of use, of which all share one.
        table_E = cluster(similarity_EE, threshold=threshold)
        if table_E.max() + 1 >= layer.moe.router.top_k:
            return table_E
        count = layer.moe.router.top_k
    return cluster(similarity_EE, count=count, use_E=use(experts, sample, config))


def similarity(
    experts: LayerExperts, sample: Sample, config: CompressConfig
) -> Float[np.ndarray, "E E"]:
    """Of each pair of experts, at most 1."""
    if config.merge.similarity == "parameters":
        return parameter_similarity(experts)
    of = output_agreement if config.merge.similarity == "agreement" else output_similarity
    return of(experts, sample)


def use(
    experts: LayerExperts, sample: Sample, config: CompressConfig
) -> Float[np.ndarray, " E"] | None:
    """How much each expert counts in grouping to a number; None: all alike."""
    if config.merge.similarity != "agreement":
        return None
    used = frequencies if config.merge.weights == "frequency" else score_mass
    return used(sample, experts.num_experts)
