"""Settling loads: the Hopper kernel against plain JAX, and what any settling must keep."""

from contextlib import nullcontext
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from kernel_support import ON_GPU

from pallas_kernels.balance import api
from pallas_kernels.hopper.compat import interpreted

ROUNDS, PERCENT = 8, 105


def draw(rng, experts, replicas, devices, most):
    """Counts and places of replicas, on different devices as far as there are as many."""
    number_E = rng.integers(1, replicas + 1, experts)
    real = np.arange(replicas) < number_E[:, None]
    device = [rng.permutation(max(devices, replicas))[:replicas] % devices for _ in range(experts)]
    device = np.where(real, device, np.stack(device)[:, :1])
    count = np.where(real, most * rng.random((experts, replicas)) ** 4, 0)
    fixed = rng.integers(0, 1 + int(count.sum() / devices), devices) * rng.integers(0, 2)
    return count.astype(np.int32), device.astype(np.int32), real, fixed.astype(np.int32)


def settled(count, device, real, fixed, backend):
    devices = len(fixed)
    with interpreted() if backend == "mosaic_gpu" and not ON_GPU else nullcontext():
        run = jax.jit(
            partial(api.settle, percent=PERCENT, rounds=ROUNDS, backend=backend), static_argnums=3
        )
        return np.asarray(run(*map(jnp.asarray, (count, device, real)), devices, fixed))


def loads(count, device, fixed):
    return fixed + np.bincount(device.reshape(-1), weights=count.reshape(-1), minlength=len(fixed))


@pytest.mark.parametrize(
    ("experts", "replicas", "devices"), [(64, 4, 4), (5, 1, 3), (130, 3, 8), (256, 4, 16)]
)
def test_equal_bits(rng, experts, replicas, devices):
    """Few and many assignments, also so many that ratios lose bits."""
    moved = 0
    for most in (3, 1000, 2**20):
        case = draw(rng, experts, replicas, devices, most)
        got = settled(*case, "mosaic_gpu")
        assert np.array_equal(got, settled(*case, "reference"))
        moved += np.abs(got - case[0]).sum()
    assert moved > 0 or replicas == 1


@pytest.mark.parametrize("backend", api.BACKENDS)
def test_what_is_kept(rng, backend):
    """Sums of experts; nothing where no replica is; the fullest device gets no fuller."""
    count, device, real, fixed = draw(rng, 64, 4, 4, 1000)
    got = settled(count, device, real, fixed, backend)
    assert np.array_equal(got.sum(axis=1), count.sum(axis=1))
    assert (got >= 0).all() and not got[~real].any()
    before, after = loads(count, device, fixed), loads(got, device, fixed)
    assert after.max() <= max(before.max(), PERCENT / 100 * before.mean() + 1)


@pytest.mark.parametrize("backend", api.BACKENDS)
def test_an_overloaded_device_hands_on(rng, backend):
    """All of expert 0 begins on device 0; its other replica can take what is too much."""
    device = np.array([[0, 1], [1, 1], [2, 2]], np.int32)
    real = np.array([[True, True], [True, False], [True, False]])
    count = np.array([[200, 0], [0, 0], [100, 0]], np.int32)
    got = settled(count, device, real, np.zeros(3, np.int32), backend)
    assert np.array_equal(got, [[105, 95], [0, 0], [100, 0]])


def test_what_is_refused():
    with pytest.raises(NotImplementedError, match="up to 512"):
        api.settle(
            jnp.zeros((513, 2), jnp.int32), jnp.zeros((513, 2), jnp.int32),
            jnp.ones((513, 2), bool), 4, percent=PERCENT, rounds=1, backend="mosaic_gpu",
        )  # fmt: skip
    assert api.explain(64, 4, 4).startswith("settle: ")
    assert "not mosaic_gpu: 512 experts with 4 replicas on 64 devices" in api.explain(512, 4, 64)
