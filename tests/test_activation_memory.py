"""What the fused experts keep from the forward for the backward."""

import jax
import pytest
from jax import numpy as jnp

from pallas_kernels.fused_experts import api as fused
from pallas_kernels.hopper.tiles import ROWS

SHAPES = {
    "mixtral_8x7b": (16384, 4096, 14336, 8, 2),
    "qwen3_30b_a3b": (32768, 2048, 768, 128, 8),
    "sonic_fine": (32768, 4096, 1024, 128, 8),
}


def kept_bytes(tokens, d_model, hidden, experts, top_k):
    """Bytes of all residuals but the weights; nothing is computed."""
    struct = jax.ShapeDtypeStruct
    places = tokens * top_k + experts * ROWS
    copies = (tokens, top_k)
    arrays = [
        struct((tokens, d_model), jnp.bfloat16),
        struct((experts, d_model, 2, hidden), jnp.bfloat16),
        struct((experts, hidden, d_model), jnp.bfloat16),
        struct(copies, jnp.float32),
    ]
    layout = [
        struct(copies, jnp.int32),
        struct((places,), jnp.int32),
        struct((experts,), jnp.int32),
    ]

    def residuals(arrays, layout):
        def call(*arrays):
            return fused.fused_experts(*arrays, *layout, activation="swiglu", backend="mosaic_gpu")

        return jax.vjp(call, *arrays)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, arrays, layout))
    weights = [array.shape for array in arrays[1:3]]
    assert [leaf.shape for leaf in kept if leaf.shape in weights] == weights
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_is_kept_than_by_sonicmoe(shape):
    """Its rows, projections, scores and four lists of indices: `save_for_backward` in
    sonicmoe/functional/__init__.py. Ours pads each expert's rows to a multiple of 8.
    """
    tokens, d_model, hidden, _, top_k = SHAPES[shape]
    assignments = tokens * top_k
    theirs = 2 * tokens * d_model + 2 * assignments * 2 * hidden + 5 * 4 * assignments
    ours = kept_bytes(*SHAPES[shape])
    assert ours <= 1.002 * theirs, (ours, theirs)
    # Not by leaving something out: rows and projections are most of it.
    assert ours >= 2 * tokens * d_model + 2 * assignments * 2 * hidden
