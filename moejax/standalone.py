"""The MoE layer inside somebody else's Flax model, with `grad` taken outside.

The collectives' transposes are right only when grad is taken inside the shard_map. This wrapper
takes it there: its custom VJP runs `jax.vjp` in the forward's shard_map, hands the residuals out as
they are (each device its own), and pulls back and reduces in the backward's shard_map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moejax.config import MoEConfig
from moejax.errors import UserError
from moejax.layer import MoELayer
from moejax.moe_aux import MoEAux
from moejax.placement.arrays import Placement
from moejax.routing.bias import update_bias
from pallas_kernels.tuning.lookup import trace_context
from sharding.collectives import psum_statistics
from sharding.gradients import reduce_gradients
from sharding.mesh import AXES, EXPERT, TOKEN_AXES
from sharding.specs import shardings_of, specs_of

__all__ = ["ShardedMoELayer"]


class ShardedMoELayer(nnx.Module):
    """An expert-parallel MoE layer that can be called like any Flax module.

    Every parameter is made on the devices that hold it, so the layer may be larger than the memory
    of one.

    Example:
        >>> mesh = make_mesh(MeshShape(data=2, expert=4))
        >>> moe = ShardedMoELayer(256, MoEConfig(), mesh=mesh, rngs=nnx.Rngs(0))
        >>> y, aux_loss, aux = moe(x)  # x: [..., 256], any sharding

    Args:
        d_model: D.
        config: router, experts and exchange.
        mesh: a mesh with the axes `data`, `expert` and `tensor` (`sharding.mesh.make_mesh`).
        rngs: the stream `params` gives one key, from which all initial weights are drawn.

    Raises:
        UserError: the mesh has other axes, or more devices along `expert` than there are experts.
    """

    def __init__(self, d_model: int, config: MoEConfig, *, mesh: Mesh, rngs: nnx.Rngs) -> None:
        if set(mesh.axis_names) != set(AXES):
            raise UserError(
                f"mesh with axes {', '.join(map(str, mesh.axis_names))}: must have exactly "
                f"{', '.join(AXES)}; make it with sharding.mesh.make_mesh"
            )
        self.mesh = mesh
        self.d_model = d_model
        graph, make = _initializer(d_model, config, mesh)
        self.layer = nnx.merge(graph, make(rngs.params()))

    def __call__(
        self,
        x: jax.Array,
        placement: Placement | None = None,
        token_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, MoEAux]:
        """Applies the layer.

        Args:
            x: [..., D], any float dtype, also inside `jit`; there may be no tokens at all.
            placement: where copies of the experts live; None: at home, contiguous.
            token_mask: bool [...], False for padding: such tokens are not routed and count
                nowhere; only the shared experts see them.

        Returns:
            [..., D] in x's dtype; the auxiliary loss, float32 [], coefficients included, to be
            added to yours; and the layer's report summed over the mesh (no gradient).

        Raises:
            UserError: x, the placement or the mask does not fit the layer.
        """
        self._check(x, placement, token_mask)
        tokens, devices = math.prod(x.shape[:-1]), self.mesh.shape["data"] * self.mesh.shape[EXPERT]
        # Each device gets at least one row: an exchange of nothing has no shape.
        padding = max(devices, -(-tokens // devices) * devices) - tokens
        mask_T = jnp.ones(tokens, bool) if token_mask is None else token_mask.reshape(-1)
        mask_T = jnp.pad(mask_T, (0, padding))
        x_TD = jnp.pad(x.reshape(tokens, self.d_model), ((0, padding), (0, 0)))
        graph, params, rest = nnx.split(self.layer, nnx.Param, ...)  # type: ignore[misc]
        context, rest = trace_context(), (rest, mask_T, placement)
        y_TD, loss, aux = _apply(self.mesh, graph, context, params, x_TD, rest)
        return y_TD[:tokens].reshape(x.shape), loss, aux

    def update_bias(self, aux: MoEAux) -> None:
        """Moves the selection bias towards equal loads, once a training step.

        Args:
            aux: what the step's call returned; for several calls, their `counts_E` added up.

        Raises:
            UserError: the router has no selection bias, or its experts are merged.
        """
        router = self.layer.router
        if router.table_R is not None:
            raise UserError(
                f"update_bias with merged_from={router.config.merged_from}: loads are counted by "
                "experts, the biases are of outputs; leave the call out"
            )
        if router.selection_bias_E is None:
            raise UserError(
                "update_bias with selection_bias=False: the router has no bias to move; set "
                "RouterConfig(selection_bias=True, bias_update_rate=…)"
            )
        rate = router.config.bias_update_rate
        bias_E = update_bias(router.selection_bias_E.get_value(), aux.counts_E, rate)
        router.selection_bias_E.set_value(bias_E)

    def _check(self, x: Any, placement: Placement | None, token_mask: Any) -> None:
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise UserError(
                f"input of shape {x.shape}: its last dimension must be d_model={self.d_model}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(
                f"input of dtype {x.dtype}: the layer takes float activations, such as float32 or "
                "bfloat16; embed or cast it first"
            )
        if token_mask is not None and (
            token_mask.shape != x.shape[:-1] or token_mask.dtype != jnp.bool_
        ):
            raise UserError(
                f"token_mask {token_mask.dtype}{list(token_mask.shape)}: must be "
                f"bool{list(x.shape[:-1])}, True for the tokens of x that count"
            )
        if placement is not None:
            experts, devices = self.layer.config.router.num_experts, self.mesh.shape[EXPERT]
            placed, slots = placement.replica_count_E.shape[0], placement.slot_expert_P.shape[0]
            if placed != experts or slots % devices:
                raise UserError(
                    f"placement of {placed} experts in {slots} slots: must have "
                    f"num_experts={experts} and a multiple of expert={devices} devices"
                )


@lru_cache(maxsize=32)
def _initializer(
    d_model: int, config: MoEConfig, mesh: Mesh
) -> tuple[Any, Callable[[jax.Array], nnx.State]]:
    """The layer's graph, and a compiled `key → state` laid over the mesh; once for equal layers."""

    def build(key: jax.Array) -> MoELayer:
        rngs = nnx.Rngs(params=key)
        return MoELayer(d_model, config, expert_devices=mesh.shape[EXPERT], rngs=rngs)

    graph, state = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    make = jax.jit(lambda key: nnx.state(build(key)), out_shardings=shardings_of(state, mesh))
    return graph, make


