"""What of a step is alive at once: programs whose sizes are known, compared with sums by hand."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.backends import planned_for
from pallas_kernels.fused_experts.api import fused_experts
from sharding.liveness import kept_for_backward, most_in_backward, recomputed_at_once
from sharding.traffic import live_jaxpr

LAYERS = 6


@jax.custom_vjp
def layer(x, w, kept):
    """Keeps as many numbers as `kept` has; the gradient of w has as many as w."""
    return x + w[0]


def _forward(x, w, kept):
    return layer(x, w, kept), (w, x * kept)


def _backward(residuals, ct):
    w, kept = residuals
    total = jnp.sum(kept) * ct
    return total, total * w, jnp.zeros_like(kept)


layer.defvjp(_forward, _backward)


def step(apply):
    """Gradients of layers one after the other, and the update that reads them all."""

    def run(x, weights, kept):
        def loss(weights):
            out = x
            for w, k in zip(weights, kept, strict=True):
                out = apply(out, w, k)
            return out * 2

        grads = jax.grad(loss)(weights)
        norm = sum(jnp.sum(g * g) for g in grads)
        return [w - norm * g for w, g in zip(weights, grads, strict=True)]

    return run


def traced(apply, weights, kept):
    def array(size):
        return jax.ShapeDtypeStruct((int(size),), jnp.float32)

    x = jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (x, [array(n) for n in weights], [array(n) for n in kept])
    return live_jaxpr(jax.make_jaxpr(step(apply))(*arguments))


@pytest.fixture
def sizes(rng):
    """Numbers of weights, and of what is kept, by layer."""
    return rng.integers(1000, 9000, (2, LAYERS))


SCALARS = 4 * 8 * LAYERS  # bytes of single numbers beside the arrays


@pytest.mark.parametrize("growth", [1.0, 3.0])
@pytest.mark.parametrize("called", [False, True])
def test_most_is_that_of_the_fullest_moment(sizes, called, growth):
    weights, kept = sizes
    jaxpr = traced(jax.jit(layer) if called else layer, weights, kept)
    assert 0 <= kept_for_backward(jaxpr) - 4 * kept.sum() <= SCALARS
    # Layer i's turn: what is kept for it and those before, gradients of those behind.
    moments = [kept[: i + 1].sum() + growth * weights[i + 1 :].sum() for i in range(LAYERS)]
    most = 4 * max(*moments, growth * weights.sum())
    assert 0 <= most_in_backward(jaxpr, growth=growth) - most <= growth * SCALARS
    assert recomputed_at_once(jaxpr) == 0


def test_unequal_layers_need_both_at_once():
    """First layers keep much, last ones have many weights: nothing is freed for the gradients."""
    weights, kept = np.array([1, 1, 9000, 9000]), np.array([9000, 9000, 1, 1])
    most = most_in_backward(traced(layer, weights, kept))
    assert most == pytest.approx(4 * 4 * 9000, rel=0.01)


def test_pieces_that_are_computed_again(sizes):
    weights, kept = sizes
    jaxpr = traced(jax.checkpoint(layer), weights, kept)
    assert kept_for_backward(jaxpr) <= SCALARS
    assert 0 <= recomputed_at_once(jaxpr) - 4 * kept.max() <= SCALARS
    # A piece's gradient is there with what is made again for it.
    moments = [kept[i] + weights[i:].sum() for i in range(LAYERS)]
    assert 0 <= most_in_backward(jaxpr) - 4 * max(moments) <= SCALARS


def test_values_on_the_way_count_while_they_are_read(rng):
    """A backward that makes n numbers, doubles them and sums them up has 2n at once."""

    @jax.custom_vjp
    def wide(x, w):
        return x * w

    n = int(rng.integers(1000, 9000))

    def backward(residuals, ct):
        x, _, many = residuals
        first = many * ct
        second = first + many  # `many` is read here for the last time
        third = second * second
        return jnp.sum(third * third), ct * x

    wide.defvjp(lambda x, w: (x * w, (x, w, x * jnp.full(n, 2.0))), backward)
    found = jax.make_jaxpr(jax.grad(lambda x, w: wide(jnp.sin(x), w), (0, 1)))(1.0, 2.0)
    assert 0 <= most_in_backward(live_jaxpr(found)) - 3 * 4 * n <= SCALARS


def test_no_backward_no_bytes():
    jaxpr = live_jaxpr(jax.make_jaxpr(jnp.sin)(1.0))
    assert kept_for_backward(jaxpr) == most_in_backward(jaxpr) == 0


def test_planned_kernels_stay_in_plans(rng):
    """A program traced for another machine's kernels is not the one that runs here."""

    def draw(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(rng.normal(size=shape), dtype)

    x, w_in, w_out = draw(4, 64), draw(2, 64, 2, 64), draw(2, 64, 64)
    scores = draw(4, 1, dtype=jnp.float32)
    place = jnp.arange(4, dtype=jnp.int32)[:, None] * 64
    copy = jnp.full(256, 4, jnp.int32).at[place[:, 0]].set(jnp.arange(4, dtype=jnp.int32))
    layout = (place, copy, jnp.full(2, 128, jnp.int32))

    @jax.jit
    def run(*arrays):
        return fused_experts(*arrays, *layout, activation="swiglu")

    arrays = (x, w_in, w_out, scores)
    here = run(*arrays)
    with planned_for("mosaic_gpu"):
        planned = str(run.trace(*arrays).jaxpr)
    assert planned != str(run.trace(*arrays).jaxpr)
    np.testing.assert_array_equal(run(*arrays), here)
    kept = []
    for kernels in ("mosaic_gpu", ""):
        with planned_for(kernels):
            kept.append(str(jax.make_jaxpr(run)(*arrays)))
    assert kept[0] != kept[1]
