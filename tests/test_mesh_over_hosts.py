"""Where the devices of hosts come to lie in a mesh: `tensor`, then `expert`, inside one."""

from dataclasses import dataclass

import numpy as np
import pytest

from sharding import distributed
from sharding.mesh import MeshShape, over_hosts


@dataclass(frozen=True)
class Device:
    id: int
    host: int
    process_index: int = 0


def laid(sizes, shape, order=None):
    """The host of each place, int [data, expert, tensor]; hosts with so many devices each."""
    hosts = np.repeat(np.arange(len(sizes)), sizes)
    devices = [Device(i, int(host)) for i, host in enumerate(hosts)]
    if order is not None:
        devices = [devices[i] for i in order]
    found = over_hosts(shape, devices, lambda d: d.host)
    ids = [d.id for d in found.flat]
    assert found.shape == shape.sizes and len(set(ids)) == shape.size
    return np.vectorize(lambda d: d.host)(found)


def hosts_of(groups):
    return [len(np.unique(group)) for group in groups]


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(4, 4, 2),
        MeshShape(4, 8, 1),
        MeshShape(8, 2, 2),
        MeshShape(32, 1, 1),
        MeshShape(4, 1, 8),
    ],
)
def test_groups_that_fit_lie_in_one_host(rng, shape):
    # Processes may come in any order, as when tasks are dealt out to hosts in turn.
    order = rng.permutation(32).tolist()
    found = laid([8] * 4, shape, order)
    assert hosts_of(found) == [1] * shape.data
    assert set(found.flat) == {0, 1, 2, 3}


@pytest.mark.parametrize(("shape", "most"), [(MeshShape(2, 16, 1), 2), (MeshShape(1, 8, 4), 4)])
def test_experts_over_hosts_keep_tensor_inside(shape, most):
    found = laid([8] * 4, shape)
    assert hosts_of(found.reshape(-1, shape.tensor)) == [1] * (shape.data * shape.expert)
    assert max(hosts_of(found)) == most


def test_groups_that_do_not_divide_a_host(rng):
    # Two groups of three in each host of eight, the fifth from what is left of the first two.
    found = laid([8, 8], MeshShape(5, 3, 1))
    assert sorted(hosts_of(found)) == [1, 1, 1, 1, 2]
    # In the order of the devices the third would lie in two.
    found = laid([8, 8, 8], MeshShape(6, 3, 1))
    assert hosts_of(found) == [1] * 6
    found = laid([8, 8], MeshShape(2, 2, 3))
    assert hosts_of(found) == [1, 1]


def test_tensor_stays_inside_where_only_that_can_be():
    found = laid([6, 6], MeshShape(1, 3, 4))
    # Two of the three fit.
    assert sorted(hosts_of(found.reshape(3, 4))) == [1, 1, 2]


def test_hosts_of_several_sizes():
    found = laid([4, 8, 2], MeshShape(3, 2, 2))
    assert hosts_of(found) == [1, 1, 1]


def test_the_order_inside_a_host_is_kept():
    devices = [Device(i, 0) for i in (3, 1, 2, 0)]
    found = over_hosts(MeshShape(2, 2, 1), devices, lambda d: d.host)
    assert [d.id for d in found.flat] == [3, 1, 2, 0]


def test_processes_of_one_machine_share_its_number(monkeypatch):
    class Known:
        host_numbers = (0, 1, 0, 1)

    devices = [Device(i, 0, process_index=i) for i in range(4)]
    assert [distributed.host_of(d) for d in devices] == [0, 1, 2, 3]
    monkeypatch.setattr(distributed, "_lifeline", Known())
    assert [distributed.host_of(d) for d in devices] == [0, 1, 0, 1]
