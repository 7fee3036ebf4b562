"""Routing traces: which experts each token of each document chose, layer by layer.

Shape letters of `moejax.placement`: N tokens, L layers with experts, K choices, E logical experts,
G devices along `expert`, S slots of a device, P = G · S slots, D documents, H hosts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moejax.errors import UserError
from moejax.placement.archive import read_arrays, read_number, write_arrays

__all__ = ["Trace", "read_trace", "write_trace"]

_MOST_EXPERTS = 1 << 15


@dataclass(frozen=True)
class Trace:
    """What a router chose.

    Attributes:
        experts_NLK: int16 or int32 [N, L, K], logical experts; −1 for no choice.
        lens: int64 [D], the tokens of each document; their sum is N.
        num_experts: E.
        domains: a label of each document, or None.
    """

    experts_NLK: np.ndarray
    lens: np.ndarray
    num_experts: int
    domains: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        experts = self.experts_NLK
        if experts.ndim != 3 or experts.dtype not in (np.int16, np.int32):
            raise UserError(
                f"experts: {experts.dtype} of shape {experts.shape}: must be int16 or int32 "
                "[tokens, layers, choices]"
            )
        if min(experts.shape) < 1:
            raise UserError(f"experts: shape {experts.shape} holds no choice; dump some tokens")
        if not 1 <= self.num_experts <= _MOST_EXPERTS:
            raise UserError(
                f"num_experts={self.num_experts}: must lie between 1 and {_MOST_EXPERTS}"
            )
        low, high = int(experts.min()), int(experts.max())
        if low < -1 or high >= self.num_experts:
            raise UserError(
                f"experts: holds {low if low < -1 else high}: must lie between 0 and "
                f"{self.num_experts - 1}, or be -1 for no choice"
            )
        lens = self.lens
        if lens.ndim != 1 or lens.dtype != np.int64 or (lens < 0).any():
            raise UserError("lens: must be int64 [documents], none negative")
        # Each is at most N, so that the sum cannot wrap.
        if (lens > len(experts)).any() or lens.sum() != len(experts):
            raise UserError(
                f"lens: {len(lens)} documents whose lengths do not sum to the {len(experts)} "
                "tokens of experts; give each document's number of tokens"
            )
        if self.domains is not None and len(self.domains) != len(lens):
            raise UserError(
                f"domains: {len(self.domains)} labels for {len(lens)} documents: give each one"
            )
        self._check_distinct()

    def _check_distinct(self) -> None:
        choices = self.experts_NLK.shape[2]
        for k in range(1, choices):
            other = self.experts_NLK[:, :, :k]
            mine = self.experts_NLK[:, :, k : k + 1]
            twice = (other == mine) & (mine >= 0)
            if twice.any():
                token, layer, _ = np.argwhere(twice)[0]
                expert = int(self.experts_NLK[token, layer, k])
                raise UserError(
                    f"experts: token {token} of layer {layer} chooses expert {expert} twice; "
                    "every choice of a token is another expert"
                )

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.experts_NLK.shape[0]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.experts_NLK.shape[1]

    def split(self, share: float, seed: int = 0) -> tuple[Trace, Trace]:
        """Two traces of whole documents dealt at random: about `share` of the tokens, and the rest.

        Raises:
            UserError: there are fewer than two documents, or the share is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise UserError(f"share={share}: must lie between 0 and 1")
        filled = np.flatnonzero(self.lens)
        if len(filled) < 2:
            raise UserError("a trace of one document cannot be split; dump several documents")
        order = np.random.default_rng(seed).permutation(filled)
        tokens = np.cumsum(self.lens[order])
        first = int(np.searchsorted(tokens, share * tokens[-1])) + 1
        first = min(max(first, 1), len(order) - 1)
        return self.documents(np.sort(order[:first])), self.documents(np.sort(order[first:]))

    def of_domain(self, name: str) -> Trace:
        """The documents with a label.

        Raises:
            UserError: no document has it.
        """
        known = sorted(set(self.domains or ()))
        if name not in known:
            raise UserError(f"domain {name!r}: the trace has {known or 'no labels'}")
        return self.documents([i for i, d in enumerate(self.domains or ()) if d == name])

    def documents(self, which: Sequence[int] | np.ndarray) -> Trace:
        """The trace of some documents, in the order given."""
        ends = np.cumsum(self.lens)
        rows = [np.arange(ends[i] - self.lens[i], ends[i]) for i in which]
        domains = None if self.domains is None else tuple(self.domains[i] for i in which)
        return Trace(
            self.experts_NLK[np.concatenate(rows)],
            self.lens[np.asarray(which)],
            self.num_experts,
            domains,
        )

    def first_tokens(self, tokens: int) -> Trace:
        """The first N' tokens, the last document cut short."""
        tokens = min(tokens, self.num_tokens)
        lens = np.clip(tokens - (np.cumsum(self.lens) - self.lens), 0, self.lens)
        return Trace(self.experts_NLK[:tokens], lens, self.num_experts, self.domains)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace: `experts` [N, L, K], `lens` [D], and perhaps `num_experts`, `domains` [D].

    Without `num_experts`, E is one more than the largest expert chosen.

    Raises:
        UserError: the file is none, or does not hold together.
    """
    name = os.fspath(path)
    arrays = read_arrays(
        path,
        {"experts": ("iu", 3), "lens": ("iu", 1), "num_experts": ("iu", 0), "domains": ("U", 1)},
        optional=frozenset({"num_experts", "domains"}),
    )
    experts = arrays["experts"]
    try:
        if not experts.size:
            raise UserError(f"experts: shape {experts.shape} holds no choice; dump some tokens")
        low, high = int(experts.min()), int(experts.max())
        number = read_number(arrays["num_experts"]) if "num_experts" in arrays else high + 1
        # Before casting, which would wrap.
        if low < -1 or high >= min(number, _MOST_EXPERTS):
            raise UserError(
                f"experts: holds {low if low < -1 else high}: must lie between 0 and "
                f"{min(number, _MOST_EXPERTS) - 1}, or be -1 for no choice"
            )
        lens = arrays["lens"]
        if lens.size and int(lens.max()) > len(experts):
            raise UserError(f"lens: a document of {lens.max()} tokens in a trace of {len(experts)}")
        domains = tuple(str(d) for d in arrays["domains"]) if "domains" in arrays else None
        small = experts.astype(np.int16, copy=False)  # E is at most 32,768
        return Trace(small, lens.astype(np.int64), number, domains)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Writes what `read_trace` reads.

    Raises:
        UserError: the place cannot be written.
    """
    arrays = {
        "experts": trace.experts_NLK,
        "lens": trace.lens,
        "num_experts": np.array(trace.num_experts),
    }
    if trace.domains is not None:
        arrays["domains"] = np.array(trace.domains, dtype=np.str_)
    write_arrays(path, **arrays)
