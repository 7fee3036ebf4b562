"""Closed formulas: parameters and floating-point operations of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moejax.config import AttentionConfig, ExpertsConfig, LayerConfig, ModelConfig
from sharding.flops import (
    active_matrix_parameters,
    attention_matrix_parameters,
    routed_matrix_parameters,
    step_flops_per_token,
)

__all__ = ["Flops", "Parameters", "count_parameters", "flops_per_token"]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, padding left out.

    total: all.
    active: those a token uses: all but the E − K experts that each layer leaves out; parameters
        that experts share are used.
    experts: in the routed experts alone, with what they share.
    """

    total: int
    active: int
    experts: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token of a full sequence; a product and a sum are two.

    forward: once through the model.
    step: forward and backward, three times that; what utilisation is measured by.
    recomputed: what the remat policy runs again on top.
    weights: 6 times the weights a token is multiplied with, the share of `step` without
        attention's scores.
    """

    forward: float
    step: float
    recomputed: float
    weights: float


def _mlp_size(d_model: int, experts: ExpertsConfig, hidden: int) -> int:
    size = d_model * hidden * (experts.num_in + 1)
    return size + (experts.num_in * hidden + d_model if experts.bias else 0)


def _attention_size(d_model: int, attention: AttentionConfig) -> int:
    heads = attention.num_heads + attention.num_kv_heads
    norms = {"none": 0, "head": 2 * attention.head_dim, "full": heads * attention.head_dim}
    size = attention_matrix_parameters(d_model, attention) + norms[attention.qk_norm]
    if attention.latent is not None:
        size += attention.latent.rank + (attention.latent.query_rank or 0)
    if attention.bias:
        size += (heads + attention.num_kv_heads) * attention.head_dim
    size += d_model if attention.output_bias else 0
    return size + (attention.num_heads if attention.sinks else 0)


def _layer_size(layer: LayerConfig) -> tuple[int, int, int]:
    """Parameters of a layer: all, in its routed experts, in those of them a token uses."""
    d_model = layer.d_model
    size = _attention_size(d_model, layer.attention) + 2 * d_model
    if layer.dense is not None:
        return size + _mlp_size(d_model, layer.dense, layer.dense.hidden), 0, 0
    assert layer.moe is not None
    router, experts = layer.moe.router, layer.moe.experts
    size += (d_model + router.bias) * router.num_outputs
    if experts.shared_hidden:
        size += _mlp_size(d_model, experts, experts.shared_hidden)
    size += d_model * experts.shared_gate
    wire = layer.moe.exchange.wire
    size += d_model * ((wire.dispatch_dim or 0) + (wire.combine_dim or 0))
    own, shared = _experts_sizes(d_model, experts)
    routed = router.num_experts * own + shared
    return size + routed, routed, router.top_k * own + shared


def _experts_sizes(d_model: int, experts: ExpertsConfig) -> tuple[int, int]:
    """Parameters that one expert has of its own, and those of all together."""
    sizes = d_model, experts.num_in, experts.hidden, d_model
    own, shared = (
        sum(map(math.prod, shapes(*sizes).values()))
        for shapes in (experts.sharing.own, experts.sharing.shared)
    )
    biases = experts.num_in * experts.hidden + d_model if experts.bias else 0
    return own + biases, shared


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of a model; selection biases, which are not trained by gradients, not counted."""
    tables = 1 if config.tie_embeddings else 2
    sizes = [_layer_size(layer) for layer in config.layers()]
    outside = tables * config.vocab_size * config.d_model + config.d_model
    total = outside + sum(s[0] for s in sizes)
    experts, used = sum(s[1] for s in sizes), sum(s[2] for s in sizes)
    return Parameters(total, total - experts + used, experts)


def flops_per_token(config: ModelConfig, seq_len: int) -> Flops:
    """Operations of one token, the mean over a causal sequence.

    Args:
        config: the model.
        seq_len: S, tokens of a sequence.
    """
    step = step_flops_per_token(config, seq_len)
    weights = 6.0 * active_matrix_parameters(config)
    scores, head = (step - weights) / 3, 2.0 * config.d_model * config.vocab_size
    layers, routed = step / 3 - head, 2.0 * routed_matrix_parameters(config)
    again = {
        "none": 0.0,
        "layer": layers,
        # The sum over `tensor` behind attention is kept, and so its last product is.
        "local": layers - sum(2.0 * _attention_output(layer) for layer in config.layers()),
        # Products of two matrices are kept: those of scores and of experts have a batch.
        "dots": scores + routed,
    }
    return Flops(step / 3, step, again[config.remat], weights)


def _attention_output(layer: LayerConfig) -> int:
    """Weights of the product that leaves attention."""
    return layer.attention.num_heads * layer.attention.value_dim * layer.d_model
