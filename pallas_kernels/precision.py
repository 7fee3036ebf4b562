"""The precision of products: what float32 means on every platform."""

from __future__ import annotations

from typing import Any

from jax import lax
from jax import numpy as jnp

__all__ = ["precision_of"]


def precision_of(dtype: Any) -> lax.Precision:
    """The `precision` of a product of factors of this dtype.

    Args:
        dtype: of the factors.

    Returns:
        `HIGHEST` for float32, which by default a GPU would round to TF32 and a TPU to bfloat16
        (see the documentation of `jax.lax.Precision`); `DEFAULT` for anything else.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
