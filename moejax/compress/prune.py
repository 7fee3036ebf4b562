"""Which experts of a layer can go: how much each matters, and the ones to keep.

Shape letters as in `moejax.compress.experts`.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float64, Int

from moejax.compress.clusters import frequencies, score_mass
from moejax.compress.experts import LayerExperts, Sample
from moejax.compress.outputs import chunks, output
from moejax.errors import UserError

__all__ = ["Saliency", "keep", "saliency"]

Saliency = Literal["reap", "frequency", "score"]


def saliency(
    experts: LayerExperts, sample: Sample, method: Saliency = "reap"
) -> Float64[np.ndarray, " E"]:
    """How much each expert matters on the sample; 0 for one that is never chosen.

    `reap` (arXiv 2510.13999) is the mean of score·‖output‖₂ over the tokens that chose the
    expert: what would be missing from such a token. `frequency` is the share of assignments,
    `score` the share of scores.

    Raises:
        UserError: an unknown method, or the sample names an expert that there is not.
    """
    E = experts.num_experts
    if method not in get_args(Saliency):
        raise UserError(f"method={method!r}: choose one of {', '.join(get_args(Saliency))}")
    used_E = frequencies(sample, E)
    if method == "frequency":
        return used_E
    if method == "score":
        return score_mass(sample, E)
    mean_E = np.zeros(E)
    for e in np.flatnonzero(used_E):
        rows, choice = np.nonzero(sample.experts_TK == e)
        total = 0.0
        for part in chunks(len(rows), 2 * sample.x_TD.shape[1]):
            norm_T = np.linalg.norm(output(experts, int(e), sample.x_TD[rows[part]]), axis=1)
            total += norm_T.astype(np.float64) @ sample.scores_TK[rows[part], choice[part]]
        mean_E[e] = total / len(rows)
    return mean_E


def keep(saliency_E: Float[np.ndarray, " E"], count: int) -> Int[np.ndarray, " E'"]:
    """The experts that matter most, ascending; among equals those with the lowest numbers.

    Raises:
        UserError: an impossible count, or a saliency that is NaN.
    """
    E = len(saliency_E)
    if not 1 <= count <= E:
        raise UserError(f"count={count}: of {E} experts between 1 and {E} are kept; choose so many")
    if np.isnan(saliency_E).any():
        raise UserError(
            f"saliency_E[{int(np.isnan(saliency_E).argmax())}]=nan: gives no order; "
            "look for NaN in the weights or the sample"
        )
    return np.sort(np.argsort(-np.asarray(saliency_E), kind="stable")[:count])
