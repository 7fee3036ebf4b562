"""The router's product: logits of float32 accuracy.

Backends are tried in order; one that cannot serve a case raises NotImplementedError with the
reason. `explain_router_product` says which was chosen and why others were not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import backends
from pallas_kernels.hopper.compat import hopper_refusal
from pallas_kernels.precision import float32_dot
from pallas_kernels.route import warp_product

__all__ = ["BACKENDS", "explain_router_product", "router_product"]

BACKENDS = ("mosaic_gpu", "reference")


def _refusal(
    tokens: int, d_model: int, experts: int, dtype: Any, w_dtype: Any
) -> Callable[[str, bool], str | None]:
    def refusal(backend: str, forced: bool) -> str | None:
        if backend != "mosaic_gpu":
            return None
        shape = warp_product.refusal(tokens, d_model, experts, w_dtype)
        return shape or hopper_refusal(dtype, forced=forced)

    return refusal


def explain_router_product(
    tokens: int, d_model: int, experts: int, dtype: Any = jnp.bfloat16
) -> str:
    """One line: the backend that serves rows of this dtype, and why those before it do not."""
    refusal = _refusal(tokens, d_model, experts, dtype, jnp.float32)
    return backends.explain("router_product", BACKENDS, refusal)


@jax.custom_vjp
def _product(x_TD: jax.Array, w_DE: jax.Array) -> jax.Array:
    return warp_product.product(x_TD, w_DE)


def _product_fwd(x_TD, w_DE):
    return warp_product.product(x_TD, w_DE), (x_TD, w_DE)


def _product_bwd(residuals, ct_TE):
    return jax.vjp(float32_dot, *residuals)[1](ct_TE)


_product.defvjp(_product_fwd, _product_bwd)


def router_product(
    x_TD: Float[Array, "T D"], w_DE: Float32[Array, "D E"], *, backend: str | None = None
) -> Float32[Array, "T E"]:
    """X @ w as accurate as float32.

    Args:
        x_TD: float32 or bfloat16.
        w_DE: float32.
        backend: one of `BACKENDS`; `mosaic_gpu` takes few bfloat16 rows, `reference` is
            `precision.float32_dot`; None tries them in order.

    Returns:
        float32; gradients in the dtypes of the factors, those of `precision.float32_dot`.

    Raises:
        NotImplementedError: the backend cannot serve this.
    """
    tokens, d_model = x_TD.shape
    refusal = _refusal(tokens, d_model, w_DE.shape[1], x_TD.dtype, w_DE.dtype)
    chosen = backends.choose("router_product", BACKENDS, backend, refusal)
    return (_product if chosen == "mosaic_gpu" else float32_dot)(x_TD, w_DE)
