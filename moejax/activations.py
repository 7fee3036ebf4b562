"""The activation functions between the two products of an MLP or an expert."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from moejax.errors import UserError

__all__ = ["GATED", "apply_activation"]

GATED = ("swiglu", "geglu")
_PLAIN = ("gelu", "relu2")


def apply_activation(h_NH: jax.Array, name: str) -> jax.Array:
    """Applies an activation to the input projections, in float32, and merges them.

    `swiglu` and `geglu` are arXiv 2002.05202 §2, `relu2` is arXiv 2109.08668 §4.1. `gelu` and
    `geglu` use the tanh approximation (arXiv 1606.08415 §2).

    Args:
        h_NH: [..., n, H], any float dtype. n = 2 for gated activations, the gate first and the
            value second; n = 1 for plain ones.
        name: `swiglu`, `geglu`, `gelu` or `relu2`.

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
    elif name == "gelu":
        y = jax.nn.gelu(first, approximate=True)
    else:
        y = jnp.square(jax.nn.relu(first))
    return y.astype(h_NH.dtype)
