"""Text to calibrate on, and other text to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from moejax.compress.config import CompressConfig
from moejax.data.corpus import Document
from moejax.data.pipeline import HeldOutWindows, held_out_windows, tokenize
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.training.text import load_and_split

__all__ = ["Texts", "read_texts", "windows_to_fit"]


@dataclass(frozen=True)
class Texts:
    """What a model is calibrated and measured on.

    calibration_WS: windows of the training text.
    windows: the held-out text.
    """

    calibration_WS: Int32[np.ndarray, "W S"]
    windows: HeldOutWindows


def read_texts(config: CompressConfig, tokenizer: Tokenizer, bos_id: int | None = None) -> Texts:
    """Reads and splits the text as a training run does, and takes some of it.

    Args:
        config: its `data`, `tokens` and `seed` are read.
        tokenizer: of the model.
        bos_id: the id that windows for calibration begin with, if the model's texts do.

    Raises:
        UserError: the text cannot be read, or is too short for a window.
    """
    _, training, held_out = load_and_split(config.data)
    calibration_WS = windows_to_fit(
        training, tokenizer, config.data.seq_len, config.tokens, config.seed, bos_id
    )
    return Texts(calibration_WS, held_out_windows(held_out, tokenizer, config.data.seq_len))


def windows_to_fit(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    length: int,
    tokens: int,
    seed: int,
    bos_id: int | None = None,
) -> Int32[np.ndarray, "W S"]:
    """Windows at random places of random documents, from as many of them as there can be.

    What experts are fitted to has to be as varied as what they will be given: with a window of each
    of 256 documents the packaged model lost less than with the same number from 8.

    Args:
        documents: the text.
        tokenizer: of the model.
        length: S, tokens of a window.
        tokens: of all windows, at least one window.
        seed: of the choice.
        bos_id: the id that windows begin with, if the model's texts do.

    Raises:
        UserError: the text has no window.
    """
    rng = np.random.default_rng(seed)
    wanted = max(1, tokens // length)
    found: list[np.ndarray] = []
    short: list[np.ndarray] = []  # documents without a whole window, one after the other
    while len(found) < wanted:
        before = len(found)
        for index in rng.permutation(len(documents)):
            if len(found) == wanted:
                break
            text = tokenize([documents[index]], tokenizer)
            if len(text) < length:
                short.append(text)
                if sum(map(len, short)) < length:
                    continue
                text, short = np.concatenate(short), []
            start = rng.integers(len(text) - length + 1)
            found.append(text[start : start + length])
        if len(found) == before:
            raise UserError(
                f"the text beside the held-out part has no window of {length} tokens to calibrate "
                "on: name more text with --data.paths, or pass a smaller --data.seq-len"
            )
    windows_WS = np.stack(found).astype(np.int32)
    if bos_id is not None:
        windows_WS = np.insert(windows_WS[:, :-1], 0, bos_id, axis=1)
    return windows_WS
