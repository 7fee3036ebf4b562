"""Experts of a group become one: aligned, averaged, and fitted again to what they gave together.

Shape letters as in `moejax.compress.experts`; M members of a group, F = H, or H + 1 with the
output's bias as the weight of a hidden unit that is always 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Float64, Int, Int32
from scipy.linalg import cho_factor, cho_solve

from moejax.compress.clusters import frequencies, score_mass
from moejax.compress.experts import LayerExperts, Sample
from moejax.compress.outputs import chunks, hidden_activations, weighted_outputs
from moejax.compress.similarity import match_units
from moejax.errors import UserError

__all__ = ["MergeWeights", "check_ridge", "fit_output", "merge"]

# With this the system of a million tokens has a condition of 1e12: float64 solves it.
_LEAST_RIDGE = 1e-6

MergeWeights = Literal["frequency", "score"]


def merge(
    experts: LayerExperts,
    table_E: Int32[np.ndarray, " E"],
    sample: Sample,
    *,
    refit: bool = True,
    weights: MergeWeights = "frequency",
    ridge: float = 10.0,
) -> LayerExperts:
    """One expert for each group of experts.

    The hidden units of each member are put in the order of the most used one's
    (`moejax.compress.similarity.match_units`), and the weights are averaged by how much each
    member is used (M-SMoE, arXiv 2310.01334); members of a group that is never used count
    alike. Then the output projection and its bias are fitted to the tokens that chose any member
    (least squares for merged outputs: arXiv 2510.14436): the merged expert is applied once, with
    the sum of the members' scores, and is to give the sum of score·output that the members gave.
    The penalty on leaving the average is ridge · (mean of ‖score·hidden‖² over these tokens): with
    ridge = 1 as much as H tokens weigh. Few tokens change little then, and on the sample the
    fit is never worse than the average.

    Args:
        experts: of a layer.
        table_E: the group of each, every number from 0 to E' − 1 in use, as of
            `moejax.compress.clusters.cluster`.
        sample: tokens to weigh by and to fit to.
        refit: whether to fit the output projection.
        weights: what counts as use, shares of assignments or of scores.
        ridge: at least 1e-6.

    Returns:
        E' experts. Groups of one are as they were, bit for bit.

    Raises:
        UserError: an impossible table, weights or ridge, or a sample of other experts.
    """
    groups = _groups(table_E, experts.num_experts)
    if weights not in get_args(MergeWeights):
        raise UserError(f"weights={weights!r}: choose one of {', '.join(get_args(MergeWeights))}")
    check_ridge(ridge)
    used = frequencies if weights == "frequency" else score_mass
    used_E = used(sample, experts.num_experts)
    weights_TE = sample.weights(experts.num_experts)
    # Groups of one are right with this; the others are overwritten.
    merged = experts.take(np.array([members[0] for members in groups]))
    for group, members in enumerate(groups):
        if len(members) == 1:
            continue
        one = _average(experts, members, used_E[members])
        if refit:
            one = fit_output(one, experts.take(members), sample.x_TD, weights_TE[:, members], ridge)
        for name in ("w_in_EDNH", "w_out_EHD", "b_in_ENH", "b_out_ED"):
            if (array := getattr(one, name)) is not None:
                getattr(merged, name)[group] = array[0]
    return merged


def check_ridge(ridge: float) -> None:
    """Refuses a penalty with which a fit could not be solved.

    Raises:
        UserError: it is too small, or no number.
    """
    if not _LEAST_RIDGE <= ridge < np.inf:
        raise UserError(
            f"ridge={ridge}: must be at least {_LEAST_RIDGE}, since few tokens leave the fit open; "
            "choose about 10"
        )


def _groups(table_E: np.ndarray, num_experts: int) -> list[Int[np.ndarray, " M"]]:
    """The members of each group, ascending."""
    groups = sorted(set(table_E.tolist()))
    if len(table_E) != num_experts or groups != list(range(len(groups))):
        raise UserError(
            f"table_E={table_E.tolist()}: must give each of {num_experts} experts a group, "
            "numbered from 0 without gaps; take the one that cluster returns"
        )
    return [np.flatnonzero(table_E == group) for group in groups]


def _average(
    experts: LayerExperts, members: Int[np.ndarray, " M"], used_M: Float64[np.ndarray, " M"]
) -> LayerExperts:
    """One expert, the members' mean weighted by their use, in float32."""
    first = int(used_M.argmax())
    share_M = used_M / used_M.sum() if used_M.sum() > 0 else np.full(len(members), 1 / len(members))
    reference = experts.take(members[first : first + 1])
    total: dict[str, np.ndarray] = {}
    for i, share in enumerate(share_M):
        one = experts.take(members[i : i + 1])
        order_H = match_units(reference, one) if i != first else slice(None)
        placed = {
            "w_in_EDNH": one.w_in_EDNH[..., order_H],
            "w_out_EHD": one.w_out_EHD[:, order_H],
            "b_in_ENH": None if one.b_in_ENH is None else one.b_in_ENH[..., order_H],
            "b_out_ED": one.b_out_ED,
        }
        for name, array in placed.items():
            if array is not None:
                total[name] = total.get(name, 0.0) + share * array.astype(np.float64)
    return LayerExperts(
        w_in_EDNH=total["w_in_EDNH"].astype(np.float32),
        w_out_EHD=total["w_out_EHD"].astype(np.float32),
        b_in_ENH=total["b_in_ENH"].astype(np.float32) if "b_in_ENH" in total else None,
        b_out_ED=total["b_out_ED"].astype(np.float32) if "b_out_ED" in total else None,
        activation=experts.activation,
    )


def fit_output(
    one: LayerExperts,
    members: LayerExperts,
    x_TD: Float32[np.ndarray, "T D"],
    scores_TM: Float32[np.ndarray, "T M"],
    ridge: float,
) -> LayerExperts:
    """The expert with the output projection that fits the sum of score·output of the members.

    Args:
        one: the expert, with the output projection that is left as little as possible.
        members: the experts that it takes the place of.
        x_TD: tokens.
        scores_TM: their scores of the members, 0 where one is not chosen.
        ridge: as of `merge`.
    """
    H, D = one.w_out_EHD.shape[1:]
    average_FD = one.w_out_EHD[0].astype(np.float64)
    if one.b_out_ED is not None:
        average_FD = np.concatenate([average_FD, one.b_out_ED])
    F = len(average_FD)
    total_T = scores_TM.sum(1, dtype=np.float64)
    (rows,) = np.nonzero(total_T)
    gram_FF, miss_FD = np.zeros((F, F)), np.zeros((F, D))
    for part in chunks(len(rows), 2 * (F + 3 * D)):
        at = rows[part]
        h_TF = np.ones((len(at), F))
        h_TF[:, :H] = hidden_activations(one, 0, x_TD[at])
        h_TF *= total_T[at, None]
        gram_FF += h_TF.T @ h_TF
        target_TD = weighted_outputs(members, x_TD[at], scores_TM[at])
        miss_FD += h_TF.T @ (target_TD - h_TF @ average_FD)
    # A bias needs few tokens and has a unit of another size: it takes no part in the penalty's.
    power = np.trace(gram_FF[:H, :H])
    if power == 0:  # no token, or none that reaches the output projection
        return one
    gram_FF[np.diag_indices(F)] += ridge * power / len(rows)
    fitted_FD = average_FD + cho_solve(cho_factor(gram_FF), miss_FD)
    return replace(
        one,
        w_out_EHD=fitted_FD[None, :H].astype(np.float32),
        b_out_ED=None if one.b_out_ED is None else fitted_FD[None, H].astype(np.float32),
    )
