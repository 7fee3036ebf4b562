"""The decoder-only language model: embedding, layers, final norm, head."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.model.attention import Implementation
from moejax.model.block import Block
from moejax.model.cache import KVCache, LayerCache
from moejax.model.cached_attention import flatten_layers, layer_tables
from moejax.model.embedding import Embedding, Head, vocabulary_logits
from moejax.model.groups import LayerGroup, layer_groups, stack_states
from moejax.model.loss import hidden_nll, summed_nll
from moejax.model.norm import RMSNorm
from pallas_kernels.exchange.received import RECEIVED
from pallas_kernels.tuning.lookup import trace_context
from sharding.mesh import MeshShape

if TYPE_CHECKING:
    from moejax.moe_aux import MoEAux
    from moejax.placement.arrays import Placement

__all__ = ["Decoder", "DecoderOutput", "check_mesh"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass returns.

    hidden_BSD: after the final norm, compute dtype; `Decoder.logits` and `Decoder.nll` take it.
    aux: the experts' statistics, each array stacked over the MoE layers [L_moe, ...]; None for a
        model without experts.
    cache: with the new positions, None where none was given.
    """

    hidden_BSD: jax.Array
    aux: MoEAux | None
    cache: KVCache | None


def check_mesh(config: ModelConfig, mesh_shape: MeshShape) -> None:
    """Refuses a mesh that the model's widths cannot be split over.

    Raises:
        UserError: naming the axis, the width and the remedy.
    """
    tensor, attention, layers = mesh_shape.tensor, config.attention, config.layers()
    if attention.latent is None and tensor > attention.num_kv_heads:
        raise UserError(
            f"mesh tensor={tensor} with num_kv_heads={attention.num_kv_heads}: every device along "
            "tensor needs a key-value head of its own; shrink the tensor axis"
        )
    widths = {"num_heads": attention.num_heads, "padded_vocab": config.padded_vocab}
    if attention.latent is None:
        widths["num_kv_heads"] = attention.num_kv_heads
    if any(layer.dense for layer in layers):
        widths["dense_hidden"] = config.dense_hidden
    if any(layer.moe for layer in layers):
        widths["hidden"] = config.moe.experts.hidden
        widths["shared_hidden"] = config.moe.experts.shared_hidden
        fewest = config.fewest_experts
        if fewest < mesh_shape.expert:
            raise UserError(
                f"mesh expert={mesh_shape.expert} with num_experts={fewest}: every device needs at "
                "least one expert; shrink the expert axis"
            )
        members = config.moe.experts.together
        if not config.holds_experts(mesh_shape.expert):
            raise UserError(
                f"mesh expert={mesh_shape.expert} with together={members} and num_experts="
                f"{fewest}: every device needs whole groups; shrink the expert axis, or set "
                "together=1"
            )
        if members > 1 and tensor > 1:
            raise UserError(
                f"mesh tensor={tensor} with together={members}: a group's hidden units would be "
                "split between its members; set tensor=1, or together=1"
            )
    for name, width in widths.items():
        if width % tensor:
            raise UserError(
                f"mesh tensor={tensor} with {name}={width}: the axis must divide it; "
                "choose another tensor size"
            )


