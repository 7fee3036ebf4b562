"""One decoder layer: attention, then experts or a dense MLP, each on a normalised residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
from flax import nnx

from moejax.config import LayerConfig
from moejax.layer import MoELayer
from moejax.model.attention import Attention, Implementation
from moejax.model.cache import LayerCache
from moejax.model.initializers import residual_std
from moejax.model.latent_attention import LatentAttention
from moejax.model.mlp import DenseMLP
from moejax.model.norm import RMSNorm

if TYPE_CHECKING:
    from moejax.moe_aux import MoEAux
    from moejax.placement.arrays import Placement

__all__ = ["Block"]


class Block(nnx.Module):
    """Pre-norm residual layer; has `moe` or `mlp`, as its config says."""

    def __init__(
        self,
        layer: LayerConfig,
        *,
        num_layers: int,
        expert_devices: int,
        hosts: Sequence[int] | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        """Draws the weights.

        Args:
            layer: the layer.
            num_layers: depth L of the model, for the scale of products into the residual.
            expert_devices: size of the mesh axis `expert`.
            hosts: of the devices along `expert`, see `MoELayer`.
            implementation: of attention, see `Attention`.
            rngs: the stream `params` is drawn from.
        """
        std = residual_std(num_layers)
        self.attention_norm = RMSNorm(layer.d_model, layer.norm_eps)
        attention = Attention if layer.attention.latent is None else LatentAttention
        self.attention = attention(
            layer.d_model,
            layer.attention,
            norm_eps=layer.norm_eps,
            output_std=std,
            implementation=implementation,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(layer.d_model, layer.norm_eps)
        self.moe = (
            None
            if layer.moe is None
            else MoELayer(
                layer.d_model,
                layer.moe,
                expert_devices=expert_devices,
                output_std=std,
                hosts=hosts,
                rngs=rngs,
            )
        )
        self.mlp = (
            None
            if layer.dense is None
            else DenseMLP(layer.d_model, layer.dense, output_std=std, rngs=rngs)
        )

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        placement: Placement | None = None,
        *,
        token_mask_BS: jax.Array | None = None,
        cache: LayerCache | None = None,
        lengths_B: jax.Array | None = None,
        tables_BN: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEAux | None, LayerCache | None]:
        """Runs the layer inside the shard_map.

        Args:
            x_BSD: [B, S, D] in the compute dtype.
            positions_BS: int32 [B, S].
            placement: of this layer's experts; None for the contiguous one.
            token_mask_BS: bool [B, S], False for padding, which no expert sees.
            cache: this layer's keys and values.
            lengths_B: int32 [B], positions of a row that are filled; None: none are.
            tables_BN: int32 [B, N], its pages, see `KVCache`; required with the cache.

        Returns:
            [B, S, D], the experts' statistics (None for a dense layer), the new cache or None.
        """
        x_BSD, y_TD, cache = self.attend(
            x_BSD, positions_BS, cache=cache, lengths_B=lengths_B, tables_BN=tables_BN
        )
        aux = None
        if self.moe is not None:
            mask_T = None if token_mask_BS is None else token_mask_BS.reshape(-1)
            y_TD, aux = self.moe(y_TD, placement, token_mask_T=mask_T)
        else:
            assert self.mlp is not None
            y_TD = self.mlp(y_TD)
        return x_BSD + y_TD.reshape(x_BSD.shape), aux, cache

    def attend(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        *,
        cache: LayerCache | None = None,
        lengths_B: jax.Array | None = None,
        tables_BN: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, LayerCache | None]:
        """The first half of the layer, up to what the experts, or the MLP, are given.

        Args:
            x_BSD, positions_BS, cache, lengths_B, tables_BN: as for a call.

        Returns:
            [B, S, D], to which the second half adds; its normalised tokens [B · S, D]; the new
            cache or None.
        """
        x_BSD, y_BSD = self.attention_norm.branch(x_BSD)
        y_BSD, cache = self.attention(
            y_BSD,
            positions_BS,
            cache=cache,
            lengths_B=lengths_B,
            tables_BN=tables_BN,
        )
        x_BSD, y_BSD = self.mlp_norm.branch(x_BSD, y_BSD)
        return x_BSD, y_BSD.reshape(-1, x_BSD.shape[-1]), cache
