"""The mode `chat` of `infer.py`: a conversation at the terminal."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.inference.console import interact
from moejax.inference.params import SamplingParams
from moejax.serving.flags import EngineFlags
from moejax.serving.loop import EngineLoop, Piece
from moejax.serving.start import note, running_model
from moejax.serving.text_model import TextModel

__all__ = ["Chat", "ChatConfig", "main"]

DESCRIPTION = """Talks with a model, which remembers what was said.

/clear forgets it, /quit or Ctrl-D ends, Ctrl-C cuts an answer short. Without a terminal each line
of standard input is a turn."""


@dataclass(frozen=True)
class ChatConfig(EngineFlags):
    """A conversation. Sampling that is not given is what the model's makers recommend.

    Attributes:
        system: what the model is told before the first turn.
        max_tokens: most tokens of an answer; 0: as many as the context holds.
        temperature: of the probabilities; 0 takes the most probable token, always.
        top_k: draw from this many most probable tokens; 0: all.
        top_p: draw from the fewest most probable tokens with this mass.
        min_p: draw from tokens at least this times as probable as the most probable.
        seed: of the random numbers; not given: other numbers each time.
    """

    max_rows: int = 1
    system: str = ""
    max_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None


def main(config: ChatConfig) -> None:
    """Talks until the person ends it.

    Raises:
        UserError: whatever a user can mend.
    """
    with running_model(config) as (model, loop):
        chat = Chat(model, loop, config)
        greeting = "Type a message. /clear forgets all, /quit ends."
        interact(lambda lines: chat.turn(lines[0]), greeting)


class Chat:
    """A conversation.

    messages: what was said so far.

    Args:
        model: that answers.
        loop: runs it.
        config: how it answers.

    Raises:
        UserError: a setting is refused.
    """

    def __init__(self, model: TextModel, loop: EngineLoop, config: ChatConfig):
        self._model, self._loop = model, loop
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        given: dict[str, Any] = {
            name: value for name in names if (value := getattr(config, name)) is not None
        }
        most = config.max_tokens or model.defaults.values.get("max_tokens")
        self._params: SamplingParams = model.defaults.params(
            **given, max_tokens=most, stop=model.chat_stop
        )
        self._system = [{"role": "system", "content": config.system}] if config.system else []
        self.messages = list(self._system)

    def turn(self, line: str) -> bool:
        """Answers a line, or obeys one that begins with `/`; whether the conversation ends.

        Raises:
            UserError: the conversation has become too long, or the template refuses it.
        """
        word = line.strip()
        if word == "/quit":
            return True
        if word == "/clear":
            self.messages = list(self._system)
            note("forgotten")
        elif word.startswith("/"):
            raise UserError(f"{word:.40}: no such command; there are /clear and /quit")
        elif word:
            self._answer(line)
        return False

    def _answer(self, line: str) -> None:
        said = [*self.messages, {"role": "user", "content": line}]
        prompt = self._model.encode_chat(said)
        if len(prompt) >= self._loop.engine.max_len:
            raise UserError(
                f"{len(prompt)} tokens were said, and the context holds "
                f"{self._loop.engine.max_len}: begin anew with /clear"
            )
        parts: list[str] = []

        def show(text: str) -> None:
            parts.append(text)
            print(text, end="", flush=True)

        def remember() -> None:
            self.messages = [*said, {"role": "assistant", "content": "".join(parts)}]

        try:
            finish = stream(self._loop, prompt, self._params, show)
        except KeyboardInterrupt:
            remember()  # as far as it was read
            raise
        remember()
        print(flush=True)
        if finish == "length":
            note("[the answer was cut off: --max-tokens are made, or the context is full]")


def stream(
    loop: EngineLoop, prompt: np.ndarray, params: SamplingParams, show: Callable[[str], None]
) -> str:
    """Continues one prompt, shown as it comes; an exception, such as of Ctrl-C, cancels it.

    Returns:
        why the text ended, `stop` or `length`.

    Raises:
        UserError: the prompt is refused, or the engine has failed.
    """
    pieces: queue.Queue[Piece] = queue.Queue()
    ticket = loop.submit([prompt], params, pieces.put)
    try:
        while True:
            piece = pieces.get()
            if piece.text:
                show(piece.text)
            if piece.finish in ("cancelled", "failed"):
                raise UserError("the engine has ended; start again")
            if piece.finish is not None:
                return piece.finish
    finally:
        loop.cancel(ticket)
