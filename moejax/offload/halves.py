"""What the programs of an offloaded model compute, inside the shard_map of its one device.

Shape letters: B rows, S tokens of a row, T = B · S, K experts of a token, N = T · K copies, D model
width, E experts, V vocabulary, F and W columns of packed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import numpy as jnp

from moejax.inference.shapes import Shape
from moejax.inference.step_rows import pages_and_tokens, rows_of, step_tokens
from moejax.model.cache import LayerCache
from moejax.offload.parts import BankLayout, Structure
from moejax.offload.store import Expert
from sharding.collectives import all_gather
from sharding.mesh import TENSOR

__all__ = ["Halves", "Kind", "Sent", "Weights"]

Weights = tuple[jax.Array, ...]
"""All arrays of a layer without its bank, or of a model without its layers."""

Sent = tuple[jax.Array, jax.Array, jax.Array]
"""Normalised tokens [T, D], scores [T, K] and experts [T, K], −1 for none."""


@dataclass(frozen=True)
class Kind:
    """What equal layers have in common.

    block: structure of a layer without its bank.
    bank: what the bank consists of; None for a dense layer.
    slots: S.
    wave: W, experts that are streamed together.
    probe: what guesses the next layer's choice; None: nothing does.
    top_k: K; 0 for a dense layer.
    """

    block: Structure
    bank: BankLayout | None
    slots: int
    wave: int
    probe: Any
    top_k: int


@dataclass(frozen=True)
class Halves:
    """The parts of a step.

    model: structure of the model without its layers.
    dtype: of the computation.
    """

    model: Structure
    dtype: Any

    def begin(
        self, shape: Shape, own: Weights, history_RM: Any, rows_BF: Any, where_BW: Any
    ) -> tuple[jax.Array, dict[str, jax.Array | None]]:
        """The embedded tokens of a step, and what all layers are told of its rows."""
        count_B, length_B, _ = rows_of(rows_BF)
        tables_BN, tokens_BS = pages_and_tokens(where_BW, shape)
        tokens_BS = step_tokens(tokens_BS, history_RM, rows_BF)
        new_S = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)
        positions_BS = jnp.broadcast_to(new_S, tokens_BS.shape)
        if not shape.begins:
            positions_BS = positions_BS + length_B[:, None]
        context = {
            "positions_BS": positions_BS,
            "mask_BS": new_S < count_B[:, None],
            "tables_BN": tables_BN,
            "lengths_B": None if shape.begins else length_B,
        }
        model = self.model.around(own)
        return model.embedding(tokens_BS, self.dtype), context

    def dense(
        self, kind: Kind, own: Weights, x_BSD: Any, context: Any, pages: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        """A layer without experts."""
        x_BSD, _, pages = kind.block.around(own)(
            x_BSD,
            context["positions_BS"],
            token_mask_BS=context["mask_BS"],
            cache=pages,
            lengths_B=context["lengths_B"],
            tables_BN=context["tables_BN"],
        )
        return x_BSD, pages

    def attend(
        self,
        kind: Kind,
        bonus: float,
        own: Weights,
        probe: Any,
        x_BSD: jax.Array,
        context: Any,
        pages: LayerCache,
        slot_E: jax.Array | None,
    ) -> tuple[jax.Array, Sent, jax.Array | None, LayerCache]:
        """The first half of a layer with experts: attention, routing, a guess for the next one."""
        block = kind.block.around(own)
        before_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        x_BSD, y_TD, pages = block.attend(
            x_BSD,
            context["positions_BS"],
            cache=pages,
            lengths_B=context["lengths_B"],
            tables_BN=context["tables_BN"],
        )
        mask_T = context["mask_BS"].reshape(-1)
        bonus_E = None
        if slot_E is not None:
            bonus_E = jnp.where(slot_E >= 0, jnp.float32(bonus), jnp.float32(0))
        routing = block.moe.route(y_TD, token_mask_T=mask_T, bonus_E=bonus_E)
        experts_TK, _ = block.moe.within_capacity(routing)
        guess_E = None
        if kind.probe is not None:
            guess_E = kind.probe(probe, before_TD, x_BSD.reshape(before_TD.shape), mask_T)
        return x_BSD, (y_TD, routing.scores_TK, experts_TK), guess_E, pages

    def serve(
        self, kind: Kind, own: Weights, weights: Expert, x_BSD: Any, sent: Sent, slot_E: Any
    ) -> jax.Array:
        """The second half where all experts that are needed are in the slots."""
        y_TD, scores_TK, experts_TK = sent
        moe = _with_bank(kind, own, weights)
        slots_TK = _slots_of(experts_TK, slot_E)
        routed_TD = moe.serve(y_TD, scores_TK, slots_TK, kind.slots)
        return x_BSD + moe.finish(y_TD, routed_TD).reshape(x_BSD.shape)

    def serve_attend(
        self,
        kind: Kind,
        after: Kind,
        bonus: float,
        own: Weights,
        weights: Expert,
        x_BSD: jax.Array,
        sent: Sent,
        slot_E: Any,
        *given: Any,
    ) -> tuple[jax.Array, Sent, jax.Array | None, LayerCache]:
        """The second half of a layer, and the first half of the one after it.

        Args:
            kind, after: of the two layers.
            given: the second one's weights and probe, and what `attend` takes behind the residual.
        """
        x_BSD = self.serve(kind, own, weights, x_BSD, sent, slot_E)
        own, probe, *rest = given
        return self.attend(after, bonus, own, probe, x_BSD, *rest)

    def wave(
        self,
        kind: Kind,
        slots: int,
        own: Weights,
        weights: Expert,
        sent: Sent,
        slot_E: Any,
        y_ND: Any,
    ) -> jax.Array:
        """What some of the experts give, added to the copies that are theirs; float32 [N, D]."""
        y_TD, scores_TK, experts_TK = sent
        moe = _with_bank(kind, own, weights)
        x_ND = jnp.repeat(y_TD, scores_TK.shape[1], axis=0)
        slots_N1 = _slots_of(experts_TK, slot_E).reshape(-1, 1)
        # Zero for all other copies: each is written to once, and nothing is rounded.
        return y_ND + moe.serve(x_ND, scores_TK.reshape(-1, 1), slots_N1, slots)

    def streamed(
        self,
        kind: Kind,
        own: Weights,
        weights: tuple[Expert, ...],
        sent: Sent,
        slot_E: Any,
        y_ND: Any,
    ) -> jax.Array:
        """The same with experts that lie each by itself."""
        bank = tuple(jnp.stack(arrays) for arrays in zip(*weights, strict=True))
        return self.wave(kind, kind.wave, own, bank, sent, slot_E, y_ND)

    def finish(self, kind: Kind, own: Weights, x_BSD: Any, sent: Sent, y_ND: Any) -> jax.Array:
        """The end of a layer whose experts came in waves."""
        y_TD, scores_TK, _ = sent
        copies = scores_TK.shape[1]
        # One after the other, in the order of the choice: a reduction may take any order.
        y_TKD = y_ND.reshape(-1, copies, y_ND.shape[1])
        routed_TD = sum((y_TKD[:, k] for k in range(1, copies)), start=y_TKD[:, 0])
        moe = kind.block.around(own).moe
        return x_BSD + moe.finish(y_TD, routed_TD).reshape(x_BSD.shape)

    def end(self, own: Weights, x_BSD: jax.Array, rows_BF: jax.Array) -> jax.Array:
        """Logits float32 [B, V] of each row's last token."""
        count_B, _, _ = rows_of(rows_BF)
        model = self.model.around(own)
        last_B = jnp.maximum(count_B - 1, 0)
        hidden_BSD = model.final_norm(x_BSD)
        hidden_BD = jnp.take_along_axis(hidden_BSD, last_B[:, None, None], axis=1)[:, 0]
        return all_gather(model.logits(hidden_BD), TENSOR, 1)


def _with_bank(kind: Kind, own: Weights, weights: Expert) -> Any:
    """The experts' part of a layer around a bank of other slots."""
    assert kind.bank is not None
    moe = kind.block.around(own).moe
    moe.bank = kind.bank.bank(weights)
    return moe


def _slots_of(experts_TK: jax.Array, slot_E: jax.Array) -> jax.Array:
    """Where the tokens' experts are; −1 for none, and for those that are not there."""
    slots_TK = slot_E[jnp.maximum(experts_TK, 0)]
    return jnp.where(experts_TK >= 0, slots_TK, jnp.int32(-1))
