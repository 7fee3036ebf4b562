"""What the tests of the wire share: a function of each device's rows, run on a mesh."""

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from sharding.mesh import EXPERT, MeshShape, make_mesh


def run_sharded(body, *arrays, devices=4):
    run = jax.shard_map(
        body,
        mesh=make_mesh(MeshShape(expert=devices)),
        in_specs=P(EXPERT),
        out_specs=P(EXPERT),
        check_vma=False,
    )
    return [np.asarray(a) for a in jax.jit(run)(*arrays)]
