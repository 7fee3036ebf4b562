"""What moejax is compared with in JAX: a plain MoE layer over different grouped products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from layer_shapes import LIMIT, Shape

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(rows [A, K] sorted by group, matrices [E, K, N], group sizes int32 [E]) → [A, N]."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute the layer; several of one implementation compete, the fastest counts.

    forward: (weights, bias, x_TD) → y_TD.
    gradients: (weights, bias, x_TD, ct_TD) → (loss, (gradients of weights, of x)); None: there
        are none.
    config: what it was built with, for the row.
    prepare: weights → what forward takes in their place, once, before anything is timed.
    limit: largest norm-relative error of y against the layer in float32.
    """

    forward: Callable
    gradients: Callable | None
    config: dict[str, Any]
    prepare: Callable = lambda weights: weights
    limit: float = LIMIT


def plain_forward(
    weights: dict, bias: jax.Array | None, x_TD: jax.Array, *, top_k: int, product: Product
) -> jax.Array:
    """Router in float32, sort, gather, product, SwiGLU, product, weighted sum."""
    tokens, d_model = x_TD.shape
    experts = weights["router"].shape[1]
    logits_TE = jnp.dot(x_TD.astype(jnp.float32), weights["router"], precision="highest")
    if bias is not None:
        logits_TE = logits_TE + bias
    # Softmax over all, the K best renormalized: the same as a softmax over the K best.
    best_TK, ids_TK = lax.top_k(logits_TE, top_k)
    scores_TK = jax.nn.softmax(best_TK, axis=-1)

    ids_A = ids_TK.reshape(-1)
    order_A = jnp.argsort(ids_A, stable=True)
    place_A = (
        jnp.zeros_like(order_A)
        .at[order_A]
        .set(jnp.arange(ids_A.size, dtype=order_A.dtype), unique_indices=True)
    )
    sizes_E = jnp.zeros(experts, jnp.int32).at[ids_A].add(1)
    # K copies of each token, permuted: the gradient scatters to distinct rows and then sums over
    # K, where a gather of tokens would add into one row K times, in bf16 and out of order.
    copies_AD = jnp.broadcast_to(x_TD[:, None], (tokens, top_k, d_model)).reshape(-1, d_model)
    rows_AD = _permute(copies_AD, order_A)

    w_in = weights["w_in"]
    h_AF = product(rows_AD, w_in.reshape(*w_in.shape[:2], -1), sizes_E)
    gate_AH, up_AH = jnp.split(h_AF.astype(jnp.float32), 2, axis=-1)
    a_AH = (jax.nn.silu(gate_AH) * up_AH).astype(x_TD.dtype)
    y_AD = product(a_AH, weights["w_out"], sizes_E)

    y_TKD = _permute(y_AD, place_A).reshape(tokens, top_k, d_model)
    return jnp.sum(y_TKD.astype(jnp.float32) * scores_TK[..., None], axis=1).astype(x_TD.dtype)


def _permute(rows_AD: jax.Array, index_A: jax.Array) -> jax.Array:
    return rows_AD.at[index_A].get(unique_indices=True, mode="promise_in_bounds")


def plain_gradients(
    weights: dict, bias: Any, x_TD: jax.Array, ct_TD: jax.Array, *, forward: Callable
) -> Any:
    """Σ y·ct and its gradients with respect to the weights and x."""

    def loss(weights: dict, x_TD: jax.Array) -> jax.Array:
        y_TD = forward(weights, bias, x_TD)
        return jnp.sum(y_TD.astype(jnp.float32) * ct_TD.astype(jnp.float32))

    return jax.value_and_grad(loss, (0, 1))(weights, x_TD)


def _candidate(shape: Shape, product: Product, backward: bool, **config: Any) -> Candidate:
    forward = partial(plain_forward, top_k=shape.top_k, product=product)
    gradients = partial(plain_gradients, forward=forward) if backward else None
    return Candidate(forward, gradients, config)


def _moejax(shape: Shape, biased: bool) -> Iterator[Candidate]:
    from layer_moejax import build, layer_config

    config = layer_config(shape.hidden, shape.experts, shape.top_k)
    yield Candidate(*build(shape.d_model, config, biased=biased), {})


# What rounding alone costs: a factor in e4m3 adds 2.4 % (a unit is 1/8 of a value at most), and
# there are three matrices; with float8 rows also two sets of rows.
_QUANTIZED_LIMITS = {"int8": 0.02, "e4m3": 0.06, "fp8": 0.08}


def _quantized(name: str, shape: Shape, biased: bool) -> Iterator[Candidate]:
    from layer_moejax import build, layer_config, quantized_weights

    config = layer_config(shape.hidden, shape.experts, shape.top_k)
    dtype: Any = "int8" if name == "int8" else "float8_e4m3fn"
    options = {"dtype": dtype, "rows": "float8" if name == "fp8" else "compute"}
    forward, _ = build(shape.d_model, config, biased=biased, quantized=options)
    prepare = partial(quantized_weights, dtype=dtype)
    yield Candidate(forward, None, {}, prepare=prepare, limit=_QUANTIZED_LIMITS[name])


def _ragged_dot(shape: Shape, biased: bool) -> Iterator[Candidate]:
    yield _candidate(shape, lax.ragged_dot, True)


def _tokamax(shape: Shape, biased: bool) -> Iterator[Candidate]:
    import tokamax

    def product(rows_AK, w_EKN, sizes_E):
        return tokamax.ragged_dot(rows_AK, w_EKN, group_sizes=sizes_E)

    yield _candidate(shape, product, True)


def _jax_pallas(shape: Shape, biased: bool) -> Iterator[Candidate]:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    # (block_m, block_n, max_concurrent_steps, grid_block_n); block_k is 64, a swizzle's width.
    few_rows = ((64, 128, 6, 4), (64, 256, 4, 4))
    many_rows = ((128, 128, 4, 8), (128, 128, 4, 4), (64, 256, 4, 4))
    for block_m, block_n, steps, wide in few_rows if shape.decode else many_rows:
        config = {"block_m": block_m, "block_n": block_n, "block_k": 64}

        def product(rows_AK, w_EKN, sizes_E, config=config, steps=steps, wide=wide):
            columns = w_EKN.shape[2] // config["block_n"]
            fitting = next(n for n in (wide, 4, 2, 1) if columns % n == 0)
            return ragged_dot_mgpu.ragged_dot(
                rows_AK,
                w_EKN,
                group_sizes=sizes_E,
                max_concurrent_steps=steps,
                grid_block_n=fitting,
                **config,
            )

        more = {"max_concurrent_steps": steps, "grid_block_n": wide}
        yield _candidate(shape, product, False, **config, **more)


IMPLS: dict[str, Callable[[Shape, bool], Iterator[Candidate]]] = {
    "moejax": _moejax,
    **{f"moejax_{name}": partial(_quantized, name) for name in _QUANTIZED_LIMITS},
    "ragged_dot": _ragged_dot,
    "jax_pallas_ragged_dot": _jax_pallas,
    "tokamax": _tokamax,
}
"""Each takes a shape and whether the router has a bias; raises ImportError when not installed."""
