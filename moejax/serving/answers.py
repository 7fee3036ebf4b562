"""Pieces of text become what OpenAI's clients read: chunks of a stream, or one body."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from moejax.inference.engine import TokenLogprobs
from moejax.serving.errors import ApiError
from moejax.serving.loop import Piece
from moejax.serving.protocol import Job
from moejax.serving.text_model import TextModel

__all__ = ["Answer"]

_NAMES = {
    ("completion", False): ("cmpl", "text_completion"),
    ("completion", True): ("cmpl", "text_completion"),
    ("chat", False): ("chatcmpl", "chat.completion"),
    ("chat", True): ("chatcmpl", "chat.completion.chunk"),
}


class _Choice:
    """What is known of one text."""

    def __init__(self, echo: str):
        self.begun = False
        self.text = echo
        self.finish: str | None = None
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        # Characters before the next token, for OpenAI's older form of log-probabilities.
        self.offset = len(echo)


class Answer:
    """The answer to one job, as its pieces come in.

    Args:
        job: the request.
        model: its model.
    """

    def __init__(self, job: Job, model: TextModel):
        self._job, self._model = job, model
        prefix, kind = _NAMES[job.kind, job.stream]
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._head = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": model.name,
        }
        echoes = job.echo or ("",) * len(job.prompts)
        self._choices = [_Choice(echo) for echo in echoes for _ in range(job.params.n)]

    @property
    def done(self) -> bool:
        """Whether all texts have ended."""
        return all(choice.finish is not None for choice in self._choices)

    @property
    def generated(self) -> int:
        """Tokens made so far."""
        return sum(len(choice.tokens) for choice in self._choices)

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """Takes a piece; returns the chunks of a stream that are due, maybe none.

        Raises:
            ApiError: the engine gave the request up.
        """
        if piece.finish == "cancelled":
            raise ApiError(503, "the server was stopped before the text ended", code="stopping")
        if piece.finish == "failed":
            raise ApiError(500, "the engine has failed; see the server's log", code="engine_failed")
        choice = self._choices[piece.choice]
        choice.text += piece.text
        choice.tokens += piece.tokens
        choice.logprobs += piece.logprobs
        choice.finish = piece.finish
        return list(self._chunks(piece, choice)) if self._job.stream else []

    def last_chunks(self) -> list[dict[str, Any]]:
        """What a stream ends with, when all texts have."""
        if not self._job.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": self.usage()}]

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, choice in enumerate(self._choices):
            tokens, logprobs = choice.tokens, choice.logprobs
            out: dict[str, Any] = {"index": index, "finish_reason": choice.finish}
            out["logprobs"] = self._logprobs(tokens, logprobs, choice)
            if self._job.kind == "chat":
                out["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                out["text"] = choice.text
            choices.append(out)
        return {**self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of the texts, ids that ended a text left out."""
        prompts = sum(map(len, self._job.prompts))
        return {
            "prompt_tokens": prompts,
            "completion_tokens": self.generated,
            "total_tokens": prompts + self.generated,
        }

    def _chunks(self, piece: Piece, choice: _Choice) -> Iterator[dict[str, Any]]:
        text = piece.text
        if not choice.begun:
            choice.begun = True
            if self._job.kind == "chat":
                yield self._chunk(piece.choice, {"delta": {"role": "assistant", "content": ""}})
            else:
                text = choice.text  # with the echo
        logprobs = self._logprobs(list(piece.tokens), list(piece.logprobs), choice)
        # A token may have no text yet and log-probabilities already.
        if text or logprobs or (piece.finish and self._job.kind == "completion"):
            content = {"delta": {"content": text}} if self._job.kind == "chat" else {"text": text}
            reason = piece.finish if self._job.kind == "completion" else None
            yield self._chunk(piece.choice, content, logprobs, reason)
        if piece.finish and self._job.kind == "chat":
            yield self._chunk(piece.choice, {"delta": {}}, None, piece.finish)

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        # Clients that asked for it are told in every chunk but the last that it is yet to come.
        usage = {"usage": None} if self._job.include_usage else {}
        return {**self._head, "choices": [choice], **usage}

    # --- log-probabilities --------------------------------------------------------------------

    def _logprobs(
        self, tokens: list[int], logprobs: list[TokenLogprobs], choice: _Choice
    ) -> dict[str, Any] | None:
        """Of some tokens of a text; None if they were not asked for, or there are no tokens."""
        if self._job.params.logprobs is None or not (tokens or not self._job.stream):
            return None
        if self._job.kind == "chat":
            return {"content": list(map(self._chat_style, tokens, logprobs)), "refusal": None}
        return self._completion_style(tokens, logprobs, choice)

    def _chat_style(self, token: int, found: TokenLogprobs) -> dict[str, Any]:
        top = zip(found.top_ids, found.top_logprobs)
        return {
            **self._spelled(token, found.logprob),
            "top_logprobs": [self._spelled(one, logprob) for one, logprob in top],
        }

    def _completion_style(
        self, tokens: list[int], logprobs: list[TokenLogprobs], choice: _Choice
    ) -> dict[str, Any]:
        names, offsets, top = [], [], []
        for token, found in zip(tokens, logprobs):
            name = self._name(token)
            names.append(name)
            offsets.append(choice.offset)
            choice.offset += len(name)
            best = zip(map(self._name, found.top_ids), map(_finite, found.top_logprobs))
            top.append({name: _finite(found.logprob), **dict(best)})
        return {
            "tokens": names,
            "token_logprobs": [_finite(found.logprob) for found in logprobs],
            "top_logprobs": top if self._job.params.logprobs else None,
            "text_offset": offsets,
        }

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self._model.spell(token)
        return {
            "token": spelled.text,
            "logprob": _finite(logprob),
            "bytes": list(spelled.bytes),
        }

    def _name(self, token: int) -> str:
        """Of the older form: bytes that are no UTF-8 by themselves are told apart."""
        spelled = self._model.spell(token)
        try:
            spelled.bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled.bytes)
        return spelled.text


def _finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes -9999 for what cannot be."""
    return max(logprob, -9999.0)
