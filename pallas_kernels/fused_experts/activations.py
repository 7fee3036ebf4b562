"""Activations of experts with their derivatives in closed form, on float32 values of a tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

__all__ = ["ACTIVATIONS", "Activation", "activate"]

_SQRT_2_OVER_PI = 0.7978845608028654
_CUBIC = 0.044715
_LIMIT, _ALPHA = 7.0, 1.702


@dataclass(frozen=True)
class Activation:
    """value: of the input projections. gradients: (projections, cotangent) -> (value, gradients).

    parts: projections; 2 for gated activations, the gate first.
    """

    parts: int
    value: Callable[..., Any]
    gradients: Callable[..., tuple[Any, tuple[Any, ...]]]


def _sigmoid(x: Any) -> Any:
    """1 / (1 + e⁻ˣ); a GPU has an instruction for the reciprocal root, none for a quotient."""
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return root * root


def _silu(g: Any) -> tuple[Any, Any]:
    """g·σ(g) and its derivative."""
    s = _sigmoid(g)
    value = g * s
    return value, s + value * (1.0 - s)


def _gelu(g: Any) -> tuple[Any, Any]:
    """The tanh approximation (arXiv 1606.08415 §2) and its derivative.

    (1 + tanh z) / 2 is σ(2z).
    """
    square = g * g
    z = _SQRT_2_OVER_PI * g * (1.0 + _CUBIC * square)
    half = _sigmoid(2.0 * z)
    slope = _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * square)
    return g * half, half + 2.0 * g * half * (1.0 - half) * slope


def _relu2(g: Any) -> tuple[Any, Any]:
    positive = jnp.maximum(g, 0.0)
    return positive * positive, 2.0 * positive


def _plain(function: Callable[[Any], tuple[Any, Any]]) -> Activation:
    def gradients(parts, ct):
        value, slope = function(parts[0])
        return value, (ct * slope,)

    return Activation(1, lambda parts: function(parts[0])[0], gradients)


def _gated(function: Callable[[Any], tuple[Any, Any]]) -> Activation:
    def gradients(parts, ct):
        value, slope = function(parts[0])
        return value * parts[1], (ct * parts[1] * slope, ct * value)

    return Activation(2, lambda parts: function(parts[0])[0] * parts[1], gradients)


def _clamped(parts: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """σ(1.702·gate), gate·σ and value + 1 of gpt-oss's gate of at most 7 and value within ±7."""
    gate = jnp.minimum(parts[0], _LIMIT)
    s = _sigmoid(_ALPHA * gate)
    return s, gate * s, jnp.maximum(jnp.minimum(parts[1], _LIMIT), -_LIMIT) + 1.0


def _clamped_value(parts: tuple[Any, ...]) -> Any:
    _, gated, value = _clamped(parts)
    return gated * value


def _clamped_gradients(parts: tuple[Any, ...], ct: Any) -> tuple[Any, tuple[Any, ...]]:
    s, gated, value = _clamped(parts)
    slope = s + _ALPHA * gated * (1.0 - s)
    gate_ct = jnp.where(parts[0] <= _LIMIT, ct * value * slope, 0.0)
    return gated * value, (gate_ct, jnp.where(jnp.abs(parts[1]) <= _LIMIT, ct * gated, 0.0))


ACTIVATIONS = {
    "swiglu": _gated(_silu),
    "geglu": _gated(_gelu),
    "swiglu_oai": Activation(2, _clamped_value, _clamped_gradients),  # arXiv 2508.10925
    "gelu": _plain(_gelu),
    "relu2": _plain(_relu2),
}


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def activate(h_AM: jax.Array, name: str) -> jax.Array:
    """The activation of projections that lie side by side, computed in float32.

    Its gradient is the closed form: what JAX would derive is not finite where an exponential
    overflows, which for `gelu` it does from -11 down.

    Args:
        h_AM: [A, N·H], any float dtype; the gate first.
        name: one of `ACTIVATIONS`.

    Returns:
        [A, H] in h's dtype.
    """
    return ACTIVATIONS[name].value(_parts(h_AM, name)).astype(h_AM.dtype)


def _parts(h_AM: jax.Array, name: str) -> tuple[jax.Array, ...]:
    return tuple(jnp.split(h_AM.astype(jnp.float32), ACTIVATIONS[name].parts, axis=1))


def _activate_fwd(h_AM, name):
    return activate(h_AM, name), h_AM


def _activate_bwd(name, h_AM, ct_AH):
    gradients = ACTIVATIONS[name].gradients(_parts(h_AM, name), ct_AH.astype(jnp.float32))[1]
    return (jnp.concatenate(gradients, axis=1).astype(h_AM.dtype),)


activate.defvjp(_activate_fwd, _activate_bwd)
