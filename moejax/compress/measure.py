"""How good a model is: bits per byte of held-out text, and how it continues texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Int32

from moejax.config import ModelConfig
from moejax.data.pipeline import HeldOutWindows
from moejax.inference.generate import Generator
from moejax.inference.sampling import SamplingConfig
from moejax.training.evaluate import Evaluator
from moejax.training.state import Blueprint, load_weights
from sharding.costs import count_parameters
from sharding.mesh import MeshShape, make_mesh

__all__ = ["Continuations", "Measured", "agreement", "measure", "prompts_of"]

_PROMPT, _MADE = 64, 32  # tokens of a text to continue, and of its continuation
_TOGETHER = 8

Continuations = list[np.ndarray]
"""int32 [n] each: what a model wrote, the most probable token at each place."""


@dataclass(frozen=True)
class Measured:
    """A model's size and quality.

    parameters, active: all, and those that a token uses at most; padding left out.
    bits_per_byte: of the held-out text.
    continuations: of the prompts.
    """

    parameters: int
    active: int
    bits_per_byte: float
    continuations: Continuations


def prompts_of(
    windows: HeldOutWindows, count: int, context: int, bos_id: int | None = None
) -> list[Int32[np.ndarray, " n"]]:
    """Beginnings of held-out windows that are full, spread evenly.

    Args:
        windows: the held-out text.
        count: of prompts, if there are so many.
        context: the longest text of the model, in tokens; with less than 34 there is no prompt.
        bos_id: the id that they begin with, if the model's texts do.
    """
    length = min(_PROMPT, context - _MADE - 1, windows.mask.shape[1])
    if length < 1:
        return []
    full = np.flatnonzero(windows.mask[:, :length].all(1))
    chosen = full[np.linspace(0, len(full) - 1, min(count, len(full))).round().astype(int)]
    first = [] if bos_id is None else [bos_id]
    return [np.array([*first, *windows.tokens[i, :length]], np.int32) for i in chosen]


def measure(
    config: ModelConfig,
    flat: Mapping[str, Any],
    windows: HeldOutWindows,
    *,
    limit: int | None = None,
    prompts: Sequence[np.ndarray] = (),
) -> Measured:
    """Measures a model in float32 on one device.

    Args:
        config: the model.
        flat: its weights in logical order.
        windows: the held-out text.
        limit: windows to evaluate, spread evenly; None: all.
        prompts: token ids to continue.
    """
    config = dataclasses.replace(config, scan_layers=True, compute_dtype="float32")
    blueprint = Blueprint(config, make_mesh(MeshShape()))
    arrays = {n: jnp.asarray(np.asarray(a)) for n, a in flat.items()}
    params, biases = jax.block_until_ready(load_weights(arrays, blueprint, jnp.float32))
    evaluator = Evaluator(blueprint, windows, batch_size=_TOGETHER, loss_chunk=4096)
    bits = evaluator.bits_per_byte(params, biases, limit)
    made: Continuations = []
    if prompts:
        generator = Generator(blueprint, params, biases, max_len=max(map(len, prompts)) + _MADE)
        found = generator.generate(
            prompts, sampling=SamplingConfig(temperature=0.0), max_tokens=_MADE
        )
        made = [one.tokens for one in found]
    size = count_parameters(config)
    return Measured(size.total, size.active, bits, made)


def agreement(here: Continuations, there: Continuations) -> tuple[float, float]:
    """How far two models write the same.

    Returns:
        The share of texts continued by exactly the same tokens; the mean share of tokens before the
        first that differs.
    """
    exact, leading = [], []
    for ours, theirs in zip(here, there, strict=True):
        length = min(len(ours), len(theirs))
        differ = np.flatnonzero(ours[:length] != theirs[:length])
        same = int(differ[0]) if len(differ) else length
        longest = max(len(ours), len(theirs), 1)
        exact.append(same == longest)
        leading.append(same / longest)
    return float(np.mean(exact)), float(np.mean(leading))
