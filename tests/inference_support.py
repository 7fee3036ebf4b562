"""What the tests of inference share: a tiny random model, and generation without a cache."""

import functools

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import (
    AttentionConfig,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from moejax.inference.generate import Generator
from moejax.training.state import Blueprint, load_weights, logical_targets
from sharding.mesh import TENSOR, MeshShape, abstract_mesh, make_mesh
from sharding.specs import specs_of

CONFIG = ModelConfig(
    vocab_size=257,
    d_model=32,
    num_layers=2,
    max_context=48,
    attention=AttentionConfig(4, 2, 8),
    moe=MoEConfig(
        RouterConfig(num_experts=8, top_k=2, selection_bias=True), ExpertsConfig(hidden=16)
    ),
    compute_dtype="float32",
)
PARTS = ("params", "bias")


def random_weights(config, rng):
    """A flat logical dict with values large enough that layers and biases matter."""
    targets = logical_targets(Blueprint(config, abstract_mesh(MeshShape())), PARTS)
    return {
        name: np.asarray(rng.normal(size=target.shape) * 0.3, np.float32)
        for name, target in targets.items()
    }


def make_generator(config, flat, sizes=(1, 1, 1), **options):
    blueprint = Blueprint(config, make_mesh(MeshShape(*sizes)))
    weights = load_weights(flat, blueprint, jnp.dtype(config.compute_dtype))
    return Generator(blueprint, *weights, **options)


@functools.cache
def _logits_of_prefixes(config):
    blueprint = Blueprint(config, make_mesh(MeshShape()))

    def run(params, biases, tokens_BS, lengths_B):
        model = blueprint.merge(params, biases)
        mask_BS = jnp.arange(tokens_BS.shape[1]) < lengths_B[:, None]
        hidden_BSD = model(tokens_BS, token_mask_BS=mask_BS).hidden_BSD
        return model.logits(hidden_BSD[jnp.arange(len(tokens_BS)), lengths_B - 1])

    specs = (specs_of(blueprint.params), blueprint.bias_specs, P(), P())
    run = jax.shard_map(
        run, mesh=blueprint.mesh, in_specs=specs, out_specs=P(None, TENSOR), check_vma=False
    )
    return blueprint, jax.jit(run)


def check_greedy(config, flat, prompt, generated, rounding=1e-3):
    """Each token is the best one of a forward pass over all tokens before it, without a cache.

    Where the two best are closer than rounding the rest of the text is not comparable.

    Returns:
        how many tokens were compared.
    """
    blueprint, run = _logits_of_prefixes(config)
    text = np.concatenate([prompt, generated])
    lengths = np.arange(len(prompt), len(text))
    rows = np.zeros((config.max_context, config.max_context), np.int32)  # one shape for all
    counts = np.ones(config.max_context, np.int32)
    for row, n in enumerate(lengths):
        rows[row, :n], counts[row] = text[:n], n
    weights = load_weights(flat, blueprint, jnp.float32)
    logits_BV = np.asarray(run(*weights, rows, counts))[: len(lengths), : config.vocab_size]
    for i, logits_V in enumerate(logits_BV):
        second, best = np.sort(logits_V)[-2:]
        if best - second < rounding:
            return i
        assert generated[i] == np.argmax(logits_V), f"token {i} of {len(generated)}"
    return len(generated)
