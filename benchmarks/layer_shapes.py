"""The shapes of the expert-layer benchmark, their inputs and their rooflines; numpy alone.

Shape letters: T tokens, D model width, H hidden width of an expert, E experts, K experts of a
token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

PEAK_FLOPS = 788e12  # bf16, measured: torch, 8192×8192×8192 on an H100
PEAK_BYTES = 3.05e12  # bytes/s, measured read rate of an H100's memory
SAMPLE = 64  # tokens that are compared with float32
LIMIT = 1e-2  # largest norm-relative error of a bf16 layer against float32


@dataclass(frozen=True)
class Shape:
    """One MoE layer and how many tokens it gets; `decode`: judged by the bytes it must read."""

    tokens: int
    d_model: int
    hidden: int
    experts: int
    top_k: int
    decode: bool = False

    def flops(self, backward: bool) -> float:
        """Of the expert products: 6·T·D·H·K, three times that with the backward."""
        forward = 6.0 * self.tokens * self.d_model * self.hidden * self.top_k
        return forward * 3 if backward else forward

    def floor_ms(self, backward: bool, touched: int) -> float:
        """The roofline: time of the FLOPs, or for decode of reading the touched experts."""
        if self.decode:
            return touched * 3 * self.d_model * self.hidden * 2 / PEAK_BYTES * 1e3
        return self.flops(backward) / PEAK_FLOPS * 1e3


_MIXTRAL = Shape(16384, 4096, 14336, 8, 2)
_QWEN3 = Shape(32768, 2048, 768, 128, 8)
SHAPES = {
    "mixtral_8x7b": _MIXTRAL,
    "qwen3_30b_a3b": _QWEN3,
    "sonic_fine": Shape(32768, 4096, 1024, 128, 8),
    "mixtral_b1": replace(_MIXTRAL, tokens=1, decode=True),
    "mixtral_b16": replace(_MIXTRAL, tokens=16, decode=True),
    "mixtral_b64": replace(_MIXTRAL, tokens=64, decode=True),
    "qwen3_b16": replace(_QWEN3, tokens=16, decode=True),
    "qwen3_b256": replace(_QWEN3, tokens=256, decode=True),
}


def find_shape(name: str, tiny: bool) -> Shape:
    """The shape, or a toy of the same kind to rehearse with."""
    shape = SHAPES[name]
    if not tiny:
        return shape
    tokens, experts = min(shape.tokens, 192), min(shape.experts, 16)
    return replace(
        shape,
        tokens=tokens,
        d_model=128,
        hidden=64,
        experts=experts,
        top_k=min(shape.top_k, 4),
    )


@dataclass(frozen=True)
class Inputs:
    """What all implementations share. Expert weights each framework draws on its device.

    x_TD: float32, standard normal, to be rounded to bf16.
    ct_TD: float32, standard normal: the fixed cotangent of y.
    router_DE: float32, normal / √D.
    bias_E: float32, added to the logits; None for uniform routing.
    sample: int64, indices of the tokens that are compared with float32.
    touched: experts that at least one token chooses.
    """

    x_TD: np.ndarray
    ct_TD: np.ndarray
    router_DE: np.ndarray
    bias_E: np.ndarray | None
    sample: np.ndarray
    touched: int


def make_inputs(shape: Shape, routing: str, seed: int = 0) -> Inputs:
    """The same numbers in every process.

    Random tokens and a random router choose experts uniformly at random, not evenly: few tokens
    leave some experts untouched.
    """
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32)

    router_DE = normal(shape.d_model, shape.experts) / np.float32(np.sqrt(shape.d_model))
    x_TD, ct_TD = normal(shape.tokens, shape.d_model), normal(shape.tokens, shape.d_model)
    bias_E = zipf_bias(shape.experts, shape.top_k) if routing == "zipf" else None
    logits_TE = x_TD @ router_DE + (0.0 if bias_E is None else bias_E)
    # Rounding x to bf16 may move a close choice; the count of experts touched hardly notices.
    chosen = np.argpartition(-logits_TE, shape.top_k - 1, axis=1)[:, : shape.top_k]
    sample = np.sort(rng.permutation(shape.tokens)[:SAMPLE])
    return Inputs(x_TD, ct_TD, router_DE, bias_E, sample, np.unique(chosen).size)


def zipf_shares(experts: int, top_k: int) -> np.ndarray:
    """Probability that a token uses the expert of rank 1, 2, …, E; sums to K.

    Proportional to 1/rank (Zipf, exponent 1). A token uses an expert at most once, so a share ends
    at 0.99, and what is above is given to the others in proportion.
    """
    rank_E = np.arange(1, experts + 1, dtype=np.float64)
    most, shares_E = 0.99, np.zeros(experts)
    for full in range(experts):  # how many experts are at the limit
        shares_E = (top_k - full * most) / np.sum(1 / rank_E[full:]) / rank_E
        shares_E[:full] = most
        if full == experts - 1 or shares_E[full] <= most:
            break
    return np.minimum(shares_E, most)


def zipf_bias(experts: int, top_k: int, seed: int = 1) -> np.ndarray:
    """Biases of the logits that make the experts' popularity Zipf with exponent 1.

    Logits of random tokens are standard normal, so the biases are fitted once to such logits, by
    moving each as far as a normal distribution would need for its share to come out right.
    Ranks are dealt to the experts at random.
    """
    rng = np.random.default_rng(seed)
    logits_NE = rng.standard_normal((8192, experts))
    quantile = np.vectorize(NormalDist().inv_cdf)
    wanted_E = zipf_shares(experts, top_k)
    bias_E = np.zeros(experts)
    for step in range(40):
        biased_NE = logits_NE + bias_E
        chosen = np.argpartition(-biased_NE, top_k - 1, axis=1)[:, :top_k]
        share_E = np.bincount(chosen.ravel(), minlength=experts) / len(logits_NE)
        share_E = np.clip(share_E, 1e-4, 1 - 1e-4)
        rate = 0.7 if step < 20 else 0.3
        bias_E += rate * (quantile(wanted_E) - quantile(share_E))
        bias_E -= bias_E.mean()
    return bias_E[rng.permutation(experts)].astype(np.float32)
