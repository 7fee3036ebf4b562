"""What an expert gives for tokens: its hidden activations, its output, and weighted sums of them.

Products are float32, as the layer's are; sums over experts are float64. Work is done some tokens
at a time, so that beside the result little memory is held. Shape letters as in
`moejax.compress.experts`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float32, Float64
from scipy.special import expit

from moejax.compress.experts import LayerExperts
from moejax.config import Activation
from moejax.errors import UserError

__all__ = ["activate", "chunks", "hidden_activations", "output", "weighted_outputs"]

_NUMBERS_AT_ONCE = 2**24  # 64 MiB in float32
_LIMIT, _ALPHA = np.float32(7.0), np.float32(1.702)


def chunks(tokens: int, width: int) -> Iterator[slice]:
    """Slices of tokens so that `width` numbers for each of them take 64 MiB in float32 at most."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, width))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def activate(
    h_TNH: Float32[np.ndarray, "T N H"], activation: Activation
) -> Float32[np.ndarray, "T H"]:
    """`moejax.activations.apply_activation` in numpy.

    Eager JAX would compile each operation anew for every number of tokens, and experts have as
    many different ones.

    Raises:
        UserError: the activation is unknown.
    """
    first = h_TNH[:, 0]
    if activation == "swiglu":
        return first * expit(first) * h_TNH[:, 1]
    if activation == "geglu":
        return _gelu(first) * h_TNH[:, 1]
    if activation == "swiglu_oai":
        gate = np.minimum(first, _LIMIT)
        return gate * expit(_ALPHA * gate) * (np.clip(h_TNH[:, 1], -_LIMIT, _LIMIT) + 1)
    if activation == "gelu":
        return _gelu(first)
    if activation == "relu2":
        return np.square(np.maximum(first, 0))
    raise UserError(
        f"activation={activation!r}: choose one of swiglu, geglu, swiglu_oai, gelu, relu2"
    )


def hidden_activations(
    experts: LayerExperts, expert: int, x_TD: Float32[np.ndarray, "T D"]
) -> Float32[np.ndarray, "T H"]:
    """What an expert's output projection is given, for each token."""
    w_DNH = experts.w_in_EDNH[expert]
    D, N, H = w_DNH.shape
    y_TH = np.empty((len(x_TD), H), np.float32)
    for part in chunks(len(x_TD), (N + 1) * H):
        h_TNH = (x_TD[part] @ w_DNH.reshape(D, N * H)).reshape(-1, N, H)
        if experts.b_in_ENH is not None:
            h_TNH += experts.b_in_ENH[expert]
        y_TH[part] = activate(h_TNH, experts.activation)
    return y_TH


def output(
    experts: LayerExperts, expert: int, x_TD: Float32[np.ndarray, "T D"]
) -> Float32[np.ndarray, "T D"]:
    """An expert's output for each token, its bias included and no score applied."""
    y_TD = np.empty((len(x_TD), experts.w_out_EHD.shape[2]), np.float32)
    for part in chunks(len(x_TD), experts.w_out_EHD.shape[1]):
        y_TD[part] = hidden_activations(experts, expert, x_TD[part]) @ experts.w_out_EHD[expert]
    if experts.b_out_ED is not None:
        y_TD += experts.b_out_ED[expert]
    return y_TD


def weighted_outputs(
    experts: LayerExperts, x_TD: Float32[np.ndarray, "T D"], weights_TE: Float[np.ndarray, "T E"]
) -> Float64[np.ndarray, "T D"]:
    """Each token's sum of weight·output over the experts; where the weight is 0 none is computed.

    With `Sample.weights` it is what the layer adds to the token.
    """
    y_TD = np.zeros((len(x_TD), experts.w_out_EHD.shape[2]))
    for expert in range(experts.num_experts):
        (rows,) = np.nonzero(weights_TE[:, expert])
        for part in chunks(len(rows), 2 * y_TD.shape[1]):
            at = rows[part]
            weight = weights_TE[at, expert, None].astype(np.float64)
            y_TD[at] += weight * output(experts, expert, x_TD[at])
    return y_TD


def _gelu(x: np.ndarray) -> np.ndarray:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))
