"""Experts laid side by side: each group of them becomes one wide expert that a token chooses whole.

Shape letters as in `moejax.compress.experts`; G groups of M members each.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Float64, Int

from moejax.compress.clusters import frequencies
from moejax.compress.experts import LayerExperts, Sample
from moejax.errors import UserError
from moejax.placement.planner import plan
from moejax.placement.statistics import Statistics
from moejax.placement.topology import Topology
from moejax.wide_bank import laid_wide

__all__ = ["chosen_together", "equal_groups", "share_of_scores", "side_by_side"]


def chosen_together(sample: Sample, num_experts: int) -> Float64[np.ndarray, "E E"]:
    """How many tokens chose both of two experts; 0 on the diagonal.

    Raises:
        UserError: the sample names an expert that there is not.
    """
    frequencies(sample, num_experts)
    chosen_TE = (sample.weights(num_experts) != 0).astype(np.float32)
    pairs_EE = (chosen_TE.T @ chosen_TE).astype(np.float64)
    np.fill_diagonal(pairs_EE, 0)
    return pairs_EE


def equal_groups(
    affinity_EE: Float[np.ndarray, "E E"], size: int, *, seed: int = 0
) -> Int[np.ndarray, "G M"]:
    """Groups of equal size, the affinity of their pairs as large as may be found.

    It is the planner's problem of experts on devices with a slot for each member and no bound on
    loads (`moejax.placement.planner.plan`), where the weight of pairs on different devices is to
    be small; a search, best effort, and the same for the same input.

    Args:
        affinity_EE: symmetric; how much is gained by two experts in one group, of any sign: since
            each group has as many pairs, a constant more for every pair changes nothing.
        size: M, a divisor of E.
        seed: of the search.

    Returns:
        Members of each group, ascending; groups in the order of their first members.

    Raises:
        UserError: the size does not divide E, or the affinity is not finite and symmetric.
    """
    E = len(affinity_EE)
    if size < 1 or E % size:
        raise UserError(
            f"size={size}: {E} experts do not form groups of so many; choose a divisor of {E}"
        )
    pairs_EE = np.asarray(affinity_EE, np.float64)
    if not np.isfinite(pairs_EE).all() or not np.allclose(pairs_EE, pairs_EE.T):
        raise UserError(
            f"affinity_EE of shape {list(pairs_EE.shape)}: must be finite and symmetric; look for "
            "NaN in the weights or the sample"
        )
    off = ~np.eye(E, dtype=bool)
    pairs_EE = np.where(off, (pairs_EE + pairs_EE.T) / 2, 0.0)
    if off.any():
        pairs_EE = np.where(off, pairs_EE - pairs_EE[off].min(), 0.0)
    scale = pairs_EE.max() or 1.0
    ones_LE = np.ones((1, E), np.float32)
    statistics = Statistics(
        (pairs_EE / scale).astype(np.float32)[None], ones_LE, np.ones(1, np.float32)
    )
    topology = Topology(E // size, size)
    slots_P = plan(statistics, topology, load_cap=float(E), seed=seed).slots_LP[0]
    groups_GM = np.sort(slots_P.reshape(-1, size).astype(np.int64), axis=1)
    return groups_GM[np.argsort(groups_GM[:, 0])]


def side_by_side(
    experts: LayerExperts, groups_GM: Int[np.ndarray, "G M"], share_E: Float[np.ndarray, " E"]
) -> LayerExperts:
    """One expert of hidden width M·H for each group: the sum of share·output of its members.

    Hidden units of one member lie next to each other, in the order of `groups_GM`.

    Args:
        experts: of a layer.
        groups_GM: every expert once.
        share_E: multiplies the output projection and bias of each.
    """
    (G, M), order_E = groups_GM.shape, groups_GM.reshape(-1)
    share_GM = np.asarray(share_E, np.float32)[groups_GM]
    weighted_EHD = experts.w_out_EHD[order_E] * share_GM.reshape(-1, 1, 1)
    w_in, w_out = laid_wide(experts.w_in_EDNH[order_E], weighted_EHD, M)
    b_in, b_out = experts.b_in_ENH, experts.b_out_ED
    if b_in is not None:
        b_in = b_in[groups_GM].transpose(0, 2, 1, 3).reshape(G, b_in.shape[1], -1)
    if b_out is not None:
        b_out = (b_out[groups_GM] * share_GM[..., None]).sum(1, dtype=np.float32)
    return LayerExperts(w_in, w_out, b_in, b_out, experts.activation)


def share_of_scores(
    weights_TE: Float32[np.ndarray, "T E"],
    weights_TG: Float32[np.ndarray, "T G"],
    groups_GM: Int[np.ndarray, "G M"],
) -> Float64[np.ndarray, " E"]:
    """What each member's output counts in its group's, so that groups give what experts gave.

    A token weighs all members of a group alike, by one score. Best in the least squares of the
    scores is for each member the product of its scores with its group's over the group's squares,
    over the tokens that choose the group now; 0 of a member that a token had not chosen.

    Args:
        weights_TE: scores before, as of `Sample.weights`.
        weights_TG: scores of the groups.
        groups_GM: members of each group.

    Returns:
        Of each expert; 1/M where no token chooses its group.
    """
    share_E = np.full(weights_TE.shape[1], 1 / groups_GM.shape[1])
    for group, members in enumerate(groups_GM):
        now_T = weights_TG[:, group].astype(np.float64)
        if power := now_T @ now_T:
            share_E[members] = now_T @ weights_TE[:, members] / power
    return share_E
