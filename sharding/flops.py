"""Floating-point operations a token costs, and what devices can do at most."""

from __future__ import annotations

from moejax.config import AttentionConfig, ExpertsConfig, ModelConfig

__all__ = [
    "PEAK_FLOPS",
    "active_matrix_parameters",
    "attention_matrix_parameters",
    "peak_flops",
    "routed_matrix_parameters",
    "step_flops_per_token",
]

PEAK_FLOPS: dict[str, float] = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5e": 197e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6e": 918e12,
    "TPU v6 lite": 918e12,
}
"""Dense bf16 peak of a device by `device_kind`, FLOP/s, from the vendors' data sheets."""


def peak_flops(device_kind: str, compute_dtype: str) -> float | None:
    """Peak FLOP/s of a device; None where it is not known or the products are not bf16."""
    return PEAK_FLOPS.get(device_kind) if compute_dtype == "bfloat16" else None


def _mlp_parameters(d_model: int, experts: ExpertsConfig, hidden: int) -> int:
    return d_model * hidden * (experts.num_in + 1)


def attention_matrix_parameters(d_model: int, attention: AttentionConfig) -> int:
    """Weights of attention's projections; every token is multiplied with all of them."""
    heads, head_dim, latent = attention.num_heads, attention.head_dim, attention.latent
    if latent is None:
        return d_model * (2 * heads + 2 * attention.num_kv_heads) * head_dim
    source, down = latent.query_rank or d_model, latent.rank + latent.rope_dim
    down += latent.query_rank or 0
    up = latent.rank * (head_dim - latent.rope_dim + latent.value_dim)
    return d_model * down + heads * (source * head_dim + up + latent.value_dim * d_model)


def active_matrix_parameters(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: attention, router, K experts, shared, head.

    The embedding is a lookup and counts nothing; norms and biases are left out, and so is folding
    projections of rows into the experts' weights, or making experts of parameters that they share,
    which is once a microbatch, not a token.
    """
    d_model = config.d_model
    total = d_model * config.vocab_size + routed_matrix_parameters(config)
    for layer in config.layers():
        total += attention_matrix_parameters(d_model, layer.attention)
        if layer.moe is not None:
            experts, router, wire = layer.moe.experts, layer.moe.router, layer.moe.exchange.wire
            total += _mlp_parameters(d_model, experts, experts.shared_hidden)
            total += d_model * ((wire.dispatch_dim or 0) + (wire.combine_dim or 0))
            total += d_model * router.num_outputs
        elif layer.dense is not None:
            total += _mlp_parameters(d_model, layer.dense, layer.dense.hidden)
    return total


def routed_matrix_parameters(config: ModelConfig) -> int:
    """Of those the K routed experts' of a token, over all layers.

    A projection that experts share counts K times: a token is multiplied with each of its experts.
    """
    total = 0
    for layer in config.layers():
        if layer.moe is not None:
            experts = layer.moe.experts
            width_in, width_out = layer.moe.exchange.wire.widths(config.d_model)
            used = layer.moe.router.top_k * experts.hidden
            total += used * (width_in * experts.num_in + width_out)
    return total


def step_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward a token: 6 a weight, and causal attention's products.

    Attention counts the half that a causal mask leaves, forward 2·S·N·h a layer, or of it what a
    window of W tokens leaves, W − W²/2S instead of S/2 keys a token; three times that with the
    backward (arXiv 2204.02311, appendix B, counts the whole square). Values of another width v
    count (h + v)/2 for h.
    """
    scores = 0.0
    for layer in config.layers():
        attention = layer.attention
        window = min(attention.window or seq_len, seq_len)
        keys = window - window**2 / (2 * seq_len)
        scores += 2.0 * keys * attention.num_heads * (attention.head_dim + attention.value_dim)
    return 6.0 * active_matrix_parameters(config) + 3.0 * scores
