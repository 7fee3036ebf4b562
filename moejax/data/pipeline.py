"""Token arrays, training examples and evaluation windows.

A training example is a function of (seed, example number) and nothing else: example `n` of a run
is the same tokens on one device, on any mesh, on any number of hosts and after a resume.

    N windows     S tokens of a window that are predicted
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moejax.data.corpus import Document
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError

__all__ = ["HeldOutWindows", "TokenDataset", "held_out_windows", "tokenize"]

# Enough texts to keep every core busy, few enough to bound what is in flight.
_TEXTS_AT_ONCE = 256


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of all documents, each followed by the end-of-document id.

    Returns:
        uint16 `[n]` if the vocabulary has at most 65536 ids, else int32 `[n]`.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    eos = np.array([tokenizer.eos_id], dtype)
    parts = [np.empty(0, dtype)]
    for start in range(0, len(documents), _TEXTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _TEXTS_AT_ONCE]]
        for ids in tokenizer.encode_batch(texts):
            parts += [ids.astype(dtype), eos]
    return np.concatenate(parts)


class TokenDataset:
    """Training examples by number, endless.

    The tokens are taken as a ring and cut into windows that overlap by one token: the last token
    of a window is the first input of the next. Each epoch takes every window once, in a fresh
    order, and cuts the ring at a fresh place, so that no token is always at the start of a window.

    num_windows: examples of an epoch.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int):
        """Prepares the order; costs the same whatever the number of tokens.

        Args:
            tokens: integer `[n]`, documents separated by the end-of-document id.
            seq_len: predicted tokens S of an example.
            seed: any integer.

        Raises:
            UserError: there are fewer tokens than one window has.
        """
        # Importing grain costs a second, which inference and the planner need not pay.
        import grain

        if seq_len < 1:
            raise UserError(f"seq_len {seq_len}: must be at least 1")
        if len(tokens) < seq_len + 1:
            raise UserError(
                f"the training text has {len(tokens)} tokens: one example needs seq_len + 1 = "
                f"{seq_len + 1}; give more text or a smaller seq_len"
            )
        self._tokens = tokens
        self._seq_len = seq_len
        self._seed = seed
        self.num_windows = (len(tokens) - 1) // seq_len
        self._examples = (
            grain.MapDataset.range(self.num_windows)
            .map_with_index(self._window)
            .shuffle(_derive(2**32, "order", seed))
            .repeat()
        )

    def example(self, number: int) -> np.ndarray:
        """Example `number` ≥ 0: int32 `[S+1]`, inputs `[:-1]` and targets `[1:]`."""
        if number < 0:
            raise ValueError(f"example number {number}: must not be negative")
        return self._examples[number]

    def batch(self, step: int, global_batch: int, rows: slice | None = None) -> np.ndarray:
        """The examples of a training step.

        Args:
            step: global step, from 0.
            global_batch: examples of a step over all devices and accumulation steps.
            rows: which of them this host needs; None for all.

        Returns:
            int32 `[rows, S+1]`; row r is example `step * global_batch + r`.
        """
        wanted = range(global_batch)[slice(None) if rows is None else rows]
        batch = np.empty((len(wanted), self._seq_len + 1), np.int32)
        for i, row in enumerate(wanted):
            batch[i] = self.example(step * global_batch + row)
        return batch

    def _window(self, index: int, window: int) -> np.ndarray:
        """Window number `window` of the epoch in which the example `index` lies."""
        size = len(self._tokens)
        cut = _derive(size, "cut", self._seed, index // self.num_windows)
        start = (cut + window * self._seq_len) % size
        end = start + self._seq_len + 1
        if end <= size:
            return self._tokens[start:end].astype(np.int32)
        parts = (self._tokens[start:], self._tokens[: end - size])
        return np.concatenate(parts).astype(np.int32)


@functools.lru_cache(maxsize=64)
def _derive(bound: int, *labels: str | int) -> int:
    """A number in `[0, bound)` that looks random and depends on nothing but the arguments.

    A hash, not `seed + epoch`: neighbouring seeds must not share epochs.
    """
    digest = hashlib.sha256(repr(labels).encode()).digest()
    return int.from_bytes(digest[:16], "big") % bound


@dataclass(frozen=True)
class HeldOutWindows:
    """Windows in which every token of the held-out text is predicted exactly once.

    tokens: int32 `[N, S+1]`, inputs `[:, :-1]` and targets `[:, 1:]`; unused places hold the
        end-of-document id.
    mask: bool `[N, S]`, true where a target counts.
    total_bytes: UTF-8 bytes of the text.
    """

    tokens: np.ndarray
    mask: np.ndarray
    total_bytes: int

    def bits_per_byte(self, total_nll: float) -> float:
        """Bits per byte from the summed negative log likelihood, in nats, where the mask is true.

        Comparable between tokenizers and with compressors, because every token is counted once
        and the text's own bytes are the denominator.
        """
        return total_nll / math.log(2) / self.total_bytes


def held_out_windows(
    documents: Sequence[Document], tokenizer: Tokenizer, seq_len: int, context: int = 0
) -> HeldOutWindows:
    """Cuts held-out documents into windows that predict every token exactly once.

    Each document is read after an end-of-document id, apart from the others; that id itself is
    not predicted, since compressors of the same text do not encode where files end either.

    Args:
        documents: the held-out documents.
        tokenizer: the model's.
        seq_len: predicted tokens S of a window, those that do not count included.
        context: how many inputs of a document's later windows repeat the window before, without
            counting, so that its first tokens are predicted with that much context; the step
            from window to window is `seq_len - context`.

    Raises:
        UserError: `context` is not between 0 and `seq_len - 1`, or there is no text.
    """
    if not 0 <= context < seq_len:
        raise UserError(
            f"evaluation context {context}: must lie between 0 and seq_len - 1 = {seq_len - 1}"
        )
    eos, stride = tokenizer.eos_id, seq_len - context
    place = np.arange(seq_len + 1)
    tokens = [np.empty((0, seq_len + 1), np.int32)]
    masks = [np.empty((0, seq_len), bool)]
    for ids in tokenizer.encode_batch([document.text for document in documents]):
        if not ids.size:
            continue
        line = np.concatenate([[eos], ids]).astype(np.int32)
        # The first window counts seq_len targets, each later one `stride` more.
        num_windows = 1 + -(-max(0, len(ids) - seq_len) // stride)
        index = stride * np.arange(num_windows)[:, None] + place
        inside = index < len(line)
        tokens.append(np.where(inside, line[np.minimum(index, len(ids))], np.int32(eos)))
        mask = inside[:, 1:].copy()
        mask[1:, :context] = False
        masks.append(mask)
    if len(tokens) == 1:
        raise UserError("the held-out documents hold no text; hold more of the data out")
    total_bytes = sum(document.num_bytes for document in documents)
    return HeldOutWindows(np.concatenate(tokens), np.concatenate(masks), total_bytes)
