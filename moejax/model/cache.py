"""The key-value cache of generation: pages of positions, and each text's table of pages.

PagedAttention, arXiv 2309.06180 §4. Texts of any lengths share one store, a page may serve several
texts that begin alike, and nothing is moved when a text grows.

Shape letters: P pages of this device, L positions of a page, M key-value heads, h width of one;
B rows (texts) of this device, N pages of a row's table.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import AttentionConfig, ModelConfig
from moejax.errors import UserError
from moejax.model.groups import layer_groups
from sharding.mesh import DATA, EXPERT, TENSOR, TOKEN_AXES

__all__ = [
    "KVCache",
    "LayerCache",
    "cache_specs",
    "init_cache",
    "init_pages",
    "page_specs",
    "position_shape",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (rotated) and values of one layer; of scanned layers [M, layers, P, L, h].

    The heads come first, as the kernels take them (`pallas_kernels.paged_attention`), and the
    layers before the pages, so that the pages of all layers are one store without moving any.

    k_MPLh, v_MPLh: [num_kv_heads, P, L, h]. Outside the shard_map P counts the pages of all
        devices and the heads are all heads.
    v_MPLh: None where the keys are all there is: latent attention caches [1, P, L, rank +
        rope_dim], the normalised latent and the rotated part of the key, the same for all heads.
    """

    k_MPLh: jax.Array
    v_MPLh: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The pages of all layers by layer group, and which of them hold which text.

    layers: from `LayerGroup.name`.
    lengths_B: int32 [B], tokens of a row so far. None: all rows begin, which programs know when
        they are compiled; tokens then attend to the call's own alone.
    tables_BN: int32 [B, N], page n of a row holds its positions n·L up to (n+1)·L. Ids count from
        0 on each device; -1, or P and above, is no page: writes there are dropped, reads masked.
        All layers use the same. Whoever makes the tables sees to it that no page that is written
        to, which are those from position lengths_B on, is in two rows.
    """

    layers: dict[str, LayerCache]
    lengths_B: jax.Array | None
    tables_BN: jax.Array

    @property
    def max_len(self) -> int:
        """Positions N·L of a row. Writes beyond are dropped: the caller stops before."""
        return self.tables_BN.shape[1] * next(iter(self.layers.values())).k_MPLh.shape[-2]


def page_specs(config: ModelConfig) -> dict[str, LayerCache]:
    """The PartitionSpecs of `KVCache.layers`, for `in_specs` and `out_specs` of the shard_map."""
    layers = {}
    for group in layer_groups(config):
        latent = group.layer.attention.latent is not None
        heads, pages = None if latent else TENSOR, (TOKEN_AXES, None, None)
        spec = P(heads, None, *pages) if group.scanned else P(heads, *pages)
        layers[group.name] = LayerCache(spec, None if latent else spec)  # type: ignore[arg-type]
    return layers


def cache_specs(config: ModelConfig) -> KVCache:
    """The PartitionSpecs of a cache, for `in_specs` and `out_specs` of the shard_map."""
    return KVCache(page_specs(config), P(TOKEN_AXES), P(TOKEN_AXES, None))  # type: ignore[arg-type]


def init_pages(
    config: ModelConfig, pages: int, page_len: int, dtype: jnp.dtype, mesh: Mesh
) -> dict[str, LayerCache]:
    """Empty pages of global shape, laid over the mesh.

    Args:
        config: the model.
        pages: of all devices together, a multiple of data × expert.
        page_len: positions L of a page, in tokens.
        dtype: of keys and values; the compute dtype is exact.
        mesh: pages go over `data` × `expert`, heads over `tensor`; latents are on every device
            along `tensor`.

    Raises:
        UserError: the pages do not divide, or are empty.
    """
    share = _token_devices(mesh)
    if pages < 1 or pages % share:
        raise UserError(
            f"pages={pages}: must be a positive multiple of data×expert={share}; round it up"
        )
    if page_len < 1:
        raise UserError(f"page_len={page_len}: a page holds at least 1 token")
    specs = page_specs(config)
    layers = {}
    for group in layer_groups(config):
        heads, width = position_shape(group.layer.attention)
        store = (group.size, pages) if group.scanned else (pages,)
        shape = (heads, *store, page_len, width)
        layers[group.name] = jax.tree.map(
            lambda spec, shape=shape: jnp.zeros(shape, dtype, device=NamedSharding(mesh, spec)),
            specs[group.name],
        )
    return layers


def init_cache(
    config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype, mesh: Mesh
) -> KVCache:
    """An empty cache in which every row has one page of its own, for texts that run together.

    Args:
        config: the model.
        batch: rows B of all devices together, a multiple of data × expert.
        max_len: positions of a row, in tokens.
        dtype: of keys and values; the compute dtype is exact.
        mesh: rows go over `data` × `expert`, heads over `tensor`.

    Raises:
        UserError: the rows do not divide, or the context is longer than the model's.
    """
    share = _token_devices(mesh)
    if batch % share:
        raise UserError(
            f"batch={batch}: a cache needs a multiple of data×expert={share} rows; add empty rows"
        )
    if not 1 <= max_len <= config.max_context:
        raise UserError(
            f"max_len={max_len}: must lie between 1 and max_context={config.max_context}"
        )
    layers = init_pages(config, batch, max_len, dtype, mesh)
    lengths_B = jnp.zeros(batch, jnp.int32, device=NamedSharding(mesh, P(TOKEN_AXES)))
    own_BN = np.tile(np.arange(batch // share, dtype=np.int32), share)[:, None]
    tables_BN = jax.device_put(own_BN, NamedSharding(mesh, P(TOKEN_AXES, None)))
    return KVCache(layers, lengths_B, tables_BN)


def _token_devices(mesh: Mesh) -> int:
    return mesh.shape[DATA] * mesh.shape[EXPERT]


def position_shape(config: AttentionConfig) -> tuple[int, int]:
    """Heads and width of what is kept of a position, twice but for latents."""
    if config.latent is not None:
        return 1, config.latent.rank + config.latent.rope_dim
    return config.num_kv_heads, config.head_dim
