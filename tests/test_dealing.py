"""How tiles of groups of many sizes are shared out to the blocks of a kernel."""

import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.hopper.weights import dealt, largest_first, nth_dealt


def shares(sizes, tiles, blocks, order):
    """Steps of each block; every unit is dealt once."""
    units, loads, seen = len(sizes) * tiles, np.zeros(blocks), []
    for block in range(blocks):
        for i in range(int(dealt(units, jnp.int32(block), blocks))):
            unit = int(nth_dealt(jnp.int32(i), jnp.int32(block), blocks))
            seen.append(unit)
            loads[block] += sizes[order[unit // tiles]]
    assert sorted(seen) == list(range(units))
    return loads


@pytest.mark.parametrize("groups, tiles, blocks", [(5, 3, 7), (6, 2, 4), (1, 2, 8), (7, 4, 14)])
def test_every_unit_is_dealt_once(rng, groups, tiles, blocks):
    shares(rng.integers(0, 9, groups), tiles, blocks, np.arange(groups))


def test_largest_first_is_a_stable_sort(rng):
    for sizes in (rng.integers(0, 5, 40), np.zeros(3, np.int64), np.full(1, 7)):
        order = np.asarray(largest_first(jnp.asarray(sizes, jnp.int32)))
        np.testing.assert_array_equal(order, np.argsort(-sizes, kind="stable"))


def test_unequal_groups_are_shared_out_evenly(rng):
    """The largest group is below an even share, as of a fresh router: 64 experts, 16 tiles each."""
    excess = []
    for _ in range(4):
        sizes = rng.lognormal(0, 0.8, 64)
        sizes = np.ceil(64 * np.minimum(sizes / sizes.mean(), 5))
        even = sizes.sum() * 16 / 132
        order = np.asarray(largest_first(jnp.asarray(sizes, jnp.int32)))
        ours, plain = (shares(sizes, 16, 132, o).max() / even for o in (order, np.arange(64)))
        assert ours < plain
        excess.append((ours, plain))
    ours, plain = np.mean(excess, axis=0)
    assert ours - 1 < 0.5 * (plain - 1)
