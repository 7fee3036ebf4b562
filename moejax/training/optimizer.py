"""AdamW on stored pieces: optax's Adam, a schedule, decay of matrices only, clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax import numpy as jnp

from moejax.training.config import OptimizerConfig
from sharding.gradients import global_norm

__all__ = ["adamw_update", "init_moments", "learning_rate"]


def learning_rate(config: OptimizerConfig, steps: int, step: jax.Array | int) -> jax.Array:
    """Learning rate of a step; float32 [].

    Args:
        config: peak, warm-up and decay.
        steps: length of the run.
        step: 0 for the first.
    """
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    peak, last = config.learning_rate, config.learning_rate * config.final_ratio
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), config.final_ratio)
        parts, borders = [after], []
    else:
        decay = min(steps - warmup, max(1, round(steps * config.decay_fraction)))
        parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)]
        borders = [steps - decay]
    if warmup:
        parts = [optax.linear_schedule(peak / (warmup + 1), peak, warmup), *parts]
        borders = [warmup, *borders]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(optax.join_schedules(parts, borders)(step), jnp.float32)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def init_moments(masters: Any) -> tuple[Any, Any]:
    """First and second moments, zero, float32, shaped like the masters."""
    return jax.tree.map(jnp.zeros_like, masters), jax.tree.map(jnp.zeros_like, masters)


def _decays(masters: nnx.State) -> Any:
    """1.0 for matrices (named w…), 0.0 for norms, biases and projections; like the masters."""
    flat = [
        (path, variable.replace(1.0 if str(path[-1]).startswith("w") else 0.0))
        for path, variable in nnx.to_flat_state(masters)
    ]
    return nnx.from_flat_state(flat)


def adamw_update(
    config: OptimizerConfig,
    rate: jax.Array,
    step: jax.Array,
    masters: nnx.State,
    moments: tuple[Any, Any],
    grads: Any,
    stored_specs: Any,
    squares: Mapping[tuple, jax.Array] | None = None,
) -> tuple[Any, tuple[Any, Any], jax.Array]:
    """One step on this device's pieces.

    Args:
        config: the optimizer.
        rate: learning rate, float32 [].
        step: steps taken so far, int32 [].
        masters: float32 pieces.
        moments: first and second, like the masters.
        grads: float32, reduced, like the masters.
        stored_specs: how masters are split, for the norm.
        squares: float32, by path, for parameters whose gradient is a first moment already and
            says nothing of the second: what the second is made of instead.

    Returns:
        new masters, new moments, and the global norm of the gradients before clipping.
    """
    norm = global_norm(grads, stored_specs)
    scale = jnp.ones((), jnp.float32)
    if config.clip_norm > 0:
        scale = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * scale, grads)
    with jax.numpy_dtype_promotion("standard"):
        state = optax.ScaleByAdamState(step, *moments)
        updates, state = _adam(config).update(grads, state)  # type: ignore[assignment]
    mu, nu = state.mu, state.nu
    if squares:
        scaled = {path: jnp.square(scale) * square for path, square in squares.items()}
        updates, mu, nu = _with_squares(config, step, grads, moments[1], scaled, (updates, mu, nu))

    def apply(master: jax.Array, update: jax.Array, decay: float) -> jax.Array:
        return master - rate * (update + config.weight_decay * decay * master)

    masters = jax.tree.map(apply, masters, updates, _decays(masters))
    return masters, (mu, nu), norm


def _with_squares(
    config: OptimizerConfig,
    step: jax.Array,
    grads: Any,
    nu: Any,
    squares: Mapping[tuple, jax.Array],
    adam: tuple[Any, Any, Any],
) -> tuple[Any, Any, Any]:
    """Adam's updates and moments, with those of some parameters from given squares and b1 = 0."""
    updates, mu, new_nu = (dict(nnx.to_flat_state(tree)) for tree in adam)
    given, before = dict(nnx.to_flat_state(grads)), dict(nnx.to_flat_state(nu))
    unbiased = 1 - config.b2 ** (step.astype(jnp.float32) + 1)
    for path, square in squares.items():
        grad = given[path].get_value()
        mean = config.b2 * before[path].get_value() + (1 - config.b2) * square
        update = grad / (jnp.sqrt(mean / unbiased) + config.eps)
        updates[path] = updates[path].replace(update)
        mu[path], new_nu[path] = mu[path].replace(grad), new_nu[path].replace(mean)
    return nnx.from_flat_state(updates), nnx.from_flat_state(mu), nnx.from_flat_state(new_nu)
