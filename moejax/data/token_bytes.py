"""Which bytes each token spells, and decoding a stream of tokens.

Bytes, not characters, are what a token stands for: a character may be spread over several tokens,
so a model that emits one token at a time can only be shown as text once a character is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.data.tokenizer import Tokenizer

__all__ = ["ByteRule", "StreamDecoder", "TokenBytes", "read_byte_rule"]


@dataclass(frozen=True)
class ByteRule:
    """How the tokens of a tokenizer spell bytes.

    spelling: `bytes`: an id is a byte; `byte_level`: each character of a token stands for a byte
        (GPT-2); `byte_fallback`: tokens are text with "▁" for a space, and `<0xNN>` is a byte
        (SentencePiece).
    leading_space: encoding puts a space before the text.
    """

    spelling: Literal["bytes", "byte_level", "byte_fallback"]
    leading_space: bool


def read_byte_rule(model: dict[str, Any]) -> ByteRule:
    """Finds the rule in the parsed text of a tokenizer.json.

    Raises:
        UserError: the tokenizer cannot spell every byte, so it would lose text.
    """
    normalizers, pre_tokenizers, decoders = (
        _parts(model.get(key), inner)
        for key, inner in (
            ("normalizer", "normalizers"),
            ("pre_tokenizer", "pretokenizers"),
            ("decoder", "decoders"),
        )
    )
    leading_space = (
        "Prepend" in normalizers
        or pre_tokenizers.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        or pre_tokenizers.get("ByteLevel", {}).get("add_prefix_space", False)
    )
    if "ByteLevel" in decoders:
        return ByteRule("byte_level", leading_space)
    if model.get("model", {}).get("byte_fallback"):
        return ByteRule("byte_fallback", leading_space)
    raise _loses_text("is neither byte-level nor has byte fallback")


def _loses_text(reason: str) -> UserError:
    return UserError(
        f"tokenizer.json: {reason}, so it would lose text; give a byte-level tokenizer or one "
        "with byte fallback"
    )


def _parts(part: dict[str, Any] | None, inner: str) -> dict[str, dict[str, Any]]:
    """The members of a possibly nested part of a tokenizer.json, by type."""
    if part is None:
        return {}
    if part.get("type") == "Sequence":
        return {t: p for member in part[inner] for t, p in _parts(member, inner).items()}
    return {part["type"]: part}


class TokenBytes:
    """The bytes of every token id."""

    def __init__(self, rule: ByteRule, model: Any, vocab_size: int, eos_id: int):
        """Builds the table; `model` is a `tokenizers.Tokenizer`, or None for bytes."""
        self.rule = rule
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._table = [] if model is None else _table(rule, model, vocab_size, eos_id)

    def join(self, ids: np.ndarray) -> bytes:
        """The bytes of token ids int64 `[n]`.

        Raises:
            ValueError: an id is negative or not below the vocabulary's size.
        """
        if ids.size and not (ids.min() >= 0 and ids.max() < self._vocab_size):
            raise ValueError(
                f"token ids lie between {ids.min()} and {ids.max()}: the vocabulary has ids 0 to "
                f"{self._vocab_size - 1}"
            )
        if self.rule.spelling == "bytes":
            return ids[ids != self._eos_id].astype(np.uint8).tobytes()
        return b"".join([self._table[i] for i in ids.tolist()])


def _table(rule: ByteRule, model: Any, vocab_size: int, eos_id: int) -> list[bytes]:
    added = model.get_added_tokens_decoder()
    fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    byte_of = _byte_level_alphabet()
    table = [b""] * vocab_size
    for token, index in model.get_vocab(with_added_tokens=True).items():
        if rule.spelling == "byte_fallback" and token in fallback:
            table[index] = fallback[token]
        elif index in added or (rule.spelling == "byte_level" and not byte_of.keys() >= set(token)):
            # An added token, or one such as <unk>, is text as it stands, in no alphabet.
            table[index] = token.encode()
        elif rule.spelling == "byte_level":
            table[index] = bytes(byte_of[c] for c in token)
        else:
            table[index] = token.replace("▁", " ").encode()
    table[eos_id] = b""
    missing = sorted({bytes([b]) for b in range(256)} - set(table))
    if missing:
        raise _loses_text(f"has no token for {len(missing)} bytes such as 0x{missing[0].hex()}")
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """The character that GPT-2's encoding writes for each byte.

    Bytes that print in Latin-1 stand for themselves, the others are numbered from U+0100.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in set(printing)]
    return {chr(b): b for b in printing} | {chr(0x100 + i): b for i, b in enumerate(other)}


class StreamDecoder:
    """Turns tokens into text as they come, a character only once all its bytes are there.

    What `push` and `flush` return, joined, is the text of all tokens; bytes that are not UTF-8
    become U+FFFD. A leading space is kept, since a continuation may begin with one.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Begins a text of `tokenizer`."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Sequence[int] | np.ndarray) -> str:
        """Takes one more token or several; returns the text that they complete, maybe none."""
        return self._decoder.decode(self._tokenizer.decode_bytes(np.atleast_1d(ids)))

    def flush(self) -> str:
        """Ends the text; returns U+FFFD for a character left incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
