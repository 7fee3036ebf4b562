"""The programs that `placement_layers.py` times: one MoE layer with a placement, on G devices.

All take (weights, placement, x_TD) or (weights, placement, x_TD, ct_TD), global arrays. `weights`:
`router` float32 [D, E], `w_in` bf16 [·, D, 2, H], `w_out` bf16 [·, H, D], the banks at home
[E, …] or in slots [G·S, …]. The placement is None where experts are computed at home.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layer_moejax import PATHS, layer_config
from layer_shapes import Shape

from moejax.config import ExchangeConfig
from moejax.layer import MoELayer
from moejax.placement.arrays import from_slots, slots_at_home
from moejax.placement.counting import count
from moejax.placement.migrate import migrate
from sharding.mesh import EXPERT, TOKEN_AXES

ROWS, SPLIT = P(TOKEN_AXES), P(EXPERT)
SPECS = {"router": P(), "w_in": SPLIT, "w_out": SPLIT}
SHARPNESS = 4.0
"""What the router multiplies the columns of a token by that say its choice."""


@dataclass(frozen=True)
class Where:
    """Where experts are computed.

    name: for rows.
    slots_P: int32 [G·S]; None: at home, without a placement.
    resident: weights lie in their slots; else copies are fetched from home in every call.
    most_replicas: R, of an expert.
    """

    name: str
    slots_P: np.ndarray | None
    resident: bool
    most_replicas: int = 1


def choosing(experts_NK: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Tokens [N, D] for which `router` chooses these experts; elsewhere standard normal.

    Of a token's first E columns the chosen ones lie between 1 and 2, in their order, the others
    below 1/2.
    """
    tokens = len(experts_NK)
    x_ND = rng.standard_normal((tokens, shape.d_model), np.float32)
    x_ND[:, : shape.experts] = rng.uniform(-0.5, 0.5, (tokens, shape.experts))
    value_K = np.linspace(2.0, 1.0, experts_NK.shape[1], dtype=np.float32)
    np.put_along_axis(x_ND, experts_NK.astype(np.int64), value_K[None], axis=1)
    return x_ND


def router(shape: Shape) -> np.ndarray:
    """float32 [D, E] that reads the first E columns."""
    return SHARPNESS * np.eye(shape.d_model, shape.experts, dtype=np.float32)


def make_layer(shape: Shape, mode: str, where: Where, devices: int) -> MoELayer:
    """Its structure, with shapes in the place of weights."""
    config = layer_config(shape.hidden, shape.experts, shape.top_k)
    config = replace(config, exchange=ExchangeConfig(mode=mode))  # type: ignore[arg-type]

    def make() -> MoELayer:
        layer = MoELayer(shape.d_model, config, expert_devices=devices, rngs=nnx.Rngs(params=0))
        if where.resident and where.slots_P is not None:
            layer.bank.make_resident(len(where.slots_P) // devices)  # type: ignore[union-attr]
        return layer

    return nnx.eval_shape(make)


def _layer(shape: Shape, mode: str, where: Where, mesh: Mesh, *, report: bool = False) -> Callable:
    layer = make_layer(shape, mode, where, mesh.shape[EXPERT])
    if report:
        layer.report_slots(shape.top_k)
    graph, template = nnx.split(layer)

    def call(weights: dict, placement: Any, x_TD: jax.Array) -> Any:
        pure = nnx.to_pure_dict(template)
        for name, value in weights.items():
            module, leaf = PATHS[name]
            pure[module][leaf] = value
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, pure)
        return nnx.merge(graph, state)(x_TD, placement)

    return call


