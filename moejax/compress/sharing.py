"""Experts that share parameters, from a trained layer and back.

Arrays are named like the parameters of `moejax.shared_bank.SharedExpertBank`, in logical order. See
`moejax.sharing_config` for the kinds. Shape letters as in `moejax.compress.experts`; M matrices of
a basis, F the numbers of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from moejax.compress.clusters import frequencies
from moejax.compress.experts import LayerExperts, Sample
from moejax.compress.merge import fit_output
from moejax.compress.outputs import chunks, hidden_activations, output
from moejax.compress.similarity import match_units
from moejax.config import Activation, ModelConfig
from moejax.errors import UserError
from moejax.sharing_config import Sharing, SharingConfig

__all__ = ["align", "expand", "expand_model", "to_shared"]

ROUNDS = 3
"""Times that units are put in order: like one expert's, then like the mean's."""
OF_BANK = re.compile(r"params/(layers\.\d+\.moe\.bank)\.(\w+)")


def to_shared(
    experts: LayerExperts,
    kind: Sharing,
    rank: int | None = None,
    sample: Sample | None = None,
    *,
    ridge: float = 0.1,
) -> dict[str, Float32[np.ndarray, "..."]]:
    """A layer whose experts share parameters, close to one whose experts do not.

    Hidden units are put in a common order first (`align`), by what is to be shared.

    `up` and `in`: the shared projection is the mean of the experts' own, weighted by how much each
    is used. A unit's up projection only scales the unit in swiglu and geglu, so with `up` what best
    fits of an expert's own is a multiple of the shared one, and goes into the output projection.
    With a sample each output projection and its bias are then fitted to what the expert gave for
    the tokens that chose it (`moejax.compress.merge.fit_output`); on these the squared error of
    score·output is never larger than without, and few tokens change little.

    `basis`: of all layers with M matrices the one with the least squared error of the aligned
    weights, by truncated singular value decompositions of [E, D·N·H] and [E, H·D] (Eckart and Young
    1936, doi 10.1007/BF02288367); with M = E nothing is lost. Scaled so that the rows of `c_in` and
    `c_out` have length 1 in the mean square, as where training begins. With a sample each expert's
    `c_out` is then fitted to what the expert gave, as output projections are above: M numbers,
    which make good what they can of the error of the input projections.

    Args:
        experts: of a layer.
        kind: what is shared.
        rank: M of `basis`.
        sample: tokens to weigh by and to fit to; None: experts count alike, nothing is fitted.
        ridge: penalty on leaving what is fitted, as of `moejax.compress.merge.merge`.

    Returns:
        The parameters by name, float32.

    Raises:
        UserError: an impossible kind, rank or ridge, or a sample of other experts.
    """
    sharing = SharingConfig(kind, rank)
    E, _, N, _ = experts.w_in_EDNH.shape
    if not sharing.active:
        raise UserError("kind='none': shares nothing; choose one of up, in, basis")
    if kind == "up" and N == 1:
        raise UserError(
            f"kind='up' with activation={experts.activation!r}: has no gate; choose 'in' or 'basis'"
        )
    if rank is not None and rank > E:
        raise UserError(f"rank={rank}: {E} experts have at most {E} matrices; choose so many")
    if not 0 < ridge < np.inf:
        raise UserError(f"ridge={ridge}: must be a number above 0, such as 0.1")
    used_E = np.zeros(E) if sample is None else frequencies(sample, E)
    aligned = align(experts, kind, used_E)
    biases = {"b_in": aligned.b_in_ENH, "b_out": aligned.b_out_ED}
    if kind == "basis":
        assert rank is not None
        c_in, basis_in = _decomposed(aligned.w_in_EDNH, rank)
        c_out, basis_out = _decomposed(aligned.w_out_EHD, rank)
        made = {"c_in": c_in, "w_basis_in": basis_in, "c_out": c_out, "w_basis_out": basis_out}
    else:
        first = N - 1 if kind == "up" else 0  # of what is shared
        projections_EDnH = aligned.w_in_EDNH[:, :, first:]
        share_E = _shares(used_E)
        mean_DnH = np.einsum("e,ednh->dnh", share_E, projections_EDnH, dtype=np.float64)
        w_out_EHD = aligned.w_out_EHD
        if kind == "up" and _scales(aligned):
            w_out_EHD = _multiples(projections_EDnH[:, :, 0], mean_DnH[:, 0])[..., None] * w_out_EHD
        made = {"w_shared": mean_DnH, "w_out": w_out_EHD}
        if kind == "up":
            made["w_in"] = aligned.w_in_EDNH[:, :, :first]
    made |= {name: bias for name, bias in biases.items() if bias is not None}
    made = {name: np.array(array, np.float32) for name, array in made.items()}
    if sample is not None:
        (_fit_combinations if kind == "basis" else _fit)(made, experts, sample, ridge)
    return made


def expand(made: Mapping[str, np.ndarray], activation: Activation) -> LayerExperts:
    """Independent experts that compute what those of `to_shared` do.

    Args:
        made: parameters by name.
        activation: of the experts.
    """
    if "c_in" in made:
        w_in, w_out = (
            np.tensordot(made[f"c_{side}"], made[f"w_basis_{side}"], 1) for side in ("in", "out")
        )
    else:
        w_out, shared_DnH = made["w_out"], made["w_shared"]
        w_in = np.broadcast_to(shared_DnH, (len(w_out), *shared_DnH.shape))
        w_in = np.concatenate([made["w_in"], w_in], 2) if "w_in" in made else w_in.copy()
    return LayerExperts(w_in, w_out, made.get("b_in"), made.get("b_out"), activation)


def expand_model(
    weights: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, Any], ModelConfig]:
    """A model whose experts are independent and compute the same: for what takes no other.

    Args:
        weights: in logical order, `params/…` and `bias/…`, as of a checkpoint; no moments.
        config: of the model.

    Returns:
        Weights and model; where nothing is shared, what was given.
    """
    sharing = config.moe.experts.sharing
    if not sharing.active:
        return dict(weights), config
    banks: dict[str, dict[str, np.ndarray]] = {}
    others = {}
    for name, array in weights.items():
        if found := OF_BANK.fullmatch(name):
            banks.setdefault(found[1], {})[found[2]] = np.asarray(array, np.float32)
        else:
            others[name] = array
    experts = replace(config.moe.experts, sharing=SharingConfig())
    for bank, made in banks.items():
        whole = expand(made, experts.activation)
        arrays = whole.w_in_EDNH, whole.w_out_EHD, whole.b_in_ENH, whole.b_out_ED
        for name, array in zip(("w_in", "w_out", "b_in", "b_out"), arrays, strict=True):
            if array is not None:
                others[f"params/{bank}.{name}"] = array
    return others, replace(config, moe=replace(config.moe, experts=experts))


def align(experts: LayerExperts, kind: Sharing, used_E: Float64[np.ndarray, " E"]) -> LayerExperts:
    """The same experts with their hidden units in a common order.

    Each expert's units are put in the order that fits the most used one's best, then, twice, the
    mean's. Compared is only what `kind` shares: the rest may stand as it will. Each time takes E
    assignments of H units and 2·D·H² operations for each matrix compared.

    Args:
        experts: of a layer.
        kind: what is to be shared.
        used_E: how much each is used; all 0: alike.
    """
    compared = _compared(experts, kind)
    share_E = _shares(used_E)
    first = int(used_E.argmax())
    reference = compared.take(np.array([first]))
    orders_EH = np.tile(np.arange(experts.w_out_EHD.shape[1]), (experts.num_experts, 1))
    for _ in range(ROUNDS):
        for e in range(experts.num_experts):
            orders_EH[e] = match_units(reference, compared.take(np.array([e])))
        placed = _in_order(compared, orders_EH)
        reference = replace(
            reference,
            w_in_EDNH=_mean(share_E, placed.w_in_EDNH),
            w_out_EHD=_mean(share_E, placed.w_out_EHD),
        )
    return _in_order(experts, orders_EH)


def _compared(experts: LayerExperts, kind: Sharing) -> LayerExperts:
    """The experts without what each has of its own, of which the order says nothing."""
    w_in_EDNH, w_out_EHD = experts.w_in_EDNH, experts.w_out_EHD
    if kind == "up":
        w_in_EDNH = w_in_EDNH.copy()
        w_in_EDNH[:, :, 0] = 0
        if _scales(experts):  # a multiple is as good
            length = np.linalg.norm(w_in_EDNH, axis=1, keepdims=True)
            w_in_EDNH /= np.maximum(length, np.finfo(np.float32).tiny)
    if kind != "basis":
        w_out_EHD = np.zeros_like(w_out_EHD)
    return LayerExperts(w_in_EDNH, w_out_EHD, None, None, experts.activation)


def _in_order(experts: LayerExperts, orders_EH: np.ndarray) -> LayerExperts:
    orders = orders_EH[:, None, None]
    b_in_ENH = experts.b_in_ENH
    return replace(
        experts,
        w_in_EDNH=np.take_along_axis(experts.w_in_EDNH, orders, 3),
        w_out_EHD=np.take_along_axis(experts.w_out_EHD, orders_EH[..., None], 1),
        b_in_ENH=None if b_in_ENH is None else np.take_along_axis(b_in_ENH, orders_EH[:, None], 2),
    )


def _mean(share_E: Float64[np.ndarray, " E"], array: np.ndarray) -> Float32[np.ndarray, "1 ..."]:
    return np.tensordot(share_E.astype(np.float32), array, 1)[None]


def _shares(used_E: Float64[np.ndarray, " E"]) -> Float64[np.ndarray, " E"]:
    total = used_E.sum()
    return used_E / total if total > 0 else np.full(len(used_E), 1 / len(used_E))


def _scales(experts: LayerExperts) -> bool:
    """Whether a multiple of a unit's up projection is that multiple of the unit."""
    return experts.activation in ("swiglu", "geglu") and experts.b_in_ENH is None


