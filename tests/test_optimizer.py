"""AdamW, the schedules, decay and clipping against numpy in float64."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.training.config import OptimizerConfig
from moejax.training.optimizer import adamw_update, init_moments, learning_rate

# Names as in the model: w… are matrices, the rest norms and biases.
SHAPES = {
    "w_q": (4, 6),
    "w_EDH": (3, 4, 2),
    "scale": (6,),
    "b": (5,),
    "bias_E": (3,),
    "u_DR": (6, 2),
}


def state(values):
    return nnx.State({name: nnx.Param(jnp.asarray(v, jnp.float32)) for name, v in values.items()})


def arrays(tree):
    return {name: np.asarray(tree[name].get_value(), np.float64) for name in SHAPES}


def draw(rng, scale=1.0):
    return {
        name: (rng.normal(size=shape) * scale).astype(np.float32) for name, shape in SHAPES.items()
    }


def oracle(config, weights, grads_of_steps, rates):
    """arXiv 1711.05101, algorithm 2, clipping as in arXiv 1211.5063."""
    weights = {n: v.astype(np.float64) for n, v in weights.items()}
    mu = {n: np.zeros_like(v) for n, v in weights.items()}
    nu = {n: np.zeros_like(v) for n, v in weights.items()}
    norms = []
    for t, (grads, rate) in enumerate(zip(grads_of_steps, rates), 1):
        grads = {n: g.astype(np.float64) for n, g in grads.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        norms.append(norm)
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for n, grad in grads.items():
            g = grad * scale
            mu[n] = config.b1 * mu[n] + (1 - config.b1) * g
            nu[n] = config.b2 * nu[n] + (1 - config.b2) * g**2
            hat = mu[n] / (1 - config.b1**t), nu[n] / (1 - config.b2**t)
            update = hat[0] / (np.sqrt(hat[1]) + config.eps)
            if n.startswith("w"):
                update = update + config.weight_decay * weights[n]
            weights[n] = weights[n] - rate * update
    return weights, mu, nu, norms


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_adamw(rng, clip):
    config = OptimizerConfig(clip_norm=clip, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-6)
    start, grads = draw(rng), [draw(rng, scale) for scale in (1.0, 0.01, 3.0, 0.5)]
    rates = [0.1, 0.2, 0.05, 0.01]
    specs = {name: P() for name in SHAPES}
    masters, norms = state(start), []
    moments = init_moments(masters)
    # One device: no axis is named, so the update runs outside a mesh too.
    update = jax.jit(
        lambda rate, step, *trees: adamw_update(config, rate, step, *trees, nnx.State(specs))
    )
    for step, (grad, rate) in enumerate(zip(grads, rates)):
        masters, moments, norm = update(
            jnp.float32(rate), jnp.int32(step), masters, moments, state(grad)
        )
        norms.append(float(norm))
    weights, mu, nu, want_norms = oracle(config, start, grads, rates)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-5)  # before clipping
    for got, want in zip((masters, *moments), (weights, mu, nu)):
        for name, value in arrays(got).items():
            np.testing.assert_allclose(value, want[name], rtol=2e-5, atol=1e-6, err_msg=name)
            assert got[name].get_value().dtype == jnp.float32


def test_only_matrices_decay(rng):
    config = OptimizerConfig(weight_decay=0.5)
    start = draw(rng)
    zero = {name: np.zeros_like(v) for name, v in start.items()}
    masters = state(start)
    masters, _, norm = adamw_update(
        config,
        jnp.float32(0.1),
        jnp.int32(0),
        masters,
        init_moments(masters),
        state(zero),
        nnx.State({name: P() for name in SHAPES}),
    )
    assert float(norm) == 0.0  # and nothing is divided by it
    for name, value in arrays(masters).items():
        factor = 0.95 if name.startswith("w") else 1.0
        np.testing.assert_allclose(value, start[name] * np.float64(factor), rtol=1e-6, err_msg=name)


def test_given_squares(rng):
    """Of one parameter the gradient is the first moment, and squares make the second."""
    config = OptimizerConfig(clip_norm=0.5, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-6)
    start = draw(rng)
    name = next(n for n in SHAPES if n.startswith("w"))
    specs = nnx.State({n: P() for n in SHAPES})
    masters, moments, other = state(start), init_moments(state(start)), None
    weight, nu = start[name].astype(np.float64), np.zeros(start[name].shape)
    for step, rate in enumerate((0.1, 0.05, 0.2)):
        grad, square = draw(rng, 3.0), rng.random(start[name].shape).astype(np.float32)
        path = next(p for p, _ in nnx.to_flat_state(masters) if p[-1] == name)
        args = (config, jnp.float32(rate), jnp.int32(step), masters, moments, state(grad), specs)
        plain, _, _ = adamw_update(*args)
        masters, moments, norm = adamw_update(*args, {path: square})
        for n in set(SHAPES) - {name}:  # the others are Adam's, whatever is given
            assert np.array_equal(arrays(plain)[n], arrays(masters)[n])
        scale = min(1.0, config.clip_norm / (float(norm) + 1e-6))
        nu = config.b2 * nu + (1 - config.b2) * scale**2 * square
        unbiased = nu / (1 - config.b2 ** (step + 1))
        update = scale * grad[name] / (np.sqrt(unbiased) + config.eps)
        weight = weight - rate * (update + config.weight_decay * weight)
        np.testing.assert_allclose(arrays(masters)[name], weight, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(arrays(moments[1])[name], nu, rtol=2e-5)
        other = plain
    assert not np.allclose(arrays(other)[name], weight)


# ── schedules ────────────────────────────────────────────────────────────────


def curve(config, steps):
    return np.asarray(jax.vmap(lambda s: learning_rate(config, steps, s))(jnp.arange(steps)))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps, warmup", [(100, 10), (100, 0), (7, 3)])
def test_schedules(schedule, steps, warmup):
    config = OptimizerConfig(
        schedule=schedule, warmup_steps=warmup, learning_rate=0.5, final_ratio=0.1
    )
    got = curve(config, steps)
    t = np.arange(steps, dtype=np.float64)
    rising = 0.5 * (1 + t * warmup / max(warmup, 1)) / (warmup + 1)
    if schedule == "cosine":
        share = (t - warmup) / (steps - warmup)
        falling = 0.5 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * share)))
    else:
        decay = max(1, round(0.2 * steps))
        falling = np.interp(t, [steps - decay, steps], [0.5, 0.05])
    np.testing.assert_allclose(got, np.where(t < warmup, rising, falling), rtol=1e-5)
    # Never zero, the peak once the warm-up is over, then downwards.
    assert got[0] > 0 and got.max() == got[warmup] == np.float32(0.5)
    assert (np.diff(got[: warmup + 1]) > 0).all() and (np.diff(got[warmup:]) <= 0).all()
    # One step more would be the end.
    end = float(learning_rate(config, steps, steps))
    assert end == pytest.approx(0.05) and got[-1] > end
    assert learning_rate(config, steps, 10 * steps) == pytest.approx(0.05)


def test_wsd_is_constant_in_between():
    got = curve(OptimizerConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.3), 100)
    assert (got[10:71] == got[10]).all() and got[71] < got[70]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps, warmup", [(1, 20), (5, 20), (2, 1)])
def test_runs_shorter_than_the_warm_up(schedule, steps, warmup):
    for fraction in (0.0, 0.2, 1.0):
        config = OptimizerConfig(schedule=schedule, warmup_steps=warmup, decay_fraction=fraction)
        got = curve(config, steps)
        assert np.isfinite(got).all() and (got > 0).all() and got.max() <= np.float32(3e-3)


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 0.0),
        ("decay_fraction", 1.5),
        ("final_ratio", -0.1),
        ("warmup_steps", -1),
        ("clip_norm", -1.0),
        ("weight_decay", -0.1),
        ("b1", 1.0),
        ("b2", -0.1),
        ("eps", 0.0),
    ],
)
def test_values_that_make_no_sense(field, value):
    with pytest.raises(UserError, match=f"{field}={value}: must"):
        dataclasses.replace(OptimizerConfig(), **{field: value})
