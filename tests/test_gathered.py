"""Rows laid out by place before a product: the kernel's program in numpy against indexing."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.fused_experts import gathered
from pallas_kernels.hopper.compat import interpreted
from pallas_kernels.hopper.tiles import ROWS


@pytest.mark.parametrize(("rows", "copies", "width", "filled"), [(40, 2, 64, 2), (7, 3, 24, 1)])
def test_gathers_the_filled_tiles(rng, rows, copies, width, filled):
    x = jnp.asarray(rng.normal(size=(rows, width)), jnp.bfloat16)
    copy = rng.integers(0, rows * copies, 3 * ROWS).astype(np.int32)
    copy[rng.random(copy.size) < 0.2] = rows * copies  # padding
    with interpreted():
        count = jnp.asarray([filled], jnp.int32)
        got = jax.jit(gathered.gather_places, static_argnames="copies")(
            x, jnp.asarray(copy), count, copies=copies
        )
    want = np.concatenate([np.asarray(x), np.zeros((1, width), x.dtype)])[copy // copies]
    np.testing.assert_array_equal(np.asarray(got)[: filled * ROWS], want[: filled * ROWS])


def test_refusals():
    x, copy = jnp.zeros((4, 64), jnp.bfloat16), jnp.zeros((ROWS,), jnp.int32)
    assert gathered.refusal(x, copy) is None
    assert "float32" in str(gathered.refusal(x.astype(jnp.float32), copy))
    assert "multiples" in str(gathered.refusal(x[:, :60], copy))
    assert "no rows" in str(gathered.refusal(x[:0], copy))
    long = jax.ShapeDtypeStruct((2**20,), jnp.int32)
    wide = jax.ShapeDtypeStruct((4, 2**13), jnp.bfloat16)
    assert "int32" in str(gathered.refusal(wide, long))  # type: ignore[arg-type]
