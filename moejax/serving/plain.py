"""Continues texts at the terminal, as `infer.py` does without a mode."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import replace

from moejax.errors import UserError
from moejax.inference.params import SamplingParams
from moejax.inference.text import Completion
from moejax.serving.loop import EngineLoop, Piece
from moejax.serving.text_model import TextModel

__all__ = ["continue_together"]


def continue_together(
    model: TextModel,
    loop: EngineLoop,
    prompts: Sequence[str],
    params: SamplingParams,
    on_text: Callable[[int, str], None],
) -> list[Completion]:
    """Continues texts together; an exception, such as of Ctrl-C, cancels all.

    Args:
        model: of the texts.
        loop: runs it; no other request is under way.
        prompts: an empty one begins a new text.
        params: how to continue them; each text has random numbers of its own.
        on_text: called with (index of the prompt, text) as text comes.

    Returns:
        A continuation for each prompt.

    Raises:
        UserError: a prompt is refused, or the engine has failed.
    """
    ids = [model.encode(prompt) for prompt in prompts]
    engine, most = loop.engine, params.max_tokens or loop.engine.max_len
    longest = max(map(len, ids)) + most
    # A few programs serve all: texts that get longer or end first need no others.
    engine.expect(len(ids), min(longest, engine.max_len))
    pieces: queue.Queue[tuple[int, Piece]] = queue.Queue()
    found = [Completion("", 0, "end")] * len(ids)
    tickets, left = [], len(ids)
    try:
        for index, prompt in enumerate(ids):

            def listen(piece: Piece, index: int = index) -> None:
                pieces.put((index, piece))

            tickets.append(loop.submit([prompt], params, listen, stream=index))
        while left:
            index, piece = pieces.get()
            if piece.finish in ("cancelled", "failed"):
                raise UserError("the engine has ended; start again")
            one = found[index]
            count = one.num_tokens + len(piece.tokens)
            one = replace(one, text=one.text + piece.text, num_tokens=count)
            if piece.finish == "length":
                one = replace(one, reason="max_tokens" if count == most else "context")
            elif piece.finish == "stop":
                one = replace(one, reason="stop" if piece.stopped else "end")
            found[index] = one
            if piece.text:
                on_text(index, piece.text)
            left -= piece.finish is not None
    finally:
        for ticket in tickets:
            loop.cancel(ticket)
    return found
