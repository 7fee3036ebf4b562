"""Generation of text: tokens to characters as they come, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moejax.data.token_bytes import StreamDecoder
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.generate import Generator
from moejax.inference.sampling import SamplingConfig

__all__ = ["Completion", "TextStream", "TokenText", "complete", "token_text"]


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    text: without the stop string.
    num_tokens: how many were made, those of the stop string included.
    reason: the model ended the text, a stop string came, `max_tokens` were made, or the context
        was full.
    """

    text: str
    num_tokens: int
    reason: Literal["end", "stop", "max_tokens", "context"]


@dataclass(frozen=True)
class TokenText:
    """What one token spells.

    bytes: none for the end of a text and nothing but a part of a character for some.
    text: the bytes as text, U+FFFD for what alone is no character; a special token's own name.
    """

    bytes: bytes
    text: str


def token_text(tokenizer: Tokenizer, token: int) -> TokenText:
    """What a token spells by itself, as lists of log-probabilities show it.

    Raises:
        ValueError: the vocabulary has no such id.
    """
    spelled = tokenizer.decode_bytes([token])
    return TokenText(spelled, tokenizer.special.names.get(token, spelled.decode(errors="replace")))


class TextStream:
    """Turns tokens into text and ends it before the first stop string.

    Special tokens are no text, as in vLLM (`skip_special_tokens`). Text that may yet turn out to
    begin a stop string is held back until that is decided. Of several stop strings the first to be
    complete counts, and the longest of those that end together, so that the result does not depend
    on where tokens end. As in vLLM one that the first `min_tokens` tokens complete is plain text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0):
        """Begins a text.

        Args:
            tokenizer: of the text.
            stop: strings that end it.
            min_tokens: tokens, special ones included, in which no stop string is looked for.

        Raises:
            UserError: a stop string is empty.
        """
        if "" in stop:
            raise UserError("stop '': an empty stop string would end every text at once; drop it")
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._special = tokenizer.special.names
        self._left = min_tokens
        self._held = ""
        self._early = 0  # characters at the head of `_held` that the first `min_tokens` made
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is now certain, maybe none."""
        self._left -= 1
        if token in self._special:
            return ""
        return self._take(self._decoder.push(token))

    def flush(self) -> str:
        """Ends the text; returns what was held back."""
        shown = self._take(self._decoder.flush())
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        if self._left >= 0:
            self._early = len(self._held)
        # A stop string may begin in the early text, but not end there.
        starts = [
            (self._held.find(stop, max(0, self._early - len(stop) + 1)), stop)
            for stop in self._stop
        ]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        self._early = max(0, self._early - cut)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def complete(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    sampling: SamplingConfig,
    max_tokens: int,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Continues texts together.

    Args:
        generator: the model.
        tokenizer: of its texts.
        prompts: an empty one begins a new text.
        sampling: how tokens are drawn.
        max_tokens: most tokens of a continuation.
        stop: strings that end a continuation, wherever token borders fall.
        on_text: called with (index of the prompt, text) as text comes.

    Returns:
        A continuation for each prompt.

    Raises:
        UserError: a prompt does not fit the context or is not UTF-8, or a setting is refused.
    """
    streams = [TextStream(tokenizer, stop) for _ in prompts]
    texts = [""] * len(prompts)

    def show(index: int, text: str) -> None:
        texts[index] += text
        if text and on_text is not None:
            on_text(index, text)

    def on_token(index: int, token: int) -> bool:
        show(index, streams[index].push(token))
        return streams[index].stopped

    # The id that ends a text also stands before the next one.
    new_text = np.array([tokenizer.eos_id], np.int32)
    results = generator.generate(
        [ids if len(ids) else new_text for ids in tokenizer.encode_batch(prompts)],
        sampling=sampling,
        max_tokens=max_tokens,
        end_id=tokenizer.eos_id,
        on_token=on_token,
    )
    for index, stream in enumerate(streams):
        show(index, stream.flush())
    reasons = [
        "stop" if stream.stopped else result.reason for stream, result in zip(streams, results)
    ]
    return [
        Completion(text, len(result.tokens), reason)  # type: ignore[arg-type]
        for text, result, reason in zip(texts, results, reasons)
    ]
