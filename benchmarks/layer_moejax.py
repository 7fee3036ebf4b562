"""The library's own layer as the benchmark calls it: `MoELayer` with its defaults, one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config import ExpertsConfig, MoEConfig, RouterConfig
from moejax.layer import MoELayer
from pallas_kernels.quantized_experts.format import quantize
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

BANK = ("w_in", "w_out", "w_in_values", "w_in_scales", "w_out_values", "w_out_scales")
PATHS = {
    "router": ("router", "w_DE"),
    "bias": ("router", "b_E"),
    **{name: ("bank", name) for name in BANK},
}


def layer_config(hidden: int, experts: int, top_k: int) -> MoEConfig:
    """Softmax over the experts, the K best renormalized, SwiGLU experts, no auxiliary losses."""
    router = RouterConfig(
        num_experts=experts,
        top_k=top_k,
        score_function="softmax",
        renormalize=True,
        load_balance_coef=0.0,
        z_loss_coef=0.0,
    )
    return MoEConfig(router=router, experts=ExpertsConfig(hidden=hidden))


def quantized_weights(weights: dict, *, dtype: str) -> dict:
    """The router, and the experts' weights as `MoELayer.quantize_experts` makes them."""

    @jax.jit
    def values_and_scales(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        quantized = quantize(w, jnp.dtype(dtype))
        return quantized.values, quantized.scales

    made = {"router": weights["router"]}
    for name in ("w_in", "w_out"):
        w = weights[name].swapaxes(1, 2) if name == "w_in" else weights[name]
        made[f"{name}_values"], made[f"{name}_scales"] = values_and_scales(w)
    return made


def build(
    d_model: int, config: MoEConfig, *, biased: bool, quantized: dict[str, Any] | None = None
) -> tuple[Callable, Callable]:
    """The layer inside a shard_map over a mesh of one device.

    Args:
        d_model: D.
        config: the layer; its exchange and its kernels are whatever the library chooses.
        biased: the router has a bias, which makes a chosen popularity of the experts.
        quantized: arguments of `MoELayer.quantize_experts`; `weights` are then those of
            `quantized_weights`, and there are no gradients.

    Returns:
        forward(weights, x_TD) → y_TD, and
        gradients(weights, bias, x_TD, ct_TD) → (Σ y·ct, (gradients of the weights, of x)).
        `weights`: `router` float32 [D, E], `w_in` [E, D, 2, H], `w_out` [E, H, D]; `bias` is None
        or float32 [E] and gets no gradient.
    """
    config = replace(config, router=replace(config.router, bias=biased))

    # Only the structure: weights are never initialised here.
    def make() -> MoELayer:
        layer = MoELayer(d_model, config, expert_devices=1, rngs=nnx.Rngs(params=0))
        if quantized is not None:
            layer.quantize_experts(**quantized)
        return layer

    layer = nnx.eval_shape(make)
    graph, template = nnx.split(layer)
    specs, rows, mesh = specs_of(template), P(TOKEN_AXES), make_mesh(MeshShape())

    def fill(weights: dict, bias: Any) -> Any:
        pure = nnx.to_pure_dict(template)
        for name, value in {**weights, "bias": bias}.items():
            if value is not None:
                module, leaf = PATHS[name]
                pure[module][leaf] = value
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, pure)
        return state

    def sharded(body: Callable, out_specs: Any) -> Callable:
        def call(weights: dict, bias: Any, *arrays: jax.Array) -> Any:
            wrapped = jax.shard_map(
                body,
                mesh=mesh,
                in_specs=(specs, *(rows for _ in arrays)),
                out_specs=out_specs,
                check_vma=False,
            )
            return wrapped(fill(weights, bias), *arrays)

        return call

    def forward(state: Any, x_TD: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x_TD)[0]

    def gradients(state: Any, x_TD: jax.Array, ct_TD: jax.Array) -> Any:
        fixed = nnx.to_pure_dict(state)
        taken = {name: PATHS[name] for name in ("router", "w_in", "w_out")}

        def loss(weights: dict, x_TD: jax.Array) -> jax.Array:
            y_TD = forward(fill(weights, fixed["router"].get("b_E")), x_TD)
            return jnp.sum(y_TD.astype(jnp.float32) * ct_TD.astype(jnp.float32))

        weights = {name: fixed[module][leaf] for name, (module, leaf) in taken.items()}
        return jax.value_and_grad(loss, (0, 1))(weights, x_TD)

    if quantized is not None:
        return sharded(forward, rows), sharded(forward, rows)
    bank = {"router": P(), "w_in": specs["bank"]["w_in"], "w_out": specs["bank"]["w_out"]}
    return sharded(forward, rows), sharded(gradients, (P(), (bank, rows)))
