"""Held-out bits per byte."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.data.pipeline import HeldOutWindows
from moejax.training.state import Blueprint, TrainState
from moejax.training.step import make_eval_step, make_gather
from sharding.arrays import put
from sharding.mesh import TOKEN_AXES

__all__ = ["Evaluator"]


class Evaluator:
    """Measures bits per byte on held-out windows.

    Args:
        blueprint: model and mesh.
        windows: the held-out text.
        batch_size: windows at once, rounded to a multiple of the devices that they are split over.
        loss_chunk: tokens whose logits exist at a time; 0: all.

    Attributes:
        score_mass_kept: of the last evaluation, over all tokens that were routed, empty windows
            included; None before it, or where routing does not look at distances. See
            `moejax.routing.near.mass_kept`.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        windows: HeldOutWindows,
        *,
        batch_size: int,
        loss_chunk: int,
    ):
        self._blueprint = blueprint
        self._windows = windows
        share = blueprint.shape.data * blueprint.shape.expert
        self._rows = max(share, batch_size // share * share)
        self._counts = blueprint.config.moe.locality.active and any(
            layer.moe is not None for layer in blueprint.config.layers()
        )
        self._step = make_eval_step(blueprint, loss_chunk, with_kept=self._counts)
        self._gather = make_gather(blueprint)
        self.score_mass_kept: float | None = None

    def weights(self, state: TrainState) -> nnx.State:
        """The weights that evaluation and sampling use, from a training state."""
        return jax.block_until_ready(self._gather(state.masters))

    def bits_per_byte(
        self, params: Any, biases: Any, limit: int | None = None, placement: Any = None
    ) -> float:
        """Bits per byte of UTF-8 text.

        Args:
            params: split by their use, as from `weights` or `load_weights`.
            biases: of the routers.
            limit: use this many windows, spread evenly (an estimate); None: every token once.
            placement: arrays [L, …] of where experts are, for routing that looks at distances;
                other routing is measured with experts at home, which is the same. None: at home.
        """
        if not self._counts:
            placement = None
        windows, count = self._windows, len(self._windows.tokens)
        chosen = np.arange(count)
        if limit is not None and limit < count:
            chosen = np.linspace(0, count - 1, limit).round().astype(int)
        sharding = NamedSharding(self._blueprint.mesh, P(TOKEN_AXES, None))
        nll, kept = 0.0, np.zeros(2)
        for start in range(0, len(chosen), self._rows):
            part = chosen[start : start + self._rows]
            fill = self._rows - len(part)
            tokens = np.pad(windows.tokens[part], ((0, fill), (0, 0)))
            mask = np.pad(windows.mask[part], ((0, fill), (0, 0)))
            args = put((tokens, mask), sharding)
            found = self._step(params, biases, *args, placement)
            if self._counts:
                found, more = found
                kept += np.asarray(more)
            nll += float(found)
        if self._counts:
            self.score_mass_kept = float(kept[0] / kept[1])
        bits = windows.bits_per_byte(nll)
        if limit is None or limit >= count:
            return bits
        # A part of the windows: scale by the share of predicted tokens they hold.
        return bits * windows.mask.sum() / windows.mask[chosen].sum()
