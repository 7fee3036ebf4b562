"""Which experts become one: groups of similar ones, and how much each expert is used.

Shape letters as in `moejax.compress.experts`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int32
from scipy.cluster.hierarchy import linkage

from moejax.compress.experts import Sample
from moejax.errors import UserError

__all__ = ["cluster", "frequencies", "merge_heights", "score_mass"]

_LEAST_USE = 1e-3  # of the mean


def frequencies(sample: Sample, num_experts: int) -> Float64[np.ndarray, " E"]:
    """Each expert's share of the assignments; all 0 where there are none.

    Raises:
        UserError: the sample names an expert that there is not.
    """
    return _shares(sample, num_experts, None)


def score_mass(sample: Sample, num_experts: int) -> Float64[np.ndarray, " E"]:
    """Each expert's share of the scores; all 0 where there are none.

    Raises:
        UserError: the sample names an expert that there is not.
    """
    return _shares(sample, num_experts, sample.scores_TK)


def cluster(
    similarity_EE: Float[np.ndarray, "E E"],
    *,
    count: int | None = None,
    threshold: float | None = None,
    use_E: Float[np.ndarray, " E"] | None = None,
) -> Int32[np.ndarray, " E"]:
    """Groups of similar experts by agglomeration (HC-SMoE, arXiv 2410.08589).

    The two groups whose merge costs least become one, again and again. Without `use_E` the cost is
    1 − the mean similarity over all pairs of their members (average linkage). With it, it is by how
    much the square error of the outputs grows when each group gives the mean of its members, each
    counting as much as it is used (Ward's criterion, Journal of the American Statistical
    Association 58, 1963): experts that are seldom used go to others first. Between equal costs the
    choice is arbitrary but always the same.

    Args:
        similarity_EE: cosines, or with `use_E` `moejax.compress.similarity.output_agreement`.
        count: until so many groups are left, or
        threshold: as long as 1 − cost is at least this.
        use_E: shares, such as `frequencies`.

    Returns:
        The group of each expert; groups are numbered in the order of their first members.

    Raises:
        UserError: not one of count and threshold, an impossible count, or not a finite square
            matrix.
    """
    E = len(similarity_EE)
    if (count is None) == (threshold is None):
        raise UserError(
            f"count={count}, threshold={threshold}: experts are grouped to a count or down "
            "to a similarity; give one of both"
        )
    tree = _tree(similarity_EE, use_E)
    if count is not None:
        if not 1 <= count <= E:
            raise UserError(
                f"count={count}: {E} experts form between 1 and {E} groups; choose within that"
            )
        merges = E - count
    else:
        # Merges stand in the order of their heights.
        merges = int((tree[:, 2] <= 1.0 - threshold).sum())  # type: ignore[operator]
    # Cutting at a height could not part merges of equal height, so so many merges are done.
    groups = {e: [e] for e in range(E)}
    for made, (a, b) in enumerate(tree[:merges, :2].astype(int).tolist()):
        groups[E + made] = groups.pop(a) + groups.pop(b)
    table_E = np.empty(E, np.int32)
    for number, members in enumerate(sorted(groups.values(), key=min)):
        table_E[members] = number
    return table_E


def merge_heights(
    similarity_EE: Float[np.ndarray, "E E"], use_E: Float[np.ndarray, " E"] | None = None
) -> Float64[np.ndarray, " E-1"]:
    """What each further merge of `cluster` costs, ascending.

    Raises:
        UserError: not a finite square matrix.
    """
    return _tree(similarity_EE, use_E)[:, 2]


def _tree(
    similarity_EE: Float[np.ndarray, "E E"], use_E: Float[np.ndarray, " E"] | None
) -> Float64[np.ndarray, "E-1 4"]:
    """The merges in their order: two groups, their cost, members; group E + i is of merge i."""
    similarity_EE = np.asarray(similarity_EE, np.float64)
    shape = similarity_EE.shape
    if len(shape) != 2 or shape[0] != shape[1] or not np.isfinite(similarity_EE).all():
        raise UserError(
            f"similarity_EE of shape {shape}: must be a finite number for each pair of experts "
            "[E, E]; look for NaN in the weights or the sample"
        )
    if len(similarity_EE) == 1:
        return np.empty((0, 4))
    if use_E is not None:
        return _ward(1.0 - (similarity_EE + similarity_EE.T) / 2, np.asarray(use_E, np.float64))
    above = np.triu_indices(len(similarity_EE), 1)
    return linkage(1.0 - (similarity_EE[above] + similarity_EE.T[above]) / 2, "average")


def _ward(
    distance_EE: Float64[np.ndarray, "E E"], use_E: Float64[np.ndarray, " E"]
) -> Float64[np.ndarray, "E-1 4"]:
    """The merges by Ward's criterion, of squared distances between points of different weight."""
    E = len(use_E)
    # Experts that are never used cost nothing anywhere; this way they go to similar ones.
    mean = use_E.mean() or 1 / E
    use_G = np.maximum(use_E, _LEAST_USE * mean)
    cost_GG = distance_EE * (np.outer(use_G, use_G) / (use_G[:, None] + use_G))
    np.fill_diagonal(cost_GG, np.inf)
    ids, sizes, merges = list(range(E)), [1] * E, []
    while len(ids) > 1:
        i, j = sorted(int(n) for n in np.unravel_index(cost_GG.argmin(), cost_GG.shape))
        cost = cost_GG[i, j]
        # Lance and Williams' recurrence, for weights in the place of numbers of points.
        grown_G = (use_G[i] + use_G) * cost_GG[i] + (use_G[j] + use_G) * cost_GG[j] - use_G * cost
        cost_GG[i] = cost_GG[:, i] = grown_G / (use_G[i] + use_G[j] + use_G)
        use_G[i] += use_G[j]
        sizes[i] += sizes[j]
        merges.append((ids[i], ids[j], cost, sizes[i]))
        ids[i] = E + len(merges) - 1
        del ids[j], sizes[j]
        use_G = np.delete(use_G, j)
        cost_GG = np.delete(np.delete(cost_GG, j, 0), j, 1)
        cost_GG[i, i] = np.inf
    tree = np.array(merges)
    tree[:, 2] = np.maximum.accumulate(tree[:, 2])  # ascending but for rounding
    return tree


def _shares(
    sample: Sample, num_experts: int, weights_TK: np.ndarray | None
) -> Float64[np.ndarray, " E"]:
    chosen_TK = sample.experts_TK >= 0
    experts = sample.experts_TK[chosen_TK]
    if experts.size and experts.max() >= num_experts:
        raise UserError(
            f"sample: names expert {experts.max()}, the layer has {num_experts}; calibrate again "
            "with the model that is compressed"
        )
    weights = None if weights_TK is None else weights_TK[chosen_TK].astype(np.float64)
    used_E = np.bincount(experts, weights, minlength=num_experts).astype(np.float64)
    return used_E / (used_E.sum() or 1.0)
