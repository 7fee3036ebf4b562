"""Activations, dense MLP and embedding against float64, split over `tensor`."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from model_support import (
    ACTIVATIONS,
    check_replicas,
    directional,
    mesh_of,
    mlp,
    named,
    randomize,
    value_and_grads,
)

from moejax.activations import apply_activation
from moejax.config import ExpertsConfig
from moejax.errors import UserError
from moejax.model.embedding import Embedding
from moejax.model.mlp import DenseMLP
from sharding.mesh import TENSOR

D = 32


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, rng):
    projections = 1 if name in ("gelu", "relu2") else 2
    # Beyond the limits of `swiglu_oai` too, but at none of them.
    h = rng.normal(size=(3, projections, 6)).astype(np.float32)
    h = np.concatenate([h, 6.1 * np.sign(h) + h], axis=-1)
    h[np.abs(np.abs(h) - 7.0) < 1e-3] = 8.0
    ct = rng.normal(size=(3, 12)).astype(np.float32)
    y, vjp = jax.vjp(lambda h: apply_activation(h, name), h)
    params = {"h": h.astype(np.float64)}
    want = ACTIVATIONS[name](params["h"])
    # Of XLA's two tanh one is off by six units of float32's last place, 2^-24: half of that times
    # what it is multiplied with.
    tanh = 2.0**-21 / 2 * np.abs(h.astype(np.float64)).prod(axis=1)
    assert (np.abs(y - want) <= 1e-6 + 1e-5 * np.abs(want) + tanh * name.startswith("ge")).all()
    direction = {"h": rng.normal(size=h.shape)}
    expected = directional(lambda p: np.sum(ACTIVATIONS[name](p["h"]) * ct), params, direction)
    grad = np.asarray(vjp(ct)[0])
    assert abs(np.sum(grad * direction["h"]) - expected) < 1e-4 * np.linalg.norm(grad)
    assert apply_activation(jnp.asarray(h, jnp.bfloat16), name).dtype == jnp.bfloat16


def test_activation_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match=r"'tanh'.*swiglu"):
        apply_activation(jnp.zeros((2, 1, 4)), "tanh")
    with pytest.raises(ValueError, match="swiglu takes 2"):
        apply_activation(jnp.zeros((2, 1, 4)), "swiglu")


@pytest.mark.parametrize("parallel", [True, False])
def test_mlp_splits_over_tensor_and_adds_its_bias_once(parallel, rng):
    from sharding.collectives import enter_parallel, exit_parallel

    config = ExpertsConfig(hidden=16, activation="swiglu", bias=True)
    graphdef, state = nnx.split(DenseMLP(D, config, parallel=parallel, rngs=nnx.Rngs(0)))
    state = randomize(state, rng)
    x, ct = (rng.normal(size=(5, D)).astype(np.float32) for _ in range(2))

    def loss(module, x, ct):
        y = module(x) if parallel else exit_parallel(module(enter_parallel(x, TENSOR)), TENSOR)
        return jnp.sum(y * ct)

    params = {k: v.astype(np.float64) for k, v in named(state).items()}
    value, grads, dx = value_and_grads(
        mesh_of(tensor=4), graphdef, state, loss, (x, ct), (P(), P()), wrt_input=True
    )
    check_replicas((grads, dx))
    params["x"] = x.astype(np.float64)

    def oracle(p):
        return np.sum(mlp(p, p["x"], "swiglu") * ct)

    np.testing.assert_allclose(value, oracle(params), rtol=1e-4)
    got = {**named(grads), "x": np.asarray(dx)}
    for name in params:
        direction = {k: np.zeros_like(v) for k, v in params.items()}
        direction[name] = rng.normal(size=params[name].shape)
        expected = directional(oracle, params, direction)
        np.testing.assert_allclose(np.sum(got[name] * direction[name]), expected, atol=2e-3)


@pytest.mark.parametrize("tensor", [1, 4])
def test_embedding_sums_the_gradients_of_a_frequent_token_exactly(tensor, rng):
    graphdef, state = nnx.split(Embedding(64, D, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state)
    tokens = np.concatenate([np.full(1000, 17), rng.integers(0, 64, 24)]).astype(np.int32)[None]
    ct = (rng.normal(size=(1, 1024, D)) + 1.0).astype(np.float32)
    ct = np.asarray(jnp.asarray(ct, jnp.bfloat16), np.float32)

    def loss(module, tokens, ct):
        return jnp.sum(module(tokens, jnp.bfloat16).astype(jnp.float32) * ct)

    value, grads = value_and_grads(
        mesh_of(tensor=tensor), graphdef, state, loss, (tokens, ct), (P(), P())
    )
    w = np.asarray(state["w"].get_value(), np.float64)
    np.testing.assert_allclose(value, np.sum(w[tokens] * ct), rtol=1e-4)
    expected = np.zeros((64, D))
    np.add.at(expected, tokens, ct.astype(np.float64))
    np.testing.assert_allclose(np.asarray(grads["w"].get_value(), np.float64), expected, rtol=5e-3)
