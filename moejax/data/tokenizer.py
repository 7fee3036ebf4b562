"""Text to token ids and back: bytes, byte-pair encoding, or a given tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from moejax.data.corpus import Document
from moejax.data.special_tokens import SpecialTokens
from moejax.data.token_bytes import ByteRule, TokenBytes, read_byte_rule
from moejax.errors import UserError

__all__ = ["Tokenizer", "train_bpe"]

_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
_META_FILE = "tokenizer_meta.json"
_MODEL_FILE = "tokenizer.json"
_META_VERSION = 1
# An Encoding of the tokenizers package needs some hundred bytes a token.
_PIECE_CHARS = 1 << 22
_MAX_VOCAB = 1 << 24

Kind = Literal["bytes", "bpe"]


class Tokenizer:
    """Maps text to token ids and back without loss.

    kind: `bytes`, where an id below 256 is that byte, or `bpe`, any model of the `tokenizers`
        package that can spell every byte.
    vocab_size: number of ids, the end-of-document id included.
    eos_id: the id that ends a document. Text never encodes to it: text that looks like a special
        token is taken as text.
    fingerprint: sha256, in hex, of all that the mapping depends on.
    """

    kind: Kind
    vocab_size: int
    eos_id: int
    fingerprint: str

    def __init__(self, model_json: str | None = None, eos_id: int | None = None):
        """Makes a byte tokenizer, or one from the text of a tokenizer.json.

        Args:
            model_json: text of a tokenizer.json; None for bytes.
            eos_id: the id that ends a document; None adds one above all others.

        Raises:
            UserError: the text is not a tokenizer, or cannot spell every byte.
        """
        self._model_json = model_json
        self._model: Any = None
        if model_json is None:
            self.kind, size, rule = "bytes", 256, ByteRule("bytes", False)
        else:
            self.kind = "bpe"
            self._model, rule = _parse(model_json)
            # Ids may have holes, so the number of entries can be below the largest id.
            size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_id = size if eos_id is None else eos_id
        if not 0 <= self.eos_id <= size <= _MAX_VOCAB:
            raise UserError(
                f"tokenizer: end-of-document id {self.eos_id} with {size} token ids: must be one "
                f"of them or the next, and at most {_MAX_VOCAB}; check the tokenizer's files"
            )
        if self._model is not None and self.eos_id < size:
            # Only special tokens are kept from matching inside text.
            self._model.add_special_tokens([self._model.id_to_token(self.eos_id)])
        self.vocab_size = max(size, self.eos_id + 1)
        self._bytes = TokenBytes(rule, self._model, self.vocab_size, self.eos_id)
        content = json.dumps([self.kind, self.eos_id, model_json])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def from_file(cls, path: str, eos_token: str | None = None) -> Tokenizer:
        """Reads a tokenizer.json of the `tokenizers` package.

        Args:
            path: the file.
            eos_token: the token that ends a document; None takes the first of the usual names
                that the file has, and adds an id where it has none.

        Raises:
            UserError: the file is missing, unreadable, not a tokenizer, cannot spell every byte,
                or lacks `eos_token`.
        """
        text = _read(Path(path))
        try:
            tokenizer = cls(text)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        names = _EOS_NAMES if eos_token is None else (eos_token,)
        ids = (tokenizer._model.token_to_id(name) for name in names)
        eos_id = next((i for i in ids if i is not None), None)
        if eos_id is not None:
            return cls(tokenizer._model_json, eos_id)
        if eos_token is not None:
            raise UserError(f"{path}: has no token {eos_token!r}; name one that it has")
        return tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 `[n]`, with nothing added at either end.

        Raises:
            UserError: the text holds half a surrogate pair, as bytes that are not UTF-8 do on a
                command line.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text; much faster than one by one."""
        data = [_utf8(text) for text in texts]
        if self._model is None:
            return [np.frombuffer(d, np.uint8).astype(np.int32) for d in data]
        # A tokenizer that puts a space before a text would put one before every piece.
        whole = self._bytes.rule.leading_space
        pieces = [[text] if whole else _pieces(text) for text in texts]
        flat = [piece for text in pieces for piece in text]
        encodings = iter(self._model.encode_batch_fast(flat, add_special_tokens=False))
        return [
            np.concatenate([np.array(next(encodings).ids, np.int32) for _ in text])
            for text in pieces
        ]

    @cached_property
    def special(self) -> SpecialTokens:
        """The special tokens, and encoding of text that may spell them."""
        return SpecialTokens(self, self._model, self._model_json)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that token ids spell; the end-of-document id spells none.

        The bytes of two sequences joined are the bytes of the joined sequence.

        Raises:
            ValueError: an id is negative or not below `vocab_size`.
        """
        return self._bytes.join(np.asarray(ids, np.int64).reshape(-1))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids of a whole text; bytes that are not UTF-8 become U+FFFD.

        `decode(encode(text))` is the text, unless a given tokenizer.json normalizes it. To decode
        a text bit by bit use `StreamDecoder`.
        """
        text = self.decode_bytes(ids).decode(errors="replace")
        return text.removeprefix(" ") if self._bytes.rule.leading_space else text

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer into a folder that exists, replacing one that is there.

        Raises:
            UserError: the files cannot be written.
        """
        meta = {
            "version": _META_VERSION,
            "kind": self.kind,
            "eos_id": self.eos_id,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        files = {_META_FILE: json.dumps(meta, indent=2) + "\n"}
        if self._model_json is not None:
            files = {_MODEL_FILE: self._model_json, **files}
        for name, content in files.items():
            target = Path(folder) / name
            part = target.with_name(name + ".part")
            try:
                part.write_bytes(content.encode())
                part.replace(target)
            except OSError as error:
                part.unlink(missing_ok=True) if part.is_file() else None
                raise UserError(
                    f"{target}: cannot be written ({error.strerror or error}); free space or "
                    "choose another folder"
                ) from None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Reads what `save` wrote.

        Raises:
            UserError: a file is missing, damaged, or of another version.
        """
        path = Path(folder) / _META_FILE
        try:
            meta = json.loads(_read(path))
            version, kind = meta["version"], meta["kind"]
            eos_id, fingerprint = meta["eos_id"], meta["fingerprint"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _damaged(path) from None
        if version != _META_VERSION:
            raise UserError(
                f"{path}: version {version!r}, but this program reads version {_META_VERSION}; "
                "use the program that wrote it"
            )
        if kind not in ("bytes", "bpe") or type(eos_id) is not int or eos_id < 0:
            raise _damaged(path)
        model_json = _read(Path(folder) / _MODEL_FILE) if kind == "bpe" else None
        tokenizer = cls(model_json, eos_id)
        if tokenizer.fingerprint != fingerprint:
            raise _damaged(path)
        return tokenizer


def train_bpe(documents: Sequence[Document], vocab_size: int) -> Tokenizer:
    """Trains a byte-level byte-pair encoding (arXiv 1508.07909; over bytes as in GPT-2).

    The same documents give the same tokenizer, whatever the number of threads.

    Args:
        documents: the training documents.
        vocab_size: number of ids wanted, the 256 bytes and the end-of-document id included; a
            small corpus may give fewer.

    Raises:
        UserError: `vocab_size` is below 257.
    """
    if vocab_size < 257:
        raise UserError(
            f"--vocab {vocab_size}: must be at least 257, for 256 bytes and the end of a document"
        )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.pre_tokenizer = byte_level
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (piece for document in documents for piece in _pieces(document.text))
    model.train_from_iterator(texts, trainer)
    return Tokenizer(model.to_str())


def _parse(model_json: str) -> tuple[Any, ByteRule]:
    try:
        model = tokenizers.Tokenizer.from_str(model_json)
        rule = read_byte_rule(json.loads(model_json))
    except Exception as error:  # the package raises bare Exception
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"tokenizer.json: not a tokenizer ({reason}); give a file of the tokenizers package"
        ) from None
    model.no_truncation()
    model.no_padding()
    # Text from a corpus or a prompt must not be able to spell the end of a document.
    model.encode_special_tokens = True
    return model, rule


def _pieces(text: str) -> list[str]:
    """Cuts a very long text behind line ends, to bound the memory of encoding it."""
    pieces = []
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not UTF-8: character {error.start} is {text[error.start]!r}; give text "
            "in UTF-8"
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {error.start}; the file is damaged, restore it"
        ) from None


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: damaged, or not of this tokenizer; restore the folder from a copy")