def _multiples(
    own_EDH: Float32[np.ndarray, "E D H"], shared_DH: Float64[np.ndarray, "D H"]
) -> Float64[np.ndarray, "E H"]:
    """What to multiply each shared column with to be as close as may be to an expert's own."""
    square_H = np.square(shared_DH).sum(0)
    products_EH = np.einsum("edh,dh->eh", own_EDH, shared_DH, dtype=np.float64)
    return products_EH / np.maximum(square_H, np.finfo(np.float64).tiny)


def _decomposed(matrices: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Combinations [E, M] and matrices [M, …] whose products have the least squared error.

    The left singular vectors are the eigenvectors of the experts' products, E × E numbers.
    """
    E = len(matrices)
    flat_EF = matrices.reshape(E, -1)
    gram_EE = np.zeros((E, E))
    for part in chunks(flat_EF.shape[1], 2 * E):
        part_EF = flat_EF[:, part].astype(np.float64)
        gram_EE += part_EF @ part_EF.T
    vectors_EM = np.linalg.eigh(gram_EE)[1][:, ::-1][:, :rank]  # eigenvalues ascend
    length = np.sqrt(rank / E)  # of a row of the vectors, in the mean square
    basis_MF = (vectors_EM.T * length).astype(np.float32) @ flat_EF
    return vectors_EM / length, basis_MF.reshape(rank, *matrices.shape[1:])


def _fit(made: dict[str, np.ndarray], experts: LayerExperts, sample: Sample, ridge: float) -> None:
    """Fits each expert's output projection, and its bias, to what the expert gave; in place."""
    now, weights_TE = expand(made, experts.activation), sample.weights(experts.num_experts)
    for e in range(experts.num_experts):
        one = np.array([e])
        fitted = fit_output(
            now.take(one), experts.take(one), sample.x_TD, weights_TE[:, one], ridge
        )
        made["w_out"][e] = fitted.w_out_EHD[0]
        if fitted.b_out_ED is not None:
            made["b_out"][e] = fitted.b_out_ED[0]


def _fit_combinations(
    made: dict[str, np.ndarray], experts: LayerExperts, sample: Sample, ridge: float
) -> None:
    """Fits each expert's combination of output projections to what the expert gave; in place."""
    now, weights_TE = expand(made, experts.activation), sample.weights(experts.num_experts)
    basis_MHD = made["w_basis_out"]
    M, _, D = basis_MHD.shape
    for e, c_M in enumerate(made["c_out"]):
        (rows,) = np.nonzero(weights_TE[:, e])
        gram_MM, miss_M = np.zeros((M, M)), np.zeros(M)
        for part in chunks(len(rows), (3 * M + 3) * D):
            at = rows[part]
            score_T1, x_TD = weights_TE[at, e, None], sample.x_TD[at]
            each_MTD = (score_T1 * hidden_activations(now, e, x_TD)) @ basis_MHD
            miss_TD = output(experts, e, x_TD)
            if experts.b_out_ED is not None:
                miss_TD -= experts.b_out_ED[e]
            miss_TD = score_T1 * miss_TD - np.tensordot(c_M, each_MTD, 1)
            each_MF = each_MTD.reshape(M, -1).astype(np.float64)
            gram_MM += each_MF @ each_MF.T
            miss_M += each_MF @ miss_TD.reshape(-1)
        if (power := np.trace(gram_MM)) == 0:  # no token, or none that reaches the projections
            continue
        gram_MM[np.diag_indices(M)] += ridge * power / len(rows)
        c_M += np.linalg.solve(gram_MM, miss_M).astype(np.float32)
