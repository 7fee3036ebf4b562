"""The output projections of a layer's experts fitted together, so that one makes good the other.

Shape letters as in `moejax.compress.experts`; E' experts afterwards, F = H, or H + 1 with the
output's bias as the weight of a hidden unit that is always 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Float64, Int32
from scipy.linalg import cho_factor, cho_solve

from moejax.compress.clusters import frequencies
from moejax.compress.experts import LayerExperts, Sample
from moejax.compress.merge import check_ridge
from moejax.compress.outputs import chunks, hidden_activations, weighted_outputs
from moejax.errors import UserError

__all__ = ["fit_sum", "fit_together"]


def fit_together(
    experts: LayerExperts,
    original: LayerExperts,
    table_E: Int32[np.ndarray, " E"],
    sample: Sample,
    *,
    sweeps: int = 3,
    ridge: float = 10.0,
) -> LayerExperts:
    """Merged experts with output projections that together fit what the layer gave before.

    `moejax.compress.merge.fit_output` fits each merged expert by itself to what its own members
    gave. A token's output is the sum over its experts, so what one cannot give, the others that the
    token has chosen can: here it is this sum that is fitted, see `fit_sum`. Experts that are alone
    in their group take part, and do not stay as they were.

    Args:
        experts: E' merged ones, as of `moejax.compress.merge.merge`.
        original: the E experts that they were made from.
        table_E: which one each became.
        sample: tokens with the original experts that they chose.
        sweeps: as of `fit_sum`.
        ridge: as of `fit_sum`.

    Returns:
        The merged experts with other output projections and biases.

    Raises:
        UserError: a table or a sample that is not of these experts, or impossible sweeps or ridge.
    """
    E, merged = original.num_experts, experts.num_experts
    if len(table_E) != E or set(table_E.tolist()) != set(range(merged)):
        raise UserError(
            f"table_E={table_E.tolist()}: must name for each of {E} experts the one of {merged} "
            "that it became, and each of these; take the table that they were merged by"
        )
    _check(sweeps, ridge)
    frequencies(sample, E)  # refuses a sample of other experts
    weights_TE = sample.weights(E)
    target_TD = weighted_outputs(original, sample.x_TD, weights_TE)
    summed_TE = np.zeros((len(weights_TE), merged))
    for expert, one in enumerate(table_E):
        summed_TE[:, one] += weights_TE[:, expert]
    return fit_sum(experts, sample.x_TD, summed_TE, target_TD, sweeps=sweeps, ridge=ridge)


def fit_sum(
    experts: LayerExperts,
    x_TD: Float32[np.ndarray, "T D"],
    weights_TE: Float64[np.ndarray, "T E"],
    target_TD: Float64[np.ndarray, "T D"],
    *,
    sweeps: int = 3,
    ridge: float = 10.0,
) -> LayerExperts:
    """The experts with output projections and biases whose weighted sums fit a target.

    What is minimised is ‖target − Σ weight·output‖² and a penalty on leaving the projections given,
    of each expert ridge · (mean of ‖weight·hidden‖² over its tokens): with ridge = 1 as much as H
    tokens weigh. All projections at once would be a system of E·F equations, so it is solved expert
    by expert: each in turn is fitted to what the others leave of the target, for the tokens that
    use it, and a sweep does so with all (block Gauss-Seidel). The sum of error and penalty never
    grows, so on the sample the fit is never worse than what was given. It goes towards the one
    solution of the whole system; with ridge = 10, after 2 to 4 sweeps little is left to gain.

    A sweep takes a pass of all experts' input projections over their tokens, 2·F·(F + 2·D)
    operations for each token of each expert, and E solutions of F equations. Beside the arguments
    it holds what is left of the target, [T, D] in float64, and one expert's hidden activations.

    Args:
        experts: E, as they are.
        x_TD: tokens.
        weights_TE: their weights of the experts, 0 where one is not used.
        target_TD: what the sum of weight·output is to be; not changed.
        sweeps: at least 1.
        ridge: at least 1e-6.

    Returns:
        The experts; one that no token reaches is as it was.

    Raises:
        UserError: impossible sweeps or ridge.
    """
    _check(sweeps, ridge)
    fitted = replace(
        experts,
        w_out_EHD=experts.w_out_EHD.copy(),
        b_out_ED=None if experts.b_out_ED is None else experts.b_out_ED.copy(),
    )
    left_TD = weighted_outputs(experts, x_TD, weights_TE)
    np.subtract(target_TD, left_TD, out=left_TD)
    for _ in range(sweeps):
        for expert in range(experts.num_experts):
            _fit_one(fitted, expert, experts, x_TD, weights_TE[:, expert], left_TD, ridge)
    return fitted


def _fit_one(
    experts: LayerExperts,
    expert: int,
    given: LayerExperts,
    x_TD: Float32[np.ndarray, "T D"],
    weights_T: Float64[np.ndarray, " T"],
    left_TD: Float64[np.ndarray, "T D"],
    ridge: float,
) -> None:
    """Fits one expert to what is left of the target; changes the expert and what is left."""
    H = experts.w_out_EHD.shape[1]
    (rows,) = np.nonzero(weights_T)
    hidden_RH = hidden_activations(experts, expert, x_TD[rows])
    now_FD, given_FD = _projection(experts, expert), _projection(given, expert)
    F, D = now_FD.shape

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some of the tokens at a time, and their weight·hidden."""
        for part in chunks(len(rows), 2 * (F + 2 * D)):
            h_RF = np.ones((part.stop - part.start, F))
            h_RF[:, :H] = hidden_RH[part]
            h_RF *= weights_T[rows[part], None]
            yield rows[part], h_RF

    gram_FF, miss_FD = np.zeros((F, F)), np.zeros((F, D))
    for at, h_RF in parts():
        gram_FF += h_RF.T @ h_RF
        miss_FD += h_RF.T @ left_TD[at]
    # A bias needs few tokens and has a unit of another size: it takes no part in the penalty's.
    power = np.trace(gram_FF[:H, :H])
    if power == 0:  # no token, or none that reaches the output projection
        return
    penalty = ridge * power / len(rows)
    gram_FF[np.diag_indices(F)] += penalty
    miss_FD -= penalty * (now_FD - given_FD)
    new_FD = (now_FD + cho_solve(cho_factor(gram_FF), miss_FD)).astype(np.float32)
    experts.w_out_EHD[expert] = new_FD[:H]
    if experts.b_out_ED is not None:
        experts.b_out_ED[expert] = new_FD[H]
    # Of the weights as they are stored, so that the others make good their rounding too.
    step_FD = new_FD - now_FD
    for at, h_RF in parts():
        left_TD[at] -= h_RF @ step_FD


def _projection(experts: LayerExperts, expert: int) -> Float64[np.ndarray, "F D"]:
    """An expert's output projection, and its bias as the last row."""
    w_FD = experts.w_out_EHD[expert].astype(np.float64)
    if experts.b_out_ED is None:
        return w_FD
    return np.concatenate([w_FD, experts.b_out_ED[expert, None]])


def _check(sweeps: int, ridge: float) -> None:
    if sweeps < 1:
        raise UserError(f"sweeps={sweeps}: must be at least 1; choose about 3")
    check_ridge(ridge)
