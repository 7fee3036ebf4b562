"""The key-value cache of generation, one row a text, rows of any length."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.model.groups import layer_groups
from sharding.mesh import DATA, EXPERT, TENSOR, TOKEN_AXES

__all__ = ["KVCache", "LayerCache", "cache_specs", "init_cache"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (rotated) and values of one layer; scanned layers add a leading dimension.

    k_BLMh, v_BLMh: [B, M, num_kv_heads, h]; M positions, of which the first `lengths` of a row
        are filled. Inside the shard_map B and the heads are this device's.
    """

    k_BLMh: jax.Array
    v_BLMh: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The caches of all layers by layer group, and how many positions of a row are filled.

    layers: from `LayerGroup.name`.
    lengths_B: int32 [B], tokens.
    """

    layers: dict[str, LayerCache]
    lengths_B: jax.Array

    @property
    def max_len(self) -> int:
        """Positions M of a row. Writes beyond are dropped: the caller stops before."""
        return next(iter(self.layers.values())).k_BLMh.shape[-3]


def cache_specs(config: ModelConfig) -> KVCache:
    """The PartitionSpecs of a cache, for `in_specs` and `out_specs` of the shard_map."""
    layers = {}
    for group in layer_groups(config):
        spec = P(TOKEN_AXES, None, TENSOR, None)
        spec = P(None, *spec) if group.scanned else spec
        layers[group.name] = LayerCache(spec, spec)  # type: ignore[arg-type]
    return KVCache(layers, P(TOKEN_AXES))  # type: ignore[arg-type]


def init_cache(
    config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype, mesh: Mesh
) -> KVCache:
    """An empty cache of global shape, laid over the mesh.

    Args:
        config: the model.
        batch: rows B of all devices together, a multiple of data × expert.
        max_len: positions M of a row, in tokens.
        dtype: of keys and values; the compute dtype is exact.
        mesh: rows go over `data` × `expert`, heads over `tensor`.

    Raises:
        UserError: the rows do not divide, or the context is longer than the model's.
    """
    share = mesh.shape[DATA] * mesh.shape[EXPERT]
    if batch % share:
        raise UserError(
            f"batch={batch}: a cache needs a multiple of data×expert={share} rows; add empty rows"
        )
    if not 1 <= max_len <= config.max_context:
        raise UserError(
            f"max_len={max_len}: must lie between 1 and max_context={config.max_context}"
        )
    specs = cache_specs(config)
    row = (max_len, config.attention.num_kv_heads, config.attention.head_dim)
    layers = {}
    for group in layer_groups(config):
        shape = (group.size, batch, *row) if group.scanned else (batch, *row)
        sharding = NamedSharding(mesh, specs.layers[group.name].k_BLMh)  # type: ignore[arg-type]
        layers[group.name] = LayerCache(
            jnp.zeros(shape, dtype, device=sharding), jnp.zeros(shape, dtype, device=sharding)
        )
    lengths_B = jnp.zeros(batch, jnp.int32, device=NamedSharding(mesh, P(TOKEN_AXES)))
    return KVCache(layers, lengths_B)
