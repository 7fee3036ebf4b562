"""Small checkpoints and comparisons that the checkpoint tests share."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from moejax.errors import UserError
from moejax.training.checkpoint import Checkpoints


def targets_of(arrays, where) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where[name])
        for name, a in arrays.items()
    }


def one_device(arrays) -> dict[str, jax.ShapeDtypeStruct]:
    where = SingleDeviceSharding(jax.devices()[0])
    return targets_of(arrays, dict.fromkeys(arrays, where))


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        a, b = np.asarray(got[name]), np.asarray(want[name])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert a.tobytes() == b.tobytes(), name


def small(step: int) -> dict[str, np.ndarray]:
    return {"w": np.full((64, 8), step, np.float32), "step": np.array(step, np.int32)}


def saved(folder, *steps: int, keep: int = 3) -> Checkpoints:
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, small(step), {"step": step})
    return Checkpoints(folder, keep)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and "tensorstore" not in text.lower()
    return text
