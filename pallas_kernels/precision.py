"""The precision of products: what float32 means on every platform."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32

__all__ = ["float32_dot", "precision_of"]

FEW_ROWS = 64


def precision_of(dtype: Any) -> lax.Precision:
    """The `precision` of a product of factors of this dtype.

    Args:
        dtype: of the factors.

    Returns:
        `HIGHEST` for float32, which by default a GPU would round to TF32 and a TPU to bfloat16
        (see the documentation of `jax.lax.Precision`); `DEFAULT` for anything else.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _split(a: jax.Array, terms: int) -> list[jax.Array]:
    """bfloat16 arrays whose sum is a float32 array: exactly for 3 terms, to 16 bits for 2.

    That holds for finite values whose low bits do not underflow.
    """
    parts = []
    for _ in range(terms):
        # Not a conversion back and forth, which a compiler may leave out.
        high = lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
        parts.append(high.astype(jnp.bfloat16))
        a = a - high
    return parts


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _sum_of_parts(sums: jax.Array, parts: int) -> jax.Array:
    """Adds up products that lie side by side, the smallest first."""
    smallest, *larger = reversed(jnp.split(sums, parts, axis=-1))
    for part in larger:
        smallest = smallest + part
    return smallest


@jax.custom_vjp
def _split_dot(x_TD: jax.Array, w_DE: jax.Array) -> jax.Array:
    return _sum_of_parts(_dot(x_TD, jnp.concatenate(_split(w_DE, 3), axis=1)), 3)


def _split_dot_fwd(x_TD, w_DE):
    return _split_dot(x_TD, w_DE), (x_TD, w_DE)


def _split_dot_bwd(residuals, ct_TE):
    x_TD, w_DE = residuals
    ct_high, ct_low, ct_rest = _split(ct_TE, 3)
    w_high, w_low = _split(w_DE, 2)
    # To 16 bits, of which bfloat16 keeps 8.
    cts = jnp.concatenate([ct_high, ct_low, ct_high], axis=1)
    x_ct = _dot(cts, jnp.concatenate([w_high, w_high, w_low], axis=1).T)
    w_ct = _dot(x_TD.T, jnp.concatenate([ct_high, ct_low, ct_rest], axis=1))
    return x_ct.astype(x_TD.dtype), _sum_of_parts(w_ct, 3)


_split_dot.defvjp(_split_dot_fwd, _split_dot_bwd)


def float32_dot(x_TD: Float[Array, "T D"], w_DE: Float32[Array, "D E"]) -> Float32[Array, "T E"]:
    """X @ w as accurate as float32.

    bfloat16 rows are multiplied with three bfloat16 parts of w, exact products that matrix units
    make, summed in float32: a quarter of the time of a float32 product on an H100. For few rows
    splitting costs more than it saves.

    Args:
        x_TD: float32 or bfloat16.
        w_DE: float32.

    Returns:
        float32; gradients in the dtypes of the factors.
    """
    if x_TD.dtype == jnp.bfloat16 and x_TD.shape[0] > FEW_ROWS:
        return _split_dot(x_TD, w_DE)
    return jnp.dot(x_TD.astype(jnp.float32), w_DE, precision=lax.Precision.HIGHEST)
