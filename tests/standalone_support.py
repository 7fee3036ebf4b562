"""What the tests of the standalone layer share."""

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from moejax.config import ExchangeConfig, ExpertsConfig, MoEConfig, RouterConfig

D = 16
BOUND = 1e-6  # norm-relative; both programs are float32. Worst of many seeds 2e-7


def moe():
    return MoEConfig(
        RouterConfig(
            num_experts=6, top_k=2, load_balance_coef=0.1, z_loss_coef=0.1, selection_bias=True
        ),
        ExpertsConfig(hidden=8, bias=True, shared_hidden=8, shared_gate=True),
        ExchangeConfig("all_to_all", bucket_rows=2),
    )


def make(build, rng):
    """A module with weights of ordinary size everywhere, biases included.

    Built abstractly: drawing initial values would compile a program for each shape.
    """
    module = nnx.eval_shape(build)
    draw = np.random.default_rng(int(rng.integers(2**32)))
    nnx.update(
        module,
        jax.tree.map(
            lambda v: jnp.asarray(draw.normal(size=v.shape) * 0.4, v.dtype), nnx.state(module)
        ),
    )
    return module


def data(rng, *shape):
    x = rng.normal(size=(*shape, D)).astype(np.float32)
    return x, rng.normal(size=(*shape, 3)).astype(np.float32)


def output_and_gradients(layer, x, ct):
    """Of Σ y·ct with `grad` taken outside: y, then the gradients of all parameters and of x."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def loss(params, x):
        y, _, _ = nnx.merge(graph, params, rest)(x)
        return jnp.sum(y * ct), y

    (_, y), found = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, *jax.tree.leaves(found)
