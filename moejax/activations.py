"""The activation functions between the two products of an MLP or an expert."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from moejax.errors import UserError

__all__ = ["GATED", "apply_activation"]

GATED = ("swiglu", "geglu", "swiglu_oai")
_PLAIN = ("gelu", "relu2")
_LIMIT, _ALPHA = 7.0, 1.702


def apply_activation(h_NH: jax.Array, name: str) -> jax.Array:
    """Applies an activation to the input projections, in float32, and merges them.

    `swiglu` and `geglu` are arXiv 2002.05202 §2, `relu2` is arXiv 2109.08668 §4.1. `gelu` and
    `geglu` use the tanh approximation (arXiv 1606.08415 §2). `swiglu_oai` is gpt-oss's (gpt-oss
    model card, arXiv 2508.10925): gate·σ(1.702·gate)·(value + 1) of a gate of at most 7 and a
    value clipped to ±7.

    Args:
        h_NH: [..., n, H], any float dtype. n = 2 for gated activations, the gate first and the
            value second; n = 1 for plain ones.
        name: `swiglu`, `geglu`, `swiglu_oai`, `gelu` or `relu2`.

    Returns:
        [..., H] in h's dtype.

    Raises:
        UserError: the name is unknown.
        ValueError: n does not fit the activation.
    """
    if name not in GATED + _PLAIN:
        raise UserError(f"activation={name!r}: choose one of {', '.join(GATED + _PLAIN)}")
    projections = 2 if name in GATED else 1
    if h_NH.shape[-2] != projections:
        raise ValueError(
            f"{name} takes {projections} projections, received the shape {h_NH.shape}: "
            "the last but one dimension counts them"
        )
    wide = h_NH.astype(jnp.float32)
    first = wide[..., 0, :]
    if name == "swiglu":
        y = jax.nn.silu(first) * wide[..., 1, :]
    elif name == "geglu":
        y = jax.nn.gelu(first, approximate=True) * wide[..., 1, :]
    elif name == "swiglu_oai":
        gate = _at_most(first, _LIMIT)
        value = -_at_most(-_at_most(wide[..., 1, :], _LIMIT), _LIMIT)
        y = gate * jax.nn.sigmoid(_ALPHA * gate) * (value + 1.0)
    elif name == "gelu":
        y = jax.nn.gelu(first, approximate=True)
    else:
        y = jnp.square(jax.nn.relu(first))
    return y.astype(h_NH.dtype)


def _at_most(x: jax.Array, limit: float) -> jax.Array:
    # At the limit `jnp.minimum` has half a gradient; here it is whole, as in the kernels.
    return jnp.where(x > limit, jnp.float32(limit), x)
