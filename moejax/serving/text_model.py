"""What a server must know of a model besides its weights: texts to ids, chats, defaults, ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.chat import ChatTemplate
from moejax.inference.defaults import GenerationDefaults
from moejax.inference.source import ModelSource
from moejax.inference.text import TextStream, TokenText, token_text

__all__ = ["TextModel", "end_ids"]

_LEAST_CHARACTERS = 16


def end_ids(source: ModelSource) -> tuple[int, ...]:
    """All ids that end a text: of the weights' folder and of its generation_config.json."""
    defaults = GenerationDefaults.read(source.path)
    return tuple(dict.fromkeys((*source.end_ids, *defaults.end_ids)))


@dataclass
class TextModel:
    """A model as clients see it.

    name: that requests ask for.
    tokenizer: of its texts.
    template: of its chats; None where there will be none.
    defaults: sampling that its makers recommend.
    end_ids, bos_id: see `ModelSource`.
    """

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    end_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self) -> None:
        # One process renders all chats.
        self._rendering = threading.Lock()

    @classmethod
    def open(cls, source: ModelSource, name: str = "", *, chats: bool = True) -> TextModel:
        """Reads the texts' part of a model.

        Args:
            source: the model.
            name: for its clients; empty takes that of the folder.
            chats: there will be chats, so a template must be usable if the folder has one.

        Raises:
            UserError: there is no tokenizer, or a file is damaged.
        """
        tokenizer = source.need_tokenizer()
        return cls(
            name or source.path.resolve().name,
            tokenizer,
            ChatTemplate(source.path, tokenizer, bos_id=source.bos_id) if chats else None,
            GenerationDefaults.read(source.path),
            end_ids(source),
            source.bos_id,
        )

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text to be continued, int32 [n], n > 0; of an empty one the beginning of a text.

        Raises:
            UserError: it is not UTF-8.
        """
        ids = self.tokenizer.encode(text)
        if self.bos_id is not None:
            return np.insert(ids, 0, np.int32(self.bos_id))
        # The id that ends a text also stands before the next one.
        return ids if len(ids) else np.array([self.tokenizer.eos_id], np.int32)

    @cached_property
    def token_characters(self) -> int:
        """More characters than this for each token no text has, so a longer one is not encoded.

        That of the longest token; at least 16, as templates and tokenizers may drop spaces.
        """
        ids = range(self.tokenizer.vocab_size)
        return max(_LEAST_CHARACTERS, *(len(self.tokenizer.decode_bytes([i])) for i in ids))

    @property
    def chat_stop(self) -> tuple[str, ...]:
        """Strings that end an answer in a chat."""
        return () if self.template is None else self.template.stop

    def encode_chat(self, messages: Any, variables: Any = None) -> np.ndarray:
        """Ids of a chat up to where the answer begins, int32 [n]; from any thread.

        Raises:
            UserError: the messages are refused.
        """
        assert self.template is not None
        with self._rendering:
            return self.template.encode_chat(messages, variables=variables)

    def spell(self, token: int) -> TokenText:
        """What an id spells; nothing for ids beyond the tokenizer, which no text has."""
        if token >= self.tokenizer.vocab_size:
            return TokenText(b"", "")
        return token_text(self.tokenizer, token)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of ids that continue another, as they would have come from the engine."""
        stream = TextStream(self.tokenizer)
        known = (token for token in ids if token < self.tokenizer.vocab_size)
        return "".join([*map(stream.push, known), stream.flush()])

    def token_ids(self, ids: list[int]) -> np.ndarray:
        """Ids that a client gives in the place of a text.

        Raises:
            UserError: one is no id.
        """
        if not ids or min(ids) < 0 or max(ids) >= 2**31:
            raise UserError("prompt: token ids must be at least one, from 0 on")
        return np.array(ids, np.int32)

    def close(self) -> None:
        """Ends the process that renders chats."""
        if self.template is not None:
            self.template.close()
