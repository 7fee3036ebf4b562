"""The MoE layer inside somebody else's Flax model, with `grad` taken outside.

The collectives' transposes are right only when grad is taken inside the shard_map. This wrapper
takes it there: its custom VJP runs `jax.vjp` in the forward's shard_map, hands the residuals out as
they are (each device its own), and pulls back and reduces in the backward's shard_map.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moejax.config import MoEConfig
from moejax.layer import MoEAux, MoELayer
from sharding.gradients import reduce_gradients
from sharding.mesh import AXES, EXPERT, TOKEN_AXES
from sharding.specs import specs_of

__all__ = ["ShardedMoELayer"]


class ShardedMoELayer(nnx.Module):
    """An expert-parallel MoE layer that can be called like any Flax module.

    Example:
        >>> mesh = make_mesh(MeshShape(data=2, expert=4))
        >>> moe = ShardedMoELayer(256, MoEConfig(), mesh=mesh, rngs=nnx.Rngs(0))
        >>> y, aux_loss, aux = moe(x)  # x: [..., 256], any sharding

    Args:
        d_model: D.
        config: router, experts and exchange.
        mesh: a mesh with the axes `data`, `expert` and `tensor` (`sharding.mesh.make_mesh`).
        rngs: source of the initial weights.
    """

    def __init__(self, d_model: int, config: MoEConfig, *, mesh: Mesh, rngs: nnx.Rngs) -> None:
        self.mesh = mesh
        self.layer = MoELayer(d_model, config, expert_devices=mesh.shape[EXPERT], rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, MoEAux]:
        """Applies the layer.

        Args:
            x: [..., D], any float dtype, also inside `jit`.

        Returns:
            [..., D] in x's dtype; the auxiliary loss, float32 [], coefficients included, to be
            added to yours; and the layer's report summed over the mesh (no gradient).
        """
        devices = self.mesh.shape["data"] * self.mesh.shape[EXPERT]
        flat_TD = x.reshape(-1, x.shape[-1])
        padding = -flat_TD.shape[0] % devices
        mask_T = jnp.arange(flat_TD.shape[0] + padding) < flat_TD.shape[0]
        flat_TD = jnp.pad(flat_TD, ((0, padding), (0, 0)))
        graph, params, rest = nnx.split(self.layer, nnx.Param, ...)  # type: ignore[misc]
        y_TD, loss, aux = _apply(self.mesh, graph, params, rest, flat_TD, mask_T)
        return y_TD[: y_TD.shape[0] - padding].reshape(x.shape), loss, aux


def _apply(mesh: Mesh, graph: Any, params: Any, rest: Any, x_TD: jax.Array, mask_T: jax.Array):
    specs, rest_specs = specs_of(params), specs_of(rest)
    tokens, every = P(TOKEN_AXES), P(AXES)

    def local(params, x_TD, rest, mask_T):
        layer = nnx.merge(graph, params, rest)
        y_TD, aux = layer(x_TD, token_mask_T=mask_T)
        return (y_TD, aux.losses.load_balance + aux.losses.z), aux

    def sharded(body, in_specs, out_specs):
        return jax.shard_map(
            body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def summed(out, aux):
        y_TD, loss = out
        return y_TD, lax.psum(loss, TOKEN_AXES), aux.over_devices()

    # All arrays come as arguments: what a custom VJP closes over would leak out of a remat or a
    # scan around it.
    def forward(params, x_TD, rest, mask_T):
        def body(params, x_TD, rest, mask_T):
            return summed(*local(params, x_TD, rest, mask_T))

        run = sharded(body, (specs, tokens, rest_specs, tokens), (tokens, P(), P()))
        return run(params, x_TD, rest, mask_T)

    def forward_keeping(params, x_TD, rest, mask_T):
        def body(params, x_TD, rest, mask_T):
            out, pull, aux = jax.vjp(
                lambda p, x: local(p, x, rest, mask_T), params, x_TD, has_aux=True
            )
            return summed(out, aux), jax.tree.map(lambda r: r[None], pull)

        run = sharded(body, (specs, tokens, rest_specs, tokens), ((tokens, P(), P()), every))
        return run(params, x_TD, rest, mask_T)

    def backward(pull, cts):
        y_ct, loss_ct, _ = cts

        def body(pull, y_ct, loss_ct):
            pull = jax.tree.map(lambda r: r[0], pull)
            params_ct, x_ct = pull((y_ct, loss_ct))
            return reduce_gradients(params_ct, specs), x_ct

        grads = sharded(body, (every, tokens, P()), (specs, tokens))(pull, y_ct, loss_ct)
        return (*grads, None, None)

    apply = jax.custom_vjp(forward)
    apply.defvjp(forward_keeping, backward)
    return apply(params, x_TD, rest, mask_T)
