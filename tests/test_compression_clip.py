"""Gradients of which only the largest numbers are sent are clipped on each data rank; see DGC."""

import dataclasses

import jax
import numpy as np
import pytest
from compression_support import (
    axes_in,
    exact_sums,
    local_gradients,
    make_reducer,
    pieces_of,
    program,
    start,
)
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import zero
from sharding.compression.config import GradCompression
from sharding.gradients import global_norm
from sharding.mesh import AXES, TENSOR, MeshShape, make_mesh

SPARSE = GradCompression("top_k", density=0.05)
MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2)]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(zero, "SMALLEST", 2)


def over_ranks(values, array):
    """One value for each data rank, to be multiplied with [data, …]."""
    return np.asarray(values).reshape(-1, *[1] * (array.ndim - 1))


def clipped(reducer, mesh, local):
    """What `Reducer.clip` makes of local gradients, [data, expert, tensor, …]."""

    def run(local):
        grads = nnx.from_flat_state(
            [
                (leaf.path, nnx.Param(lax.squeeze(local[leaf.name], (0, 1, 2))))
                for leaf in reducer.leaves
            ]
        )
        flat = nnx.to_flat_state(reducer.clip(grads))
        return {".".join(map(str, p)): v.get_value()[None, None, None] for p, v in flat}

    specs = P(*AXES)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    placed = jax.device_put(local, NamedSharding(mesh, specs))
    return jax.device_get(jax.block_until_ready(jax.jit(mapped)(placed)))


def norms_of_data_ranks(reducer, local) -> np.ndarray:
    """[data]: every number once, devices along `expert` for as many independent terms."""
    squares = 0.0
    for leaf in reducer.leaves:
        grads = local[leaf.name].astype(np.float64)
        if TENSOR not in axes_in(leaf.storage.spec):
            grads = grads[:, :, :1]
        squares = squares + np.square(grads).sum(axis=tuple(range(1, grads.ndim)))
    return np.sqrt(squares)


@pytest.mark.parametrize("sizes", MESHES)
def test_each_data_rank_clips_its_own(rng, sizes):
    """By what it adds itself, to a part 1 / √data, all its parameters alike; others are as before.

    A norm that is no finite number is not hidden.
    """
    shape, wild = MeshShape(*sizes), rng.integers(sizes[0])
    plain, axis_sizes = make_reducer(shape, SPARSE)
    local = local_gradients(rng, plain, axis_sizes)
    larger = np.where(np.arange(sizes[0]) == wild, 50, 1).astype(np.float32)
    local = {name: x * over_ranks(larger, x) for name, x in local.items()}
    norms = norms_of_data_ranks(plain, local)
    limit = 2 * np.delete(norms, wild).max()
    reducer, _ = make_reducer(shape, SPARSE, clip_norm=float(limit * sizes[0] ** 0.5))
    got = clipped(reducer, make_mesh(shape), local)
    scale = np.minimum(1, limit / norms)
    assert scale[wild] < 0.1 and np.delete(scale, wild).min() == 1
    for name, value in local.items():
        want = value * over_ranks(scale, value)
        np.testing.assert_allclose(got[name], want, rtol=1e-5, err_msg=name)
    local["norm.bias"] = np.copy(local["norm.bias"])
    local["norm.bias"][wild, -1, :, 0] = rng.choice([np.inf, np.nan, 1e30])
    got = clipped(reducer, make_mesh(shape), local)
    for name, value in local.items():
        assert np.isnan(got[name][wild]).all()
        others = np.arange(sizes[0]) != wild
        np.testing.assert_array_equal(got[name][others], value[others])


def test_clipped_by_the_optimizer_otherwise():
    """Other methods, no limit, or no parameter that is served."""
    shape = MeshShape(4, 2, 1)
    for config, clip_norm, clips in (
        (SPARSE, 1.0, True),
        (SPARSE, 0.0, False),
        (dataclasses.replace(SPARSE, density=1.0), 1.0, False),
        (GradCompression("int8"), 1.0, False),
        (GradCompression(), 1.0, False),
    ):
        reducer, _ = make_reducer(shape, config, clip_norm=clip_norm)
        assert reducer.clips == clips
        grads = nnx.from_flat_state([(("norm", "bias"), nnx.Param(jnp.ones(3, jnp.float32)))])
        assert clips or reducer.clip(grads) is grads


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES[1:])
def test_norm_of_what_arrives(rng, sizes):
    """Each number of a sparse sum once, wherever its piece is stored; what the log says."""
    shape = MeshShape(*sizes)
    reducer, axis_sizes = make_reducer(shape, SPARSE)
    mesh = make_mesh(shape)
    local = local_gradients(rng, reducer, axis_sizes)
    placed = jax.device_put(local, NamedSharding(mesh, P(*AXES)))
    run = program(reducer, mesh)
    got, _ = jax.block_until_ready(run(placed, start(reducer, mesh), jnp.int32(0)))
    want, exact = 0.0, 0.0
    specs = {leaf.name: leaf.storage.stored for leaf in reducer.leaves}
    for leaf in reducer.leaves:
        split = axes_in(leaf.storage.stored)
        once = tuple(slice(None) if axis in split else slice(1) for axis in AXES)
        want += np.square(np.asarray(got[leaf.name], np.float64)[once]).sum()
        exact += np.square(pieces_of(leaf, exact_sums(leaf, local[leaf.name]))[once]).sum()

    def norm(pieces):
        return global_norm({n: lax.squeeze(x, (0, 1, 2)) for n, x in pieces.items()}, specs)

    mapped = jax.shard_map(norm, mesh=mesh, in_specs=P(*AXES), out_specs=P(), check_vma=False)
    assert float(jax.jit(mapped)(got)) == pytest.approx(want**0.5, rel=1e-5)
    assert 0.1 * exact < want < exact  # a part of the numbers
