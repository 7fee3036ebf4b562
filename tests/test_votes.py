"""A flag that all devices agree on, and arrays laid over a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.training.interrupt import AgreedStop, Interrupt
from sharding.arrays import Vote, put
from sharding.mesh import MeshShape, make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshShape(2, 2, 2))


def test_a_vote_counts_the_devices(mesh):
    vote = Vote(mesh)
    assert [int(vote.start(yes)) for yes in (False, True, False)] == [0, 8, 0]


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_counts_a_step_later_where_nobody_waits(mesh, late):
    signals = Interrupt()
    stop = AgreedStop(signals, mesh)
    assert not stop.agreed() and not stop.at_last()
    # As with several processes: by a vote.
    stop._vote, stop._late = Vote(mesh), late
    told = []
    for step in range(5):
        signals.requested = step >= 2
        told.append(stop.agreed())
    assert told == [False, False, not late, True, True]
    assert stop.at_last()


def test_one_process_does_not_vote(mesh):
    signals = Interrupt()
    stop = AgreedStop(signals, mesh)
    signals.requested = True
    assert stop._vote is None and stop.agreed() and stop.at_last()


def test_put(rng, mesh):
    arrays = {"a": rng.normal(size=(4, 3)).astype(np.float32), "b": np.arange(8, dtype=np.int32)}
    sharding = NamedSharding(mesh, P("data"))
    laid = put(arrays, sharding)
    for name, array in arrays.items():
        assert isinstance(laid[name], jax.Array) and laid[name].sharding == sharding
        np.testing.assert_array_equal(np.asarray(laid[name]), array)
