"""What the tests of compressed sums share: parameters, and their sums by brute force."""

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from sharding.compression.config import GradCompression
from sharding.compression.reduction import Reducer
from sharding.mesh import AXES, EXPERT, TENSOR, MeshShape
from sharding.zero import Storage

MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2)]

PARAMETERS = {  # global shape, spec, dimension that storage splits
    "whole": ((24, 36), P(), None),
    "rows": ((16, 36), P(), 0),
    "columns": ((3, 12, 40), P(None, TENSOR), 2),
    "bank": ((4, 24, 20), P(EXPERT, None, TENSOR), 1),
    "bank whole": ((4, 9, 20), P(EXPERT, None, TENSOR), None),
}


def axes_in(spec) -> set:
    return {a for e in spec if e for a in ([e] if isinstance(e, str) else e)}


def make_reducer(sizes: MeshShape, config: GradCompression, seed=0, **more) -> tuple[Reducer, dict]:
    """A reducer for `PARAMETERS`, all of them matrices that may be compressed."""
    params, storage = [], []
    for name, (shape, spec, dim) in PARAMETERS.items():
        value = jax.ShapeDtypeStruct(shape, jnp.float32)
        params.append((("model", f"w {name}"), nnx.Param(value, spec=spec, float32=False)))
        storage.append((("model", f"w {name}"), Storage(spec, dim)))
    params.append((("norm", "scale"), nnx.Param(jnp.zeros(7, jnp.float32), spec=P(), float32=True)))
    storage.append((("norm", "scale"), Storage(P(), None, jnp.float32)))
    params.append((("norm", "bias"), nnx.Param(jnp.zeros(5, jnp.float32), spec=P(), float32=True)))
    storage.append((("norm", "bias"), Storage(P(), None, jnp.float32)))
    params, storage = nnx.from_flat_state(params), nnx.from_flat_state(storage)
    axis_sizes = dict(zip(AXES, sizes.sizes))
    return Reducer(params, storage, axis_sizes, config, seed, **more), axis_sizes


def local_gradients(rng, reducer: Reducer, sizes: dict) -> dict[str, np.ndarray]:
    """[data, expert, tensor, *local]; equal along tensor where that does not split them."""
    found = {}
    for leaf in reducer.leaves:
        differ = [sizes[a] if a != TENSOR or a in axes_in(leaf.storage.spec) else 1 for a in AXES]
        grads = rng.normal(size=(*differ, *leaf.shape)) * np.exp(rng.normal(size=leaf.shape))
        found[leaf.name] = np.broadcast_to(
            grads.astype(np.float32), (*(sizes[a] for a in AXES), *leaf.shape)
        )
    return found


def exact_sums(leaf, grads: np.ndarray) -> np.ndarray:
    """[data, expert, tensor, *local], the sum over the right axes by brute force, float64."""
    total = np.zeros(grads.shape)
    for to in np.ndindex(grads.shape[:3]):
        for source in np.ndindex(grads.shape[:3]):
            same = all(
                a == b
                for a, b, axis in zip(to, source, AXES)
                if axis == TENSOR or axis in axes_in(leaf.storage.spec)
            )
            if same:
                total[to] += grads[source].astype(np.float64)
    return total


def pieces_of(leaf, whole: np.ndarray) -> np.ndarray:
    """What each device stores of [data, expert, tensor, *local]."""
    dim = leaf.storage.dim
    if dim is None:
        return whole
    each = leaf.shape[dim] // whole.shape[0]
    parts = [
        np.take(whole[d], range(d * each, (d + 1) * each), axis=2 + dim)
        for d in range(whole.shape[0])
    ]
    return np.stack(parts)


def program(reducer: Reducer, mesh):
    """(local gradients, state, step) → (pieces of all devices, state)."""

    def run(local, state, step):
        grads = nnx.from_flat_state(
            [
                (leaf.path, nnx.Param(lax.squeeze(local[leaf.name], (0, 1, 2))))
                for leaf in reducer.leaves
            ]
        )
        pieces, state = reducer.reduce(grads, state, step)
        flat = {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(pieces)}
        return {n: lax.expand_dims(v, (0, 1, 2)) for n, v in flat.items()}, state

    return jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P(*AXES), reducer.specs, P()),
            out_specs=(P(*AXES), reducer.specs),
            check_vma=False,
        )
    )


def start(reducer: Reducer, mesh):
    if reducer.specs is None:
        return None
    init = jax.shard_map(
        reducer.init, mesh=mesh, in_specs=(), out_specs=reducer.specs, check_vma=False
    )
    return jax.block_until_ready(jax.jit(init)())
