"""The programs that `ep_layer.py` times: the library's layer over G devices, and its peer.

All take (weights, routing, x_TD) or (weights, routing, x_TD, ct_TD), global arrays: tokens split
over the devices, experts, too. `weights`: `router` float32 [D, E], `w_in` bf16 [E, D, 2, H],
`w_out` bf16 [E, H, D]. Forward gives y_TD; with backward it is Σ y·ct of each device's tokens, and
gradients of the weights and of x. The router's gradient stays one term a device, [G, D, E]:
training adds the terms up once a step, together with those of all other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from ep_alone import PARTS, left_in, weighted_copy
from ep_shapes import PEER, Inputs, Variant
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layer_moejax import PATHS, layer_config
from layer_shapes import Shape

from moejax.config import ExchangeConfig, MoEConfig, WireConfig
from moejax.exchange.wire import row_bytes
from moejax.layer import MoELayer
from pallas_kernels.exchange import push
from sharding import collectives
from sharding.mesh import EXPERT, TOKEN_AXES
from sharding.specs import specs_of
from sharding.traffic import collectives_of

ROWS = P(TOKEN_AXES)
SPECS = {"router": P(), "w_in": P(EXPERT), "w_out": P(EXPERT)}
OUTPUTS = {"router": ROWS, "w_in": P(EXPERT), "w_out": P(EXPERT)}


def moe_config(shape: Shape, variant: Variant) -> MoEConfig:
    """The layer: `layer_moejax`'s, with a bias of the logits and the variant's exchange."""
    config = layer_config(shape.hidden, shape.experts, shape.top_k)
    wire = WireConfig()
    if variant.wire != "exact":
        wire = WireConfig(*[variant.wire] * 4)  # type: ignore[list-item]
    exchange = ExchangeConfig(
        mode=variant.mode,  # type: ignore[arg-type]
        chunks=variant.chunks,
        wire=wire,
        bucket_slack=variant.slack,
        reserve_sms=variant.reserve_sms,
    )
    return replace(config, router=replace(config.router, bias=True), exchange=exchange)


def pushed_bytes(shape: Shape, variant: Variant) -> int:
    """Of a row, all ways, where kernels send it, which a traced program does not count."""
    if push.refusal("mosaic_gpu") is not None:
        return 0
    sizes = row_bytes(shape.d_model, "bfloat16", 0, moe_config(shape, variant).exchange.wire)
    return sum(sizes[: 4 if variant.backward else 2])


def make_layer(shape: Shape, variant: Variant, devices: int) -> MoELayer:
    """Its structure, with shapes in the place of weights."""
    config = moe_config(shape, variant)

    def make() -> MoELayer:
        return MoELayer(shape.d_model, config, expert_devices=devices, rngs=nnx.Rngs(params=0))

    return nnx.eval_shape(make)


def _ours(shape: Shape, variant: Variant, mesh: Mesh) -> tuple[Callable, Any]:
    """(weights, routing, x_TD) → (y_TD, report) inside the shard_map; specs of the routing."""
    graph, template = nnx.split(make_layer(shape, variant, mesh.shape[EXPERT]))
    assert specs_of(template)["bank"]["w_out"][0] == EXPERT

    def call(weights: dict, routing: dict, x_TD: jax.Array) -> tuple[jax.Array, Any]:
        pure = nnx.to_pure_dict(template)
        for name, value in {**weights, **routing}.items():
            module, leaf = PATHS[name]
            pure[module][leaf] = value
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, pure)
        return nnx.merge(graph, state)(x_TD)

    return call, {"bias": P()}


def _peer(shape: Shape, part: str) -> tuple[Callable, Any]:
    """The exchange that a JAX user writes: sort, buckets of K copies a token, batched products.

    The routing is given, and even, so that all sizes are known: no router, nothing is dropped.
    """
    top_k, experts = shape.top_k, PARTS[part][1]

    def call(weights: dict, routing: dict, x_TD: jax.Array) -> tuple[jax.Array, None]:
        w_in, w_out = weights["w_in"], weights["w_out"]
        slots, d_model = w_in.shape[:2]
        devices = collectives.axis_size(EXPERT)
        scores_TK = routing["scores"]
        order_A = jnp.argsort(routing["ids"].reshape(-1))
        sent = x_TD[order_A // top_k].reshape(devices, -1, d_model)
        got = collectives.all_to_all(sent, EXPERT).reshape(devices, slots, -1, d_model)
        rows_SCD = got.swapaxes(0, 1).reshape(slots, -1, d_model)
        if experts:
            flat = w_in.reshape(slots, d_model, -1)
            h_SCF = jnp.einsum("scd,sdf->scf", rows_SCD, flat)
            gate, up = jnp.split(h_SCF, 2, axis=-1)
            y_SCD = jnp.einsum("sch,shd->scd", jax.nn.silu(gate) * up, w_out)
        else:
            ones = jnp.ones(rows_SCD.shape[0] * rows_SCD.shape[1], jnp.float32)
            y_SCD = weighted_copy(rows_SCD.reshape(-1, d_model), ones).reshape(rows_SCD.shape)
        back = y_SCD.reshape(slots, devices, -1, d_model).swapaxes(0, 1)
        y_AD = collectives.all_to_all(back.reshape(sent.shape), EXPERT).reshape(-1, d_model)
        y_TKD = y_AD[jnp.argsort(order_A)].reshape(*scores_TK.shape, d_model)
        y_TD = jnp.sum(y_TKD.astype(jnp.float32) * scores_TK[..., None], axis=1)
        return y_TD.astype(x_TD.dtype), None

    return call, {"ids": ROWS, "scores": ROWS}


def build(shape: Shape, variant: Variant, part: str, mesh: Mesh) -> Callable:
    """The function to compile; trace it within `left_out(part)`."""
    layer, routing_specs = (
        _peer(shape, part) if variant.impl == PEER else _ours(shape, variant, mesh)
    )
    # Without experts their weights have no gradient, and no zeros need be written.
    names = [name for name in SPECS if PARTS[part][1] or name == "router"]
    if variant.impl == PEER:
        names.remove("router")

    def forward(weights: dict, routing: dict, x_TD: jax.Array) -> jax.Array:
        return layer(weights, routing, x_TD)[0]

    def gradients(weights: dict, routing: dict, x_TD: jax.Array, ct_TD: jax.Array) -> Any:
        def loss(taken: dict, x_TD: jax.Array) -> jax.Array:
            y_TD = forward({**weights, **taken}, routing, x_TD)
            # As behind a loss: nothing of the backward begins before the forward has ended.
            y_TD, after_TD = lax.optimization_barrier((y_TD, ct_TD))
            return jnp.sum(y_TD.astype(jnp.float32) * after_TD.astype(jnp.float32))

        share, (found, x_ct_TD) = jax.value_and_grad(loss, (0, 1))(
            {name: weights[name] for name in names}, x_TD
        )
        if "router" in found:
            found["router"] = found["router"][None]
        return share[None], found, x_ct_TD

    specs = (SPECS, routing_specs, ROWS)
    if variant.backward:
        out = (ROWS, {name: OUTPUTS[name] for name in names}, ROWS)
        return _sharded(gradients, mesh, (*specs, ROWS), out)
    return _sharded(forward, mesh, specs, ROWS)


def build_report(shape: Shape, variant: Variant, mesh: Mesh) -> Callable:
    """(weights, routing, x_TD) → what the layer reports, of all devices together."""
    layer, routing_specs = _ours(shape, variant, mesh)

    def report(weights: dict, routing: dict, x_TD: jax.Array) -> Any:
        aux = layer(weights, routing, x_TD)[1]
        return aux.over_devices()

    return _sharded(report, mesh, (SPECS, routing_specs, ROWS), P())


def _sharded(body: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@dataclass(frozen=True)
class Lowered:
    """A traced program, to be compiled with any options.

    sent: bytes a device sends in a call with one wave.
    further: bytes of each further wave.
    """

    lowered: Any
    sent: float
    further: float


def lower(shape: Shape, variant: Variant, part: str, mesh: Mesh, arguments: tuple) -> Lowered:
    """Traces and lowers a program within `left_out(part)`, and counts what it sends.

    Raises:
        ArithmeticError: it does not send what its part says.
    """
    traced = jax.jit(build(shape, variant, part, mesh)).trace(*arguments)
    crossings = collectives_of(traced.jaxpr, mesh.shape)
    sent = sum(c.sent for c in crossings if not c.extra)
    further = sum(c.sent for c in crossings if c.extra)
    left_in(part, sent + further)
    return Lowered(traced.lower(), sent, further)


class Arrays:
    """A shape's arrays on the devices."""

    def __init__(self, shape: Shape, inputs: Inputs, mesh: Mesh) -> None:
        self.mesh = mesh
        self.x_TD, self.ct_TD = (
            self._put(a.astype(jnp.bfloat16), ROWS) for a in (inputs.x_TD, inputs.ct_TD)
        )
        experts, d_model, hidden = shape.experts, shape.d_model, shape.hidden
        self.weights = {
            "router": self._put(inputs.router_DE, P()),
            "w_in": self._normal(1, (experts, d_model, 2, hidden), d_model),
            "w_out": self._normal(2, (experts, hidden, d_model), hidden),
        }
        self.bias = {name: {"bias": self._put(b, P())} for name, b in inputs.bias_E.items()}
        self.even = {
            "ids": self._put(inputs.ids_TK, ROWS),
            "scores": self._put(inputs.scores_TK, ROWS),
        }

    def arguments(self, variant: Variant, routing: str) -> tuple:
        """What the variant's programs take; the peer's routing is always even."""
        given = self.even if variant.impl == PEER else self.bias[routing]
        cts = (self.ct_TD,) if variant.backward else ()
        return (self.weights, given, self.x_TD, *cts)

    def _put(self, array: np.ndarray, spec: P) -> jax.Array:
        return jax.device_put(array, NamedSharding(self.mesh, spec))

    def _normal(self, seed: int, size: tuple[int, ...], fan_in: int) -> jax.Array:
        """Bf16, drawn where it lives, one expert at a time: the float32 draw is large."""

        def draw(key: jax.Array) -> jax.Array:
            value = jax.random.normal(key, size[1:], jnp.float32)
            return (value * fan_in**-0.5).astype(jnp.bfloat16)

        def body(keys: jax.Array) -> jax.Array:
            return jax.lax.map(draw, keys)

        keys = jax.random.split(jax.random.key(seed), size[0])
        return jax.jit(_sharded(body, self.mesh, P(EXPERT), P(EXPERT)))(keys)
