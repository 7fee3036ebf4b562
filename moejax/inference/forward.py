"""Logits of whole texts at once, without a cache: to look at a model, not to serve it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32, Integer

from moejax.errors import UserError
from moejax.model.attention import choose_attention
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import TENSOR, TOKEN_AXES, MeshShape, make_mesh
from sharding.specs import specs_of

if TYPE_CHECKING:
    from moejax.inference.source import ModelSource

__all__ = ["Forward"]


class Forward:
    """A model with its weights on a mesh, called with token ids.

    Shape letters: B texts, S tokens of each, V ids of the vocabulary.

    Example:
        >>> forward = Forward(open_model("runs/NAME"), MeshShape(expert=4))
        >>> logits_BSV = forward(tokens_BS)

    Args:
        source: the model, from `moejax.inference.source.open_model`.
        shape: of the mesh.
        dtype: of the computation; `model`: as the model's configuration says.

    Raises:
        UserError: the mesh does not suit the model, or the weights are damaged or another model's.
    """

    def __init__(
        self,
        source: ModelSource,
        shape: MeshShape | None = None,
        *,
        dtype: Literal["float32", "bfloat16", "model"] = "float32",
    ) -> None:
        config = source.config
        if dtype != "model":
            config = dataclasses.replace(config, compute_dtype=dtype)
        mesh = make_mesh(MeshShape() if shape is None else shape)
        attention = choose_attention(mesh.devices.flat[0].platform, config)
        self._blueprint = blueprint = Blueprint(config, mesh, attention=attention)
        weights = load_weights(
            source.weights(blueprint), blueprint, jnp.dtype(config.compute_dtype)
        )
        self._weights = jax.block_until_ready(weights)

        def logits(weights: Any, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
            model = blueprint.merge(*weights)
            found = model(tokens_BS, token_mask_BS=mask_BS, inference=True)
            return model.logits(found.hidden_BSD)

        specs = (specs_of(blueprint.params), blueprint.bias_specs)
        rows = P(TOKEN_AXES, None)
        self._logits = jax.jit(
            jax.shard_map(
                logits,
                mesh=mesh,
                in_specs=(specs, rows, rows),
                out_specs=P(TOKEN_AXES, None, TENSOR),
                check_vma=False,
            )
        )

    def __call__(self, tokens_BS: Integer[np.ndarray, "B S"]) -> Float32[np.ndarray, "B S V"]:
        """The logits of the token behind each place, on the host.

        Args:
            tokens_BS: texts of one length; each length and number of texts compiles a program.

        Raises:
            UserError: the ids are not those of texts that the model can read.
        """
        self._check(tokens_BS)
        rows, devices = len(tokens_BS), self._blueprint.shape.data * self._blueprint.shape.expert
        fill = -rows % devices
        tokens_BS = np.pad(tokens_BS.astype(np.int32), ((0, fill), (0, 0)))
        mask_BS = np.broadcast_to(np.arange(rows + fill)[:, None] < rows, tokens_BS.shape)
        where = NamedSharding(self._blueprint.mesh, P(TOKEN_AXES, None))
        inputs = jax.device_put((tokens_BS, mask_BS), where)
        logits_BSV = np.asarray(self._logits(self._weights, *inputs))
        return logits_BSV[:rows, :, : self._blueprint.config.vocab_size]

    def _check(self, tokens_BS: np.ndarray) -> None:
        config = self._blueprint.config
        if tokens_BS.ndim != 2 or 0 in tokens_BS.shape or tokens_BS.dtype.kind not in "iu":
            raise UserError(
                f"tokens_BS {tokens_BS.dtype}{list(tokens_BS.shape)}: must be whole numbers "
                "[texts, tokens], at least one; give Tokenizer.encode(text)[None]"
            )
        if tokens_BS.shape[1] > config.max_context:
            raise UserError(
                f"tokens_BS of {tokens_BS.shape[1]} tokens: longer than the model's context of "
                f"{config.max_context}; cut the texts"
            )
        low, high = int(tokens_BS.min()), int(tokens_BS.max())
        if low < 0 or high >= config.vocab_size:
            raise UserError(
                f"tokens_BS holds {low if low < 0 else high}: ids lie between 0 and "
                f"{config.vocab_size - 1}; encode with the model's own tokenizer"
            )