class Decoder(nnx.Module):
    """A language model whose parameters are global when made and local inside the shard_map.

    Make it with global shapes, split it (`nnx.split`), lay the state over the mesh by each
    parameter's `spec`, and merge it again inside the shard_map to call it. The numbers drawn for
    a layer depend on the key and the layer's index only, not on `scan_layers` or the mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh_shape: MeshShape,
        rngs: nnx.Rngs,
        *,
        hosts: Sequence[int] | None = None,
        implementation: Implementation = None,
    ):
        """Draws the weights, float32.

        Args:
            config: the model.
            mesh_shape: the mesh it will run on; only checked, but for the size of `expert`.
            rngs: one key of the stream `params` is used.
            hosts: of the devices along `expert`, see `MoELayer`.
            implementation: of attention, see `Attention`.

        Raises:
            UserError: the mesh does not suit the model.
        """
        check_mesh(config, mesh_shape)
        self.config = config
        self.groups = layer_groups(config)
        key = rngs.params()

        def rngs_of(index: int) -> nnx.Rngs:
            return nnx.Rngs(params=jax.random.fold_in(key, index))

        self.embedding = Embedding(config.padded_vocab, config.d_model, rngs=rngs_of(0))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = (
            None
            if config.tie_embeddings
            else Head(config.d_model, config.padded_vocab, rngs=rngs_of(1))
        )
        layers = {}
        for group in self.groups:
            blocks = [
                Block(
                    group.layer,
                    num_layers=config.num_layers,
                    expert_devices=mesh_shape.expert,
                    hosts=hosts,
                    implementation=implementation,
                    rngs=rngs_of(2 + index),
                )
                for index in range(group.start, group.stop)
            ]
            layers[group.name] = _stack(blocks) if group.scanned else blocks[0]
        self.layers = nnx.Dict(layers)

    def __call__(
        self,
        tokens_BS: jax.Array,
        *,
        positions_BS: jax.Array | None = None,
        placement: Placement | None = None,
        token_mask_BS: jax.Array | None = None,
        cache: KVCache | None = None,
        inference: bool = False,
    ) -> DecoderOutput:
        """Runs the layers over this device's tokens, inside the shard_map.

        Args:
            tokens_BS: int32 [B, S], ids below the vocabulary size.
            positions_BS: int32 [B, S] for the rotation; None counts from 0, or from the filled
                length of the cache.
            placement: of the experts, each array stacked [L_moe, ...]; None for contiguous.
            token_mask_BS: bool [B, S], False for padding, which no expert sees. With a cache the
                real tokens of a row come first, and only they count as filled afterwards.
            cache: continue these texts, writing the new keys and values behind the old, into the
                pages of the rows' tables.
            inference: no gradient will be asked for, so nothing is kept for one.

        Returns:
            The hidden states, the experts' statistics and the cache.
        """
        if positions_BS is None:
            positions_BS = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None]
            if cache is not None and cache.lengths_B is not None:
                positions_BS = positions_BS + cache.lengths_B[:, None]
            positions_BS = jnp.broadcast_to(positions_BS, tokens_BS.shape)
        if placement is not None:
            self.config.check_equal_experts("a placement")
        x_BSD = self.embedding(tokens_BS, jnp.dtype(self.config.compute_dtype))
        caches: dict[str, LayerCache] = {}
        auxes = []
        moe_layers = 0
        for group in self.groups:
            local = None
            if placement is not None and group.layer.moe is not None:
                local = _slice(placement, moe_layers, moe_layers + group.size)
            x_BSD, aux, layer_cache = self._run(
                group, x_BSD, positions_BS, local, token_mask_BS, cache, inference
            )
            if group.layer.moe is not None:
                moe_layers += group.size
                auxes.append(aux)
            if layer_cache is not None:
                caches[group.name] = layer_cache
        if cache is not None:
            new = (
                jnp.int32(tokens_BS.shape[1])
                if token_mask_BS is None
                else jnp.sum(token_mask_BS, axis=1, dtype=jnp.int32)
            )
            filled_B = jnp.zeros(len(tokens_BS), jnp.int32)
            if cache.lengths_B is not None:
                filled_B = cache.lengths_B
            cache = KVCache(caches, filled_B + new, cache.tables_BN)
        aux = None
        if auxes:
            if self.config.num_experts_by_layer:
                auxes = [a.with_experts(self.config.moe.router.num_experts) for a in auxes]
            aux = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
        return DecoderOutput(self.final_norm(x_BSD), aux, cache)

    def _run(
        self,
        group: LayerGroup,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        placement: Placement | None,
        token_mask_BS: jax.Array | None,
        cache: KVCache | None,
        inference: bool,
    ) -> tuple[jax.Array, Any, LayerCache | None]:
        # Runs one group; `placement` and the returned statistics are stacked [group.size, ...].
        graphdef, states = nnx.split(self.layers[group.name])

        lengths_B = None if cache is None else cache.lengths_B
        training = cache is None and not inference
        # Equal layers that are not scanned are traced once: with kernels that takes seconds each.
        apply = _apply if group.scanned else partial(_apply_traced_once, trace_context())

        def layer(state, x, placement, layer_cache, tables_BN):
            rest = positions_BS, placement, token_mask_BS, layer_cache, lengths_B, tables_BN
            return apply(graphdef, state, x, *rest)

        if training:
            layer = self._remat(layer, scanned=group.scanned)
        stored = None if cache is None else cache.layers[group.name]
        tables_BN = None if cache is None else cache.tables_BN
        if not group.scanned:
            x_BSD, aux, new = layer(states, x_BSD, _pick(placement, 0), stored, tables_BN)
            return x_BSD, jax.tree.map(lambda a: a[None], aux), new

        # The pages of all layers are one carried store, not scanned over: so they are written in
        # place, not copied.
        def step(carry, xs):
            x, pages = carry
            index, state, placement = xs
            tables = None
            if stored is not None:
                assert tables_BN is not None
                tables = layer_tables(tables_BN, index, stored.k_MPLh.shape[-3])
            x, aux, pages = layer(state, x, placement, pages, tables)
            return (x, pages), aux

        xs = (jnp.arange(group.size, dtype=jnp.int32), states, placement)
        pages = None if stored is None else flatten_layers(stored)
        (x_BSD, pages), aux = lax.scan(step, (x_BSD, pages), xs)
        return x_BSD, aux, jax.tree.map(lambda new, old: new.reshape(old.shape), pages, stored)

    def _remat(self, layer: Any, *, scanned: bool) -> Any:
        if self.config.remat == "none":
            return layer
        policy = None
        if self.config.remat == "local":
            policy = jax.checkpoint_policies.save_only_these_names(RECEIVED)
        if self.config.remat == "dots":
            # Products of weights, not of queries with keys: those grow with the square of S.
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)

    def report_experts(self, stride: int = 1) -> None:
        """From now on a call reports the experts of its tokens in `aux.experts_TK`.

        int32 [L_moe, T', K], K those of the layer with most; see `MoELayer.report_experts`.

        Args:
            stride: of this device's tokens, [B · S] in order; 1 reports all.
        """
        layers = [block.moe for block in self.layers.values() if block.moe is not None]
        columns = max((layer.config.router.top_k for layer in layers), default=0)
        for layer in layers:
            layer.report_experts(columns, stride)

    def head_weight(self) -> jax.Array:
        """The output weights [D, V local]; the embedding's transpose if they are tied."""
        return self.embedding.w[...].T if self.head is None else self.head.w[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """This device's columns of the logits: [..., D] to float32 [..., V local].

        Padding ids get -1e30. `all_gather(..., "tensor", dim=-1)`, or `"tensor"` for the last
        dimension in the shard_map's out_specs, gives the whole vocabulary.
        """
        return vocabulary_logits(hidden, self.head_weight(), self.config.vocab_size)

    def nll(
        self, hidden_BSD: jax.Array, targets_BS: jax.Array, *, chunk: int | None = None
    ) -> jax.Array:
        """Negative log-likelihood of the targets: float32 [B, S] in nats; see `hidden_nll`."""
        return hidden_nll(
            hidden_BSD,
            self.head_weight(),
            targets_BS,
            vocab_size=self.config.vocab_size,
            chunk=chunk,
        )

    def summed_nll(
        self,
        hidden_BSD: jax.Array,
        targets_BS: jax.Array,
        *,
        scale: float,
        chunk: int | None = None,
    ) -> jax.Array:
        """The sum of the targets' losses times `scale`: float32 [] in nats; see `summed_nll`."""
        return summed_nll(
            hidden_BSD,
            self.head_weight(),
            targets_BS,
            vocab_size=self.config.vocab_size,
            scale=scale,
            chunk=chunk,
        )


def _apply(
    graphdef: nnx.GraphDef[Block],
    state: nnx.State,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    placement: Placement | None,
    token_mask_BS: jax.Array | None,
    cache: LayerCache | None,
    lengths_B: jax.Array | None,
    tables_BN: jax.Array | None,
) -> tuple[jax.Array, MoEAux | None, LayerCache | None]:
    return nnx.merge(graphdef, state)(
        x_BSD,
        positions_BS,
        placement,
        token_mask_BS=token_mask_BS,
        cache=cache,
        lengths_B=lengths_B,
        tables_BN=tables_BN,
    )


@partial(jax.jit, static_argnums=(0, 1))
def _apply_traced_once(
    context: Hashable, graphdef: nnx.GraphDef[Block], *arguments: Any
) -> tuple[jax.Array, MoEAux | None, LayerCache | None]:
    """The same, traced once for all equal layers; `context` is what else a trace depends on."""
    del context
    return _apply(graphdef, *arguments)


def _stack(blocks: list[Block]) -> Block:
    graphdef, _ = nnx.split(blocks[0])
    return nnx.merge(graphdef, stack_states([nnx.state(block) for block in blocks]))


def _slice(tree: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda a: a[start:stop], tree)


def _pick(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)
