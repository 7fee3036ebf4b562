"""From text to batches: sources, the held-out split, tokenizers, examples, near-duplicates.

Nothing here imports jax, and nothing but `TokenDataset` imports grain.
"""

from moejax.data.corpus import (
    Document,
    corpus_hash,
    reference_compression,
    split_held_out,
    split_or_cut,
)
from moejax.data.dedup import NearDuplicates
from moejax.data.pipeline import HeldOutWindows, TokenDataset, held_out_windows, tokenize
from moejax.data.prefetch import Prefetcher
from moejax.data.sources import Corpus, load_corpus, load_standard_library, read_text
from moejax.data.token_bytes import StreamDecoder
from moejax.data.tokenizer import Tokenizer, train_bpe

__all__ = [
    "Corpus",
    "Document",
    "HeldOutWindows",
    "NearDuplicates",
    "Prefetcher",
    "StreamDecoder",
    "TokenDataset",
    "Tokenizer",
    "corpus_hash",
    "held_out_windows",
    "load_corpus",
    "load_standard_library",
    "read_text",
    "reference_compression",
    "split_held_out",
    "split_or_cut",
    "tokenize",
    "train_bpe",
]
