"""Text that may spell special tokens, as the text of a chat template does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

if TYPE_CHECKING:
    from moejax.data.tokenizer import Tokenizer

__all__ = ["SpecialTokens", "Written"]

Written = Callable[[int, int], bool]
"""Says of a place [start, end) of a text that spells a special token whether it is one."""


def _everywhere(start: int, end: int) -> bool:
    return True


@dataclass(frozen=True)
class _Place:
    """Where a text spells a special token: [start, end), the spaces that it takes in included."""

    start: int
    end: int
    id: int


class SpecialTokens:
    """The special tokens of a tokenizer and the text between them.

    ids: the id of each, by the text that spells it.
    names: the text that spells each, by its id.
    """

    ids: dict[str, int]
    names: dict[int, str]

    def __init__(self, tokenizer: Tokenizer, model: Any, model_json: str | None):
        """Reads them; `model` is a `tokenizers.Tokenizer` of `model_json`, or None for bytes."""
        added = {} if model is None else model.get_added_tokens_decoder()
        self._tokens = {t.content: t for t in added.values() if t.special and t.content}
        self.ids = {t.content: i for i, t in added.items() if t.content in self._tokens}
        self.names = {i: name for name, i in self.ids.items()}
        self._tokenizer = tokenizer
        # The longest of those that begin at the same place counts.
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(self._expression, longest_first)) or "(?!)")
        self._later = _without_first_space(model_json)

    def _expression(self, name: str) -> str:
        escaped = re.escape(name)
        return rf"(?<!\w){escaped}(?!\w)" if self._tokens[name].single_word else escaped

    def find(self, text: str, written: Written = _everywhere) -> list[int]:
        """The ids of the special tokens that `encode` finds in a text."""
        return [place.id for place in self._places(text, written)]

    def encode(self, text: str, written: Written = _everywhere) -> np.ndarray:
        """Token ids int32 [n] of a text in which special tokens may be spelled.

        The text between them is encoded as text, which never gives a special token.

        Args:
            text: any text.
            written: says of a place [start, end) that spells a special token whether it stands
                for the token; where not, it is text.

        Raises:
            UserError: the text is not UTF-8.
        """
        parts: list[np.ndarray] = []
        begin = 0
        for place in self._places(text, written):
            parts.append(self._encode_text(text[begin : place.start], begin))
            parts.append(np.array([place.id], np.int32))
            begin = place.end
        parts.append(self._encode_text(text[begin:], begin))
        return np.concatenate(parts)

    def _places(self, text: str, written: Written) -> list[_Place]:
        places: list[_Place] = []
        position = 0
        while match := self._pattern.search(text, position):
            start, end = match.span()
            if not written(start, end):
                position = start + 1  # another one may begin inside
                continue
            token = self._tokens[match[0]]
            least = places[-1].end if places else 0
            if token.lstrip:
                start = len(text[least:start].rstrip()) + least
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            places.append(_Place(start, end, self.ids[match[0]]))
            position = end
        return places

    def _encode_text(self, text: str, begin: int) -> np.ndarray:
        if not text:
            return np.zeros(0, np.int32)
        if begin == 0 or self._later is None:
            return self._tokenizer.encode(text)
        return np.array(self._later.encode(text, add_special_tokens=False).ids, np.int32)


def _without_first_space(model_json: str | None) -> Any:
    """The tokenizer of later pieces where only the first one gets a space; else None."""
    model = json.loads(model_json) if model_json and '"prepend_scheme"' in model_json else {}
    part = model.get("pre_tokenizer") or {}
    members = [part, *part.get("pretokenizers", ())]
    first = [member for member in members if member.get("prepend_scheme") == "first"]
    if not first:
        return None
    for member in first:
        member["prepend_scheme"] = "never"
    later = tokenizers.Tokenizer.from_str(json.dumps(model))
    later.no_truncation()
    later.no_padding()
    later.encode_special_tokens = True
    return later
