"""Documents, their split into training and held-out text, and what identifies a corpus."""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moejax.errors import UserError

__all__ = [
    "Document",
    "corpus_hash",
    "cut_documents",
    "is_held_out",
    "reference_compression",
    "split_held_out",
    "split_or_cut",
]

_MIN_PIECE = 256
_PIECES = 400


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    path: what names the document, relative and '/'-separated; a line of a JSONL file is
        `file.jsonl:LINE`, a piece of a cut document `file.txt#PIECE`.
    text: its contents; `text.encode()` is the file, byte for byte.
    """

    path: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes: the denominator of bits per byte."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def is_held_out(path: str, fraction: float = 0.05) -> bool:
    """Says whether the document called `path` is held out.

    A pure function of the path: neither the other documents nor their order matter, so a corpus
    may grow without a held-out document ever entering the training set. Documents held out at
    some fraction are held out at every larger one.
    """
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def split_held_out(
    documents: Sequence[Document], fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Splits documents into training and held-out ones by the hash of their paths.

    Args:
        documents: the corpus.
        fraction: expected share of held-out documents, between 0 and 1.

    Returns:
        `(training, held_out)`, each in the order of `documents`, neither empty.

    Raises:
        UserError: the fraction is not between 0 and 1, or a part would be empty.
    """
    _check_fraction(fraction)
    training: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if is_held_out(document.path, fraction) else training).append(document)
    for part, name, remedy in (
        (held_out, "held-out", "raise the fraction or give more documents"),
        (training, "training", "lower the fraction or give more documents"),
    ):
        if not part:
            raise UserError(
                f"{len(documents)} document(s) with a held-out fraction of {fraction:g} leave no "
                f"{name} document: both parts need at least one; {remedy}"
            )
    return training, held_out


def split_or_cut(
    documents: Sequence[Document], fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """`split_held_out`, for corpora of very few documents too, such as one text file.

    When the hash of the paths leaves a part empty, the documents are cut into pieces at line ends
    and the pieces with the smallest hashes are held out, `fraction` of them and at least one.

    Returns:
        `(training, held_out)` as `split_held_out`.

    Raises:
        UserError: the fraction is not between 0 and 1, or the text is too short even for two
            pieces.
    """
    try:
        return split_held_out(documents, fraction)
    except UserError:
        _check_fraction(fraction)
        pieces = cut_documents(documents)
    if len(pieces) < 2:
        size = sum(document.num_bytes for document in documents)
        raise UserError(
            f"the data is {size} bytes of text: at least {2 * _MIN_PIECE} are needed to hold a "
            "part out; give more text"
        )
    count = min(max(1, round(fraction * len(pieces))), len(pieces) - 1)
    by_hash = sorted(
        range(len(pieces)), key=lambda i: hashlib.sha256(pieces[i].path.encode()).digest()
    )
    chosen = set(by_hash[:count])
    return (
        [piece for i, piece in enumerate(pieces) if i not in chosen],
        [piece for i, piece in enumerate(pieces) if i in chosen],
    )


def cut_documents(documents: Sequence[Document]) -> list[Document]:
    """Cuts documents into some hundreds of pieces of about equal length.

    Pieces are named `path#0`, `path#1`, …; joined they are the document again. A cut falls behind
    a line end where one is near, and else between two characters.
    """
    total = sum(len(document.text) for document in documents)
    piece = max(_MIN_PIECE, -(-total // _PIECES))
    pieces = []
    for document in documents:
        text, start, number = document.text, 0, 0
        while start < len(text):
            end = start + piece
            if len(text) - end < piece // 2:
                end = len(text)
            else:
                line_end = text.find("\n", end, end + piece // 2)
                end = end if line_end < 0 else line_end + 1
            pieces.append(Document(f"{document.path}#{number}", text[start:end]))
            start, number = end, number + 1
    return pieces


def corpus_hash(documents: Iterable[Document]) -> str:
    """Sha256, in hex, over every document's path and UTF-8 bytes, in order.

    Both are preceded by their lengths, so that no other corpus has the same stream of bytes.
    """
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.path.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def reference_compression(documents: Sequence[Document]) -> dict[str, float]:
    """What general compressors need for the same text, to set beside a model's bits per byte.

    Args:
        documents: the held-out documents; they are compressed as one stream, in order, so a
            compressor may use earlier documents for later ones.

    Returns:
        `{"zlib": …, "xz": …}` in bits per byte, container included: zlib at level 9, xz at preset
        9 extreme.

    Raises:
        ValueError: the documents hold no bytes.
    """
    data = "".join(document.text for document in documents).encode()
    if not data:
        raise ValueError("reference_compression needs at least one byte of text")
    compressed = {
        "zlib": zlib.compress(data, 9),
        "xz": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(out) / len(data) for name, out in compressed.items()}


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction {fraction:g}: must lie between 0 and 1, such as 0.05")
