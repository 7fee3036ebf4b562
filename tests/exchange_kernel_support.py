"""What the tests of the exchange's kernels share: an exchange inside a shard_map."""

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P


def sharded(body, *, abstract=False, **axes):
    """A function of arrays whose first dimension is split over all axes."""
    names, sizes, types = tuple(axes), tuple(axes.values()), (AxisType.Auto,) * len(axes)
    if abstract:
        mesh = AbstractMesh(sizes, names, axis_types=types)
    else:
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        mesh = Mesh(devices, names, axis_types=types)
    spec = P(names)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def pull_through(exchange, rows, counts, ct):
    """Received rows, and the gradient for a cotangent."""
    received, pull, arrived = jax.vjp(lambda r: exchange(r, counts), rows, has_aux=True)
    return received, pull(ct)[0], arrived
