"""The text of a run: documents, the held-out part, the tokenizer, tokens and windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moejax.data.corpus import Document, corpus_hash, split_or_cut
from moejax.data.pipeline import HeldOutWindows, TokenDataset, held_out_windows, tokenize
from moejax.data.sources import Corpus, load_corpus, load_standard_library
from moejax.data.tokenizer import Tokenizer, train_bpe
from moejax.errors import UserError
from moejax.training.config import DataConfig, TrainConfig

__all__ = ["Text", "load_and_split", "prepare_text"]


@dataclass(frozen=True)
class Text:
    """What a run reads.

    held_out: the documents kept for evaluation.
    dataset: training examples by number.
    windows: the held-out text, each token predicted once.
    bytes_per_token: of the training text.
    record: hashes and sizes, for the run's record.
    """

    tokenizer: Tokenizer
    held_out: tuple[Document, ...]
    dataset: TokenDataset
    windows: HeldOutWindows
    bytes_per_token: float
    record: dict


def prepare_text(config: TrainConfig, tokenizer: Tokenizer | None = None) -> Text:
    """Loads and splits the text, and makes or loads the tokenizer.

    Args:
        config: the run's; `data` and `seed` are read.
        tokenizer: of an earlier part of the same run, used instead of making one.

    Raises:
        UserError: the data or the tokenizer cannot be used, or the vocabulary does not fit.
    """
    data = config.data
    corpus, training, held_out = load_and_split(data)
    tokenizer = tokenizer or make_tokenizer(config, training)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"vocab_size={config.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids; "
            f"pass --model.vocab-size {tokenizer.vocab_size}"
        )
    tokens = tokenize(training, tokenizer)
    training_bytes = sum(d.num_bytes for d in training)
    record = {
        "training_bytes": training_bytes,
        "training_tokens": int(tokens.size),
        "held_out_bytes": sum(d.num_bytes for d in held_out),
        "held_out_files": len(held_out),
        "skipped_files": len(corpus.skipped),
        "corpus_sha256": corpus_hash(corpus.documents),
        "held_out_sha256": corpus_hash(held_out),
        "tokenizer": tokenizer.fingerprint,
    }
    return Text(
        tokenizer=tokenizer,
        held_out=tuple(held_out),
        dataset=TokenDataset(tokens, data.seq_len, config.seed),
        windows=held_out_windows(held_out, tokenizer, data.seq_len),
        bytes_per_token=training_bytes / max(1, int(np.size(tokens))),
        record=record,
    )


def load_and_split(data: DataConfig) -> tuple[Corpus, list[Document], list[Document]]:
    """The text that is named, what of it is trained on, and what is held out.

    Raises:
        UserError: it cannot be read, or nothing is left to train on.
    """
    corpus = load_corpus(data.paths) if data.paths else load_standard_library()
    if data.held_out_paths:
        training = list(corpus.documents)
        held_out = list(load_corpus(data.held_out_paths).documents)
    else:
        training, held_out = split_or_cut(corpus.documents, data.held_out)
    kept_out = {d.text for d in held_out}
    training = [d for d in training if d.text not in kept_out]
    if not training:
        raise UserError(
            f"all {len(corpus.documents)} training document(s) are held-out text too: name other "
            "text with --data.paths or --data.held-out-paths"
        )
    return corpus, training, held_out


def make_tokenizer(config: TrainConfig, training: list[Document]) -> Tokenizer:
    """Bytes, a BPE trained on the training documents, or a given file, as the config says."""
    if config.data.tokenizer:
        return Tokenizer.from_file(config.data.tokenizer)
    if config.data.vocab:
        return train_bpe(training, config.data.vocab)
    return Tokenizer()
