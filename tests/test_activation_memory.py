"""What the fused experts keep from the forward for the backward."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.fused_experts import api as fused
from pallas_kernels.hopper.tiles import ROWS, kept_rows, most_kept_rows, tile_map

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


@pytest.mark.parametrize("scores", [jnp.bfloat16, jnp.float16])
def test_scores_of_another_dtype_are_refused(scores):
    struct = jax.ShapeDtypeStruct
    x, w = struct((4, 64), jnp.bfloat16), struct((2, 64, 2, 64), jnp.bfloat16)
    shapes = (x, w, struct((2, 64, 64), jnp.bfloat16), struct((4, 1), scores))
    layout = (struct((4, 1), jnp.int32), struct((256,), jnp.int32), struct((2,), jnp.int32))
    call = partial(fused.fused_experts, activation="swiglu")
    with pytest.raises(ValueError, match="must be float32"):
        jax.eval_shape(call, *shapes, *layout)
    with pytest.raises(ValueError, match="assignments=0 must be at least 1"):
        jax.eval_shape(partial(call, assignments=0), *shapes, *layout)


@pytest.mark.slow
def test_kept_rows_do_not_overlap_and_have_room(rng):
    for _ in range(50):
        groups = int(rng.integers(1, 40))
        wanted = rng.integers(0, 400, groups) * (rng.random(groups) < 0.8)
        padded = -(-wanted // ROWS) * ROWS
        places = int(padded.sum()) + ROWS * int(rng.integers(1, 4))
        begin = np.cumsum(padded) - padded
        holds = np.zeros(places, bool)
        for first, count in zip(begin, wanted, strict=True):
            holds[first : first + count] = True
        tiles = tile_map(jnp.asarray(padded, jnp.int32), places, jnp.asarray(holds))
        first, rows = 8 * np.asarray(kept_rows(tiles)), np.asarray(tiles.rows)
        used = np.flatnonzero(rows)
        ends = first[used] + -(-rows[used] // 8) * 8
        assert (ends[:-1] <= first[used][1:]).all()
        if used.size:
            assert ends[-1] <= most_kept_rows(int(wanted.sum()), groups)