def sharded(body: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def forward(shape: Shape, mode: str, where: Where, mesh: Mesh) -> Callable:
    """(weights, placement, x_TD) → (y_TD, slots_TK that serve them, report of all devices)."""
    layer = _layer(shape, mode, where, mesh, report=True)

    def body(weights: dict, placement: Any, x_TD: jax.Array) -> Any:
        y_TD, aux = layer(weights, placement, x_TD)
        return y_TD, aux.slots_TK, replace(aux, slots_TK=None).over_devices()

    return sharded(body, mesh, (SPECS, P(), ROWS), (ROWS, ROWS, P()))


def timed(shape: Shape, mode: str, where: Where, mesh: Mesh, *, backward: bool) -> Callable:
    """(weights, placement, x_TD[, ct_TD]) → y_TD, or Σ y·ct and its gradients."""
    layer = _layer(shape, mode, where, mesh)

    def plain(weights: dict, placement: Any, x_TD: jax.Array) -> jax.Array:
        return layer(weights, placement, x_TD)[0]

    if not backward:
        return sharded(plain, mesh, (SPECS, P(), ROWS), ROWS)

    def gradients(weights: dict, placement: Any, x_TD: jax.Array, ct_TD: jax.Array) -> Any:
        def loss(weights: dict, x_TD: jax.Array) -> jax.Array:
            # As behind a loss: nothing of the backward begins before the forward has ended.
            y_TD, after_TD = lax.optimization_barrier((plain(weights, placement, x_TD), ct_TD))
            return jnp.sum(y_TD.astype(jnp.float32) * after_TD.astype(jnp.float32))

        found, x_ct_TD = jax.grad(loss, (0, 1))(weights, x_TD)
        found["router"] = found["router"][None]
        return found, x_ct_TD

    out = ({"router": ROWS, "w_in": SPLIT, "w_out": SPLIT}, ROWS)
    return sharded(gradients, mesh, (SPECS, P(), ROWS, ROWS), out)


def moving(mesh: Mesh) -> Callable:
    """(banks, old_P, new_P) → the banks in their new slots; the old ones are given up."""
    body = sharded(migrate, mesh, (SPLIT, P(), P()), SPLIT)
    return jax.jit(body, donate_argnums=0)


def counting(shape: Shape, mesh: Mesh) -> Callable:
    """experts_TK → each device's counts of them, of one layer."""

    def body(experts_TK: jax.Array) -> Any:
        found = count(experts_TK[None], shape.experts)
        return jax.tree.map(lambda a: a[None], found)

    return sharded(body, mesh, ROWS, ROWS)


class Weights:
    """Random experts at home, in bf16, and the same in any slots."""

    def __init__(self, shape: Shape, mesh: Mesh):
        self._shape, self._mesh, self._move = shape, mesh, moving(mesh)
        self.router = jax.device_put(router(shape), NamedSharding(mesh, P()))
        wide = (shape.d_model, 2, shape.hidden), (shape.hidden, shape.d_model)
        self._home = tuple(
            self._normal(seed, size, size[0]) for seed, size in enumerate(wide, start=1)
        )

    def of(self, where: Where) -> dict[str, jax.Array]:
        """What the programs of a placement take."""
        banks = self._home
        if where.resident and where.slots_P is not None:
            banks = self.in_slots(where.slots_P)
        return {"router": self.router, "w_in": banks[0], "w_out": banks[1]}

    def in_slots(self, slots_P: np.ndarray) -> tuple[jax.Array, ...]:
        """The banks [G·S, …], each expert in its slots."""
        devices = self._mesh.shape[EXPERT]
        slots = len(slots_P) // devices
        at_home = slots_at_home(self._shape.experts, devices, slots)

        def widened(bank: jax.Array) -> jax.Array:
            missing = [(0, slots - bank.shape[0]), *[(0, 0)] * (bank.ndim - 1)]
            return jnp.pad(bank, missing)

        widen = jax.jit(sharded(widened, self._mesh, SPLIT, SPLIT))
        wide = tuple(widen(bank) for bank in self._home)
        return self._move(wide, at_home, slots_P.astype(np.int32))

    def placement(self, where: Where) -> Any:
        """The arrays."""
        if where.slots_P is None:
            return None
        put = NamedSharding(self._mesh, P())
        arrays = from_slots(where.slots_P, self._shape.experts, where.most_replicas)
        return jax.device_put(arrays, put)

    def _normal(self, seed: int, size: tuple[int, ...], fan_in: int) -> jax.Array:
        """Drawn where it lives, one expert at a time: the float32 draw is large."""

        def draw(key: jax.Array) -> jax.Array:
            return (jax.random.normal(key, size, jnp.float32) * fan_in**-0.5).astype(jnp.bfloat16)

        def body(keys: jax.Array) -> jax.Array:
            return lax.map(draw, keys)

        keys = jax.random.split(jax.random.key(seed), self._shape.experts)
        return jax.jit(sharded(body, self._mesh, SPLIT, SPLIT))(keys)
