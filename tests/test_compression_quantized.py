"""One gradient rounded on both ways: right on average, in time, visibly wrong; how many bytes."""

import math

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from traffic_support import compiled_bytes

from sharding.compression import quantized
from sharding.compression.blocks import Blocks
from sharding.compression.interface import bytes_sent
from sharding.mesh import AXES, DATA, EXPERT, MeshShape, make_mesh
from sharding.traffic import collectives_of, sent_bytes

TOKENS = (DATA, EXPERT)


def one(sizes, spec_axes, dim, blocks, feedback=False, chance=True):
    """(local gradients [ranks, …], residuals, seed) → (pieces [ranks, …], residuals)."""
    mesh = make_mesh(MeshShape(*sizes))

    def run(grad, residual, seed):
        key = jax.random.fold_in(jax.random.key(seed), lax.axis_index(spec_axes))
        held = residual[0] if feedback else None
        piece, held = quantized.reduce(
            grad[0], held, spec_axes, dim, key=key if chance else None, blocks=blocks
        )
        return piece[None], residual if held is None else held[None]

    ranks = P(spec_axes)
    return jax.jit(
        jax.shard_map(
            run, mesh=mesh, in_specs=(ranks, ranks, P()), out_specs=(ranks, ranks), check_vma=False
        )
    )


@pytest.mark.parametrize("dim", [None, 0])
def test_chance_is_right_on_average(rng, dim):
    run = one((4, 2, 1), TOKENS, dim, Blocks(4, 32))
    grads = rng.normal(size=(8, 8, 32)).astype(np.float32)
    none, rounds = np.zeros((8, 1), np.float32), 200
    mean = 0.0
    for seed in rng.integers(0, 2**31, rounds):
        got, _ = jax.block_until_ready(run(grads, none, jnp.int32(seed)))
        mean = mean + np.asarray(got, np.float64) / rounds
    want = grads.astype(np.float64).sum(0)
    want = np.stack(
        [want if dim is None else want[2 * (r // 2) : 2 * (r // 2) + 2] for r in range(8)]
    )
    # Eight terms and their sum, whose largest number is at most eight times theirs (in fact less).
    step = np.abs(grads).max() / 7 * (1 + 2**-7)
    sum_step = np.abs(want).max() * 1.5 / 7
    deviation = 0.5 * math.sqrt((7 * step**2 + sum_step**2) / rounds)
    assert np.abs(mean - want).max() < 6 * deviation
    assert abs((mean - want).mean()) < 6 * deviation / math.sqrt(want[0].size)


def test_feedback_applies_everything_in_time(rng):
    """The same gradients again and again: the mean of what is applied tends to their sum."""
    run = one((8, 1, 1), (DATA,), None, Blocks(4, 32), feedback=True, chance=False)
    grads = (rng.normal(size=(8, 512)) * np.exp(rng.normal(size=(1, 512)))).astype(np.float32)
    residual, applied, want = np.zeros_like(grads), 0.0, grads.astype(np.float64).sum(0)
    errors, held = [], []
    for step in range(1, 65):
        got, residual = jax.block_until_ready(run(grads, residual, jnp.int32(0)))
        applied = applied + np.asarray(got[0], np.float64)
        errors.append(np.abs(applied / step - want).max())
        held.append(np.abs(np.asarray(residual)).max())
    assert max(held[8:]) < 2 * max(held[:8])  # bounded: nothing piles up
    # Falls as 1 / steps: what is not applied yet does not grow. At a single early step it may by
    # chance be little.
    missing = np.array(errors) * np.arange(1, 65)
    assert missing[63] < 1.3 * missing[:8].max()
    np.testing.assert_allclose(
        applied + np.asarray(residual, np.float64).sum(0), 64 * want, rtol=1e-4, atol=1e-3
    )


def test_what_is_not_finite_arrives_as_such(rng):
    run = one((8, 1, 1), (DATA,), None, Blocks(8, 256))
    grads = rng.normal(size=(8, 4096)).astype(np.float32)
    grads[3, 100] = np.inf
    got = np.asarray(run(grads, np.zeros((8, 1), np.float32), jnp.int32(0))[0])
    assert np.isnan(got[:, 100]).all()
    assert np.isfinite(got[:, 512:]).all()


@pytest.mark.parametrize(
    "blocks, least",
    [(Blocks(8, 256), 1.95), (Blocks(4, 32), 3.5), (Blocks(4, 128, True), 3.5)],
)
def test_bytes_against_a_ring_of_bfloat16(blocks, least):
    """Counted in XLA's program, in the traced one, and by formula."""
    shape, sizes = (1024, 96), MeshShape(8, 1, 1)
    run = one(sizes.sizes, (DATA,), None, blocks)
    traced = run.trace(
        jax.ShapeDtypeStruct((8, *shape), jnp.float32),
        jax.ShapeDtypeStruct((8, 1), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    sent = compiled_bytes(traced.lower().compile().as_text(), sizes)
    wanted = bytes_sent(quantized.crossings(shape, {DATA: 8}, None, blocks), {DATA: 8})
    assert sum(sent.values()) == wanted
    assert {kind for kind, _ in sent} == {"all-to-all", "all-gather"}
    found = collectives_of(traced.jaxpr, dict(zip(AXES, sizes.sizes)))
    assert sum(c.sent for c in found) == wanted
    assert sent_bytes("all-reduce", 8, 2 * math.prod(shape)) / wanted >= least
