"""Random experts and samples for compression, and an expert in float64 numpy."""

import numpy as np

from moejax.compress.experts import LayerExperts, Sample

ACTIVATIONS = ("swiglu", "geglu", "swiglu_oai", "gelu", "relu2")
PLAIN = ("gelu", "relu2")


def random_experts(rng, activation="swiglu", biases=False, E=5, D=8, H=6):
    """Experts whose hidden values reach where activations bend and clip."""
    N = 1 if activation in PLAIN else 2
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return LayerExperts(
        w_in_EDNH=draw(E, D, N, H),
        w_out_EHD=draw(E, H, D),
        b_in_ENH=draw(E, N, H) if biases else None,
        b_out_ED=draw(E, D) if biases else None,
        activation=activation,
    )


def random_sample(rng, tokens, num_experts, top_k=2, D=8):
    """Tokens with distinct choices; some have fewer than top_k of them."""
    order = rng.random((tokens, num_experts)).argsort(1)[:, :top_k].astype(np.int32)
    missing = rng.random(order.shape) < 0.1
    scores = rng.uniform(0.1, 1, order.shape).astype(np.float32)
    return Sample(
        x_TD=rng.standard_normal((tokens, D)).astype(np.float32),
        experts_TK=np.where(missing, np.int32(-1), order),
        scores_TK=np.where(missing, np.float32(0), scores),
    )


def permuted(experts, expert, order):
    """One expert, its hidden units in another order."""
    return LayerExperts(
        experts.w_in_EDNH[[expert]][..., order],
        experts.w_out_EHD[[expert]][:, order],
        None if experts.b_in_ENH is None else experts.b_in_ENH[[expert]][..., order],
        None if experts.b_out_ED is None else experts.b_out_ED[[expert]],
        experts.activation,
    )


def joined(*banks):
    """Experts of several banks as one bank."""
    arrays = [
        None
        if getattr(banks[0], name) is None
        else np.concatenate([getattr(b, name) for b in banks])
        for name in ("w_in_EDNH", "w_out_EHD", "b_in_ENH", "b_out_ED")
    ]
    return LayerExperts(*arrays, banks[0].activation)


def true_hidden(experts, e, x):
    """[H] of one token, in float64."""
    h = np.einsum("d,dnh->nh", x.astype(np.float64), experts.w_in_EDNH[e].astype(np.float64))
    if experts.b_in_ENH is not None:
        h = h + experts.b_in_ENH[e]
    gelu = lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))  # noqa: E731
    if experts.activation == "swiglu":
        return h[0] / (1 + np.exp(-h[0])) * h[1]
    if experts.activation == "geglu":
        return gelu(h[0]) * h[1]
    if experts.activation == "swiglu_oai":
        gate = np.minimum(h[0], 7)
        return gate / (1 + np.exp(-1.702 * gate)) * (np.clip(h[1], -7, 7) + 1)
    return gelu(h[0]) if experts.activation == "gelu" else np.maximum(h[0], 0) ** 2


def true_output(experts, e, x):
    """[D] of one token, in float64."""
    y = true_hidden(experts, e, x) @ experts.w_out_EHD[e].astype(np.float64)
    return y if experts.b_out_ED is None else y + experts.b_out_ED[e]


def true_layer(experts, sample, table=None):
    """[T, D]: each token's sum of score·output, scores of one merged expert added up first."""
    y = np.zeros(sample.x_TD.shape)
    for t, x in enumerate(sample.x_TD):
        total: dict[int, float] = {}
        for e, score in zip(sample.experts_TK[t].tolist(), sample.scores_TK[t].tolist()):
            if e >= 0:
                to = e if table is None else int(table[e])
                total[to] = total.get(to, 0.0) + score
        for e, score in total.items():
            y[t] += score * true_output(experts, e, x)
    return y
