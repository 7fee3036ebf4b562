"""What the planner knows of the traffic: loads, and how often two experts serve one token."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moejax.errors import UserError
from moejax.placement.archive import read_arrays, write_arrays
from moejax.placement.trace import Trace

__all__ = ["Statistics", "read_statistics", "statistics_of", "write_statistics"]

_TOKENS_TOGETHER = 1 << 16


@dataclass(frozen=True)
class Statistics:
    """Counts of a window of tokens, decayed or not.

    Attributes:
        pairs_LEE: float32 [L, E, E], tokens that chose both experts; symmetric, zero diagonal.
        load_LE: float32 [L, E], tokens that chose the expert.
        tokens_L: float32 [L], tokens that were routed.
    """

    pairs_LEE: np.ndarray
    load_LE: np.ndarray
    tokens_L: np.ndarray

    def __post_init__(self) -> None:
        layers, experts = self.load_LE.shape if self.load_LE.ndim == 2 else (0, 0)
        shapes = {"load": (layers, experts), "pairs": (layers, experts, experts)}
        shapes["tokens"] = (layers,)
        held = {"load": self.load_LE, "pairs": self.pairs_LEE, "tokens": self.tokens_L}
        for name, array in held.items():
            if not array.size or array.shape != shapes[name] or array.dtype != np.float32:
                raise UserError(
                    f"{name}: {array.dtype} of shape {array.shape}: load is float32 [L, E], pairs "
                    "[L, E, E], tokens [L]"
                )
            if not np.isfinite(array).all() or (array < 0).any():
                raise UserError(f"{name}: counts are finite and not negative; count anew")
        if not np.array_equal(self.pairs_LEE, self.pairs_LEE.transpose(0, 2, 1)):
            raise UserError("pairs: must be symmetric; add the transposed counts and halve them")
        if np.diagonal(self.pairs_LEE, axis1=1, axis2=2).any():
            raise UserError("pairs: must have a zero diagonal; loads are counted apart")

    @property
    def num_layers(self) -> int:
        """L."""
        return self.load_LE.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.load_LE.shape[1]

    def decay(self, factor: float) -> Statistics:
        """All counts times a factor between 0 and 1: older traffic weighs less.

        Raises:
            UserError: the factor lies outside.
        """
        if not 0 <= factor <= 1:
            raise UserError(f"decay: factor {factor}: must lie between 0 and 1")
        scale = np.float32(factor)
        return Statistics(self.pairs_LEE * scale, self.load_LE * scale, self.tokens_L * scale)

    def plus(self, other: Statistics) -> Statistics:
        """The counts of both windows.

        Raises:
            UserError: they are of different layers or experts.
        """
        if self.load_LE.shape != other.load_LE.shape:
            raise UserError(
                f"statistics of [L, E] {self.load_LE.shape} and {other.load_LE.shape}: cannot be "
                "added; count both on one model"
            )
        return Statistics(
            self.pairs_LEE + other.pairs_LEE,
            self.load_LE + other.load_LE,
            self.tokens_L + other.tokens_L,
        )

    def layer(self, index: int) -> Statistics:
        """One layer's counts, L = 1."""
        return self.layers([index])

    def layers(self, which: slice | Sequence[int] | np.ndarray) -> Statistics:
        """The counts of some layers: a slice, indices, or bool [L]."""
        fields = (f.name for f in dataclasses.fields(self))
        return Statistics(*(getattr(self, name)[which] for name in fields))


def statistics_of(trace: Trace) -> Statistics:
    """Counts a whole trace."""
    experts = trace.num_experts
    layers = trace.num_layers
    pairs_LEE = np.zeros((layers, experts, experts), np.float32)
    load_LE = np.zeros((layers, experts), np.float32)
    tokens_L = np.zeros(layers, np.float32)
    for layer in range(layers):
        counts = np.zeros(experts**2, np.int64)
        for start in range(0, trace.num_tokens, _TOKENS_TOGETHER):
            # Experts from 1, so that "no choice" is row and column 0, which are cut off.
            chosen_KN = trace.experts_NLK[start : start + _TOKENS_TOGETHER, layer].T
            chosen_KN = chosen_KN.astype(np.int64)
            load_LE[layer] += np.bincount(chosen_KN[chosen_KN >= 0], minlength=experts)
            tokens_L[layer] += (chosen_KN >= 0).any(0).sum()
            for k in range(1, len(chosen_KN)):
                pair = chosen_KN[:k] * experts + chosen_KN[k]
                valid = (chosen_KN[:k] >= 0) & (chosen_KN[k] >= 0)
                counts += np.bincount(pair[valid], minlength=experts**2)
        counts_EE = counts.reshape(experts, experts)
        pairs_LEE[layer] = counts_EE + counts_EE.T
    return Statistics(pairs_LEE, load_LE, tokens_L)


def read_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Reads `pairs` [L, E, E], `load` [L, E] and `tokens` [L] from a .npz file.

    Raises:
        UserError: the file is none, or does not hold together.
    """
    kinds = {"pairs": ("iuf", 3), "load": ("iuf", 2), "tokens": ("iuf", 1)}
    arrays = read_arrays(path, kinds, optional=frozenset())
    try:
        return Statistics(*(arrays[name].astype(np.float32) for name in kinds))
    except UserError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None


def write_statistics(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Writes what `read_statistics` reads.

    Raises:
        UserError: the place cannot be written.
    """
    write_arrays(
        path, pairs=statistics.pairs_LEE, load=statistics.load_LE, tokens=statistics.tokens_L
    )