@partial(jax.jit, static_argnums=(0, 1, 2))  # else a call outside of jit compiles each operation
def _apply(mesh: Mesh, graph: Any, context: Hashable, params: Any, x_TD: jax.Array, rest: tuple):
    """Output, loss and report; `rest`: other variables, token mask and placement."""
    del context  # another one is another trace
    specs = specs_of(params)
    tokens, every = P(TOKEN_AXES), P(AXES)
    in_specs = (specs, tokens, (specs_of(rest[0]), tokens, P()))

    def local(params, x_TD, rest):
        variables, mask_T, placement = rest
        layer = nnx.merge(graph, params, variables)
        y_TD, aux = layer(x_TD, placement, token_mask_T=mask_T)
        return (y_TD, aux.losses.total), aux

    def sharded(body, in_specs, out_specs):
        return jax.shard_map(
            body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def summed(out, aux):
        y_TD, loss = out
        return y_TD, psum_statistics(loss, TOKEN_AXES), aux.over_devices()

    # All arrays come as arguments: what a custom VJP closes over would leak out of a remat or a
    # scan around it.
    def forward(params, x_TD, rest):
        def body(params, x_TD, rest):
            return summed(*local(params, x_TD, rest))

        return sharded(body, in_specs, (tokens, P(), P()))(params, x_TD, rest)

    def forward_keeping(params, x_TD, rest):
        def body(params, x_TD, rest):
            out, pull, aux = jax.vjp(lambda p, x: local(p, x, rest), params, x_TD, has_aux=True)
            return summed(out, aux), jax.tree.map(lambda r: r[None], pull)

        return sharded(body, in_specs, ((tokens, P(), P()), every))(params, x_TD, rest)

    def backward(pull, cts):
        y_ct, loss_ct, _ = cts

        def body(pull, y_ct, loss_ct):
            pull = jax.tree.map(lambda r: r[0], pull)
            params_ct, x_ct = pull((y_ct, loss_ct))
            return reduce_gradients(params_ct, specs), x_ct

        grads = sharded(body, (every, tokens, P()), (specs, tokens))(pull, y_ct, loss_ct)
        return (*grads, None)

    apply = jax.custom_vjp(forward)
    apply.defvjp(forward_keeping, backward)
    return apply(params, x_TD, rest)
