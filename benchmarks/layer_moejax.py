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
from sharding.mesh import TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

PATHS = {
    "router": ("router", "w_DE"),
    "bias": ("router", "b_E"),
    "w_in": ("bank", "w_in"),
    "w_out": ("bank", "w_out"),
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


def build(d_model: int, config: MoEConfig, *, biased: bool) -> tuple[Callable, Callable]:
    """The layer inside a shard_map over a mesh of one device.

    Args:
        d_model: D.
        config: the layer; its exchange and its kernels are whatever the library chooses.
        biased: the router has a bias, which makes a chosen popularity of the experts.

    Returns:
        forward(weights, x_TD) → y_TD, and
        gradients(weights, bias, x_TD, ct_TD) → (Σ y·ct, (gradients of the weights, of x)).
        `weights`: `router` float32 [D, E], `w_in` [E, D, 2, H], `w_out` [E, H, D]; `bias` is None
        or float32 [E] and gets no gradient.
    """
    config = replace(config, router=replace(config.router, bias=biased))
    # Only the structure: weights are never initialised here.
    layer = nnx.eval_shape(
        lambda: MoELayer(d_model, config, expert_devices=1, rngs=nnx.Rngs(params=0))
    )
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
        taken = {name: path for name, path in PATHS.items() if name != "bias"}

        def loss(weights: dict, x_TD: jax.Array) -> jax.Array:
            y_TD = forward(fill(weights, fixed["router"].get("b_E")), x_TD)
            return jnp.sum(y_TD.astype(jnp.float32) * ct_TD.astype(jnp.float32))

        weights = {name: fixed[module][leaf] for name, (module, leaf) in taken.items()}
        return jax.value_and_grad(loss, (0, 1))(weights, x_TD)

    bank = {"router": P(), "w_in": specs["bank"]["w_in"], "w_out": specs["bank"]["w_out"]}
    return sharded(forward, rows), sharded(gradients, (P(), (bank, rows)))
