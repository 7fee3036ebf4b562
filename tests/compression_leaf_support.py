"""One parameter's gradient reduced over fake devices, step after step, every rank's result kept."""

from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from sharding.mesh import AXES, DATA, EXPERT, MeshShape, abstract_mesh, make_mesh
from sharding.traffic import collectives_of

RANKS = P(DATA, EXPERT)
CASES = {
    "data": (MeshShape(8), (DATA,)),
    "data x expert": (MeshShape(4, 2), (DATA, EXPERT)),
    "experts": (MeshShape(4, 2), (DATA,)),
}
"""Mesh and axes of the sum; the last as for experts' weights, which differ along `expert`."""


def _step(method, axes, dim, grad, state, step):
    squeeze, expand = partial(jnp.squeeze, axis=(0, 1)), partial(jnp.expand_dims, axis=(0, 1))
    piece, state = method.reduce(
        squeeze(grad), jax.tree.map(squeeze, state), axes, dim, key=jax.random.key(0), step=step
    )
    return expand(piece), jax.tree.map(expand, state)


def mapped(method, mesh, axes, dim):
    """`reduce` over a mesh: (gradients [D, E, …], states, step) → (pieces, states)."""
    return jax.shard_map(
        partial(_step, method, axes, dim),
        mesh=mesh,
        in_specs=(RANKS, RANKS, P()),
        out_specs=(RANKS, RANKS),
        check_vma=False,
    )


def start(method, sizes, shape, seed=0):
    """Every rank's state at the start, [D, E, …]; the same everywhere."""
    state = method.init(shape, jax.random.key(seed))
    return jax.tree.map(lambda x: jnp.tile(x, (sizes.data, sizes.expert) + (1,) * x.ndim), state)


def reduce_steps(method, sizes, axes, dim, grads, seed=0):
    """Reduces gradients of several steps.

    Args:
        grads: float32 [steps, D, E, *shape].

    Returns:
        Pieces [steps, D, E, *piece], and the ranks' states after each step, as numpy.
    """
    run = jax.jit(mapped(method, make_mesh(sizes), axes, dim))
    state = start(method, sizes, grads.shape[3:], seed)
    pieces, states = [], []
    for number, grad in enumerate(grads):
        piece, state = jax.block_until_ready(run(jnp.asarray(grad), state, jnp.int32(number)))
        pieces.append(np.asarray(piece))
        states.append(jax.tree.map(np.asarray, state))
    return np.stack(pieces), states


def whole_sums(pieces, axes, dim):
    """Each step's sum as one array: [steps, groups, *shape]; checks the bits of equal pieces.

    Ranks of one group are summed together: all ranks, or those of one place along `expert`.
    """
    if EXPERT in axes:
        np.testing.assert_array_equal(pieces, np.broadcast_to(pieces[:, :, :1], pieces.shape))
        pieces = pieces[:, :, :1]
    if dim is None:
        np.testing.assert_array_equal(pieces, np.broadcast_to(pieces[:, :1], pieces.shape))
        return pieces[:, 0]
    return np.stack([np.concatenate(list(step), axis=dim + 1) for step in pieces])


def rank_sums(ranks, axes):
    """[steps, D, E, …] of ranks → float64 [steps, groups, …] summed over `axes`."""
    total = np.asarray(ranks, np.float64).sum(1)
    return total.sum(1, keepdims=True) if EXPERT in axes else total


def counted_bytes(method, sizes, axes, dim, shape) -> float:
    """Bytes a rank sends in `reduce`, counted in its traced program."""
    mesh = abstract_mesh(sizes)
    ranks = (sizes.data, sizes.expert)
    like = lambda x: jax.ShapeDtypeStruct((*ranks, *x.shape), x.dtype)  # noqa: E731
    state = jax.tree.map(like, jax.eval_shape(lambda k: method.init(shape, k), jax.random.key(0)))
    grad = jax.ShapeDtypeStruct((*ranks, *shape), jnp.float32)
    jaxpr = jax.make_jaxpr(mapped(method, mesh, axes, dim))(
        grad, state, jax.ShapeDtypeStruct((), jnp.int32)
    )
    return sum(c.sent for c in collectives_of(jaxpr, dict(zip(AXES, sizes.sizes))))
