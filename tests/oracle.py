"""A dense Mixture-of-Experts layer in float64 numpy, forward and backward written by hand.

It shares no code with moejax: every expert sees every token, and a matrix of weights [T, E], zero
where an expert was not chosen, says what counts. The loss it differentiates is

    Σ y·ct + load_balance_coef · E Σ_e f_e P_e + z_coef · mean logsumexp².
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GELU_C = np.sqrt(2 / np.pi)


@dataclass(frozen=True)
class Dense:
    """What the oracle needs to know of a layer."""

    top_k: int
    activation: str = "swiglu"
    renormalize: bool = True
    load_balance_coef: float = 0.0
    z_coef: float = 0.0


@dataclass
class Result:
    """Outputs and gradients; `grads` has the keys of the weights given, and `x`.

    `scales` holds, for what is a difference of larger terms (the loss, the router's gradients), the
    norm that it would have without cancelling: rounding is relative to that.
    """

    y: np.ndarray
    loss: float
    grads: dict[str, np.ndarray]
    scales: dict[str, float]
    experts: np.ndarray  # [T, K], -1 for masked tokens
    scores: np.ndarray  # [T, K]
    counts: np.ndarray  # [E]
    entropy_sum: float
    gap: float  # smallest distance between a chosen logit and the best one not chosen


def _sigmoid(v):
    return 0.5 * (1 + np.tanh(v / 2))


def _gelu(v):
    """Tanh-approximated GELU and its derivative."""
    inner = GELU_C * (v + 0.044715 * v**3)
    tanh = np.tanh(inner)
    slope = GELU_C * (1 + 3 * 0.044715 * v**2)
    return 0.5 * v * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * v * (1 - tanh**2) * slope


def _silu(v):
    s = _sigmoid(v)
    return v * s, s * (1 + v * (1 - s))


def _clamped(gate, value):
    """gpt-oss's activation, and its pull-back."""
    seen = np.stack([gate <= 7, np.abs(value) <= 7], axis=1)
    gate, value = np.minimum(gate, 7), np.clip(value, -7, 7) + 1
    s = _sigmoid(1.702 * gate)
    slope = s * (1 + 1.702 * gate * (1 - s))
    slopes = np.stack([value * slope, gate * s], axis=1) * seen
    return gate * s * value, lambda ct: ct[:, None] * slopes


def activate(h, name):
    """[T, N, H] → [T, H], and a function that pulls a cotangent [T, H] back to [T, N, H]."""
    if name == "relu2":
        y, slope = np.maximum(h[:, 0], 0) ** 2, 2 * np.maximum(h[:, 0], 0)
        return y, lambda ct: (ct * slope)[:, None]
    if name == "gelu":
        y, slope = _gelu(h[:, 0])
        return y, lambda ct: (ct * slope)[:, None]
    if name == "swiglu_oai":
        return _clamped(h[:, 0], h[:, 1])
    gate, slope = {"swiglu": _silu, "geglu": _gelu}[name](h[:, 0])
    value = h[:, 1]
    return gate * value, lambda ct: np.stack([ct * value * slope, ct * gate], axis=1)


def mlp(x, w_in, w_out, b_in, b_out, name):
    """One MLP on all tokens, and its pull-back to (x, w_in, w_out, b_in, b_out)."""
    h = np.einsum("td,dnh->tnh", x, w_in) + b_in
    a, pull_activation = activate(h, name)
    y = a @ w_out + b_out

    def pull(ct):
        h_ct = pull_activation(ct @ w_out.T)
        x_ct = np.einsum("tnh,dnh->td", h_ct, w_in)
        return x_ct, np.einsum("td,tnh->dnh", x, h_ct), a.T @ ct, h_ct.sum(0), ct.sum(0)

    return y, pull


def _softmax(v):
    e = np.exp(v - v.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def choose(logits, top_k):
    """The K largest logits of each token, best first, lower id first among equals."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :top_k]


def dense_moe(
    spec: Dense,
    weights: dict[str, np.ndarray],
    x: np.ndarray,
    ct: np.ndarray,
    mask: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
    scale: np.ndarray | None = None,
) -> Result:
    """Runs the layer and its backward.

    Args:
        spec: what the layer computes.
        weights: `router` [D, E], `w_in` [E, D, N, H], `w_out` [E, H, D], and where they exist
            `router_b` [E], `b_in` [E, N, H], `b_out` [E, D], `shared_w_in` [D, N, H'],
            `shared_w_out` [H', D], `shared_b_in`, `shared_b_out`, `shared_gate` [D].
        x: [T, D].
        ct: [T, D], the loss's derivative by y.
        mask: bool [T], False for tokens that are not routed and do not count.
        kept: bool [T, E], False for assignments that were dropped after scoring.
        chosen: int [T, K], the experts of each token; None: those of the largest logits.
        scale: [T, E], multiplies the probabilities that weights are made of.
    """
    x, ct = np.asarray(x, np.float64), np.asarray(ct, np.float64)
    w = {k: np.asarray(v, np.float64) for k, v in weights.items()}
    tokens, num_experts = x.shape[0], w["router"].shape[1]
    mask = np.ones(tokens, bool) if mask is None else np.asarray(mask)
    kept = np.ones((tokens, num_experts), bool) if kept is None else kept
    grads = {k: np.zeros_like(v) for k, v in w.items()}
    grads["x"] = np.zeros_like(x)

    logits = x @ w["router"] + w.get("router_b", 0.0)
    chosen = choose(logits, spec.top_k) if chosen is None else chosen
    scale = np.ones_like(logits) if scale is None else scale
    is_chosen = np.zeros((tokens, num_experts), bool)
    np.put_along_axis(is_chosen, chosen, True, axis=1)
    is_chosen &= mask[:, None]
    probs = _softmax(logits)
    if spec.renormalize:
        score = np.where(is_chosen, np.exp(logits - logits.max(1, keepdims=True)) * scale, 0)
        score /= np.maximum(score.sum(1, keepdims=True), 1e-300)
    else:
        score = np.where(is_chosen, probs * scale, 0)

    y, score_ct = np.zeros_like(x), np.zeros_like(score)
    for e in range(num_experts):
        out, pull = mlp(x, *_expert(w, e), spec.activation)
        used = np.where(kept[:, e], score[:, e], 0)
        y += used[:, None] * out
        score_ct[:, e] = np.where(kept[:, e], (out * ct).sum(1), 0)
        x_ct, *rest = pull(used[:, None] * ct)
        grads["x"] += x_ct
        for name, g in zip(("w_in", "w_out", "b_in", "b_out"), rest):
            if name in grads:
                grads[name][e] = g
    y += _shared(w, x, ct, spec, grads)

    # Σ y·ct by the logits, through the scores of the chosen experts
    if spec.renormalize:
        logits_ct, size = _softmax_ct(score, score_ct)
    else:
        logits_ct, size = _softmax_ct(probs, np.where(is_chosen, score_ct * scale, 0))
    counts = is_chosen.sum(0)
    loss, loss_size = (y * ct).sum(), np.abs(y * ct).sum()
    if mask.any():
        routed = mask.sum()
        share = counts / counts.sum()
        balance_ct = np.broadcast_to(
            spec.load_balance_coef * num_experts * share / routed, probs.shape
        )
        lse = logits.max(1) + np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
        losses = (probs[mask] * balance_ct[mask]).sum() + spec.z_coef * (lse[mask] ** 2).mean()
        loss, loss_size = loss + losses, loss_size + losses
        extra, extra_size = _softmax_ct(probs, balance_ct)
        z_ct = spec.z_coef * 2 * lse[:, None] * probs / routed
        logits_ct = logits_ct + np.where(mask[:, None], extra + z_ct, 0)
        size = size + np.where(mask[:, None], extra_size + np.abs(z_ct), 0)
    grads["router"] += x.T @ logits_ct
    if "router_b" in grads:
        grads["router_b"] += logits_ct.sum(0)
    grads["x"] += logits_ct @ w["router"].T

    ordered = -np.sort(-logits, axis=1)[mask]
    gap = np.inf
    if spec.top_k < num_experts and mask.any():
        gap = (ordered[:, spec.top_k - 1] - ordered[:, spec.top_k]).min()
    return Result(
        y=y,
        loss=float(loss),
        grads=grads,
        scales={
            "loss": float(loss_size),
            "router": float(np.linalg.norm(np.abs(x).T @ size)),
            "router_b": float(np.linalg.norm(size.sum(0))),
        },
        experts=np.where(mask[:, None], chosen, -1),
        scores=np.take_along_axis(score, chosen, axis=1),
        counts=counts,
        entropy_sum=float(-(probs * np.log(probs)).sum(1)[mask].sum()),
        gap=float(gap),
    )


def _softmax_ct(p, ct):
    """Pulls a softmax's cotangent back to its logits; and the size of the terms that cancel."""
    pulled = p * (ct - (p * ct).sum(1, keepdims=True))
    return pulled, p * (np.abs(ct) + (p * np.abs(ct)).sum(1, keepdims=True))


def _expert(w, e):
    return w["w_in"][e], w["w_out"][e], _at(w, "b_in", e), _at(w, "b_out", e)


def _at(w, name, e):
    return w[name][e] if name in w else 0.0


def _shared(w, x, ct, spec, grads):
    """The experts every token uses; adds their gradients."""
    if "shared_w_in" not in w:
        return 0.0
    biases = w.get("shared_b_in", 0.0), w.get("shared_b_out", 0.0)
    out, pull = mlp(x, w["shared_w_in"], w["shared_w_out"], *biases, spec.activation)
    gate = np.ones(x.shape[0])
    if "shared_gate" in w:
        gate = _sigmoid(x @ w["shared_gate"])
        gate_ct = (out * ct).sum(1) * gate * (1 - gate)
        grads["shared_gate"] += x.T @ gate_ct
        grads["x"] += gate_ct[:, None] * w["shared_gate"]
    x_ct, *rest = pull(gate[:, None] * ct)
    grads["x"] += x_ct
    for name, g in zip(("w_in", "w_out", "b_in", "b_out"), rest):
        if f"shared_{name}" in grads:
            grads[f"shared_{name}"] += g
    return gate[:, None] * out


def relative_error(got, want, scale: float | None = None) -> float:
    """Norm of the difference over the norm of what is right, or over `scale`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    assert np.isfinite(got).all()
    scale = np.linalg.norm(want) if scale is None else scale
    error = np.linalg.norm(got - want)
    return float(error / scale) if scale > 0 else float(error)
