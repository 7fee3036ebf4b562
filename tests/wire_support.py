"""What the tests of the wire share: a function of each device's rows, run on a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.exchange import wire
from sharding.mesh import EXPERT, MeshShape, make_mesh


@pytest.fixture(params=[1, 2**40], ids=["apart", "packed"])
def large_rows_alone(request, monkeypatch):
    """Every part of a row by itself, or all in one payload."""
    monkeypatch.setattr(wire, "ALONE_BYTES", request.param)


def run_sharded(body, *arrays, devices=4):
    run = jax.shard_map(
        body,
        mesh=make_mesh(MeshShape(expert=devices)),
        in_specs=P(EXPERT),
        out_specs=P(EXPERT),
        check_vma=False,
    )
    return [np.asarray(a) for a in jax.jit(run)(*arrays)]
