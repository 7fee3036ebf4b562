"""The MoE layer gives the same bits every time, forward and backward."""

import jax
import numpy as np
import pytest
from moe_harness import ShardedLayer, random_weights

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig

D, TOKENS = 16, 12

MODES = {
    "local": ((2, 1, 1), None),
    "all_to_all": ((2, 4, 1), 4),  # with further waves
    "ring": ((1, 4, 2), None),
    "remote": ((1, 4, 2), None),
}


def moe(mode, rows):
    return MoEConfig(
        RouterConfig(num_experts=6, top_k=3, z_loss_coef=0.1),
        ExpertsConfig(hidden=8, bias=True, shared_hidden=8),
        ExchangeConfig(mode, bucket_rows=rows),
    )


def bits(run):
    y, loss, aux, grads, waves = run
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((y, aux, grads, waves))] + [loss]


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_twice(rng, mode):
    shape, rows = MODES[mode]
    sharded = ShardedLayer(shape, moe(mode, rows), D, TOKENS)
    weights = random_weights(rng, sharded.config, D)
    x, ct = rng.normal(size=(2, sharded.num_tokens, D)).astype(np.float32)
    first = bits(sharded(weights, x, ct))
    other = sharded(weights, -x, ct)  # what ran in between does not matter
    assert bits(other) != first
    for _ in range(5):
        assert bits(sharded(weights, x, ct)) == first
    if mode == "all_to_all":
        assert other[4].max() > 1, "further waves were meant to run"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_when_compiled_again(rng, mode):
    shape, rows = MODES[mode]
    runs = []
    for _ in range(2):
        sharded = ShardedLayer(shape, moe(mode, rows), D, TOKENS, quick=False)
        if not runs:
            weights = random_weights(rng, sharded.config, D)
            x, ct = rng.normal(size=(2, sharded.num_tokens, D)).astype(np.float32)
        runs.append(bits(sharded(weights, x, ct)))
    assert runs[0] == runs[1]
