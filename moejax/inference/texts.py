"""The texts of requests on their way through the engine."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from moejax.inference.drawing import Level, level_of
from moejax.inference.params import SamplingParams
from moejax.inference.request import Finish
from moejax.inference.row_choice import RowChoice

__all__ = ["Text", "fresh_seed", "make_texts"]


@dataclass(eq=False)
class Text:
    """One text of a request on its way through the engine; only the engine's thread changes it.

    id, index: see `Event`.
    tokens: the prompt and what the host knows of the continuation; texts of one request share
        their prompt until `learn_token`.
    prompt_len: tokens of the prompt.
    limit: most tokens of the text, prompt included.
    ends: ids that end it.
    row: int32 [F], what a device needs to know for choosing its tokens, see `RowChoice`.
    level: what choosing its tokens takes.
    logprobs: how many most probable ids are asked for; None: no log-probabilities.
    penalized: whether choosing a token looks at those before it.
    siblings: texts of the same prompt that begin when this one's prompt has been run.
    device, slot: where it is continued; None while it waits. The slot is a row of the device's
        token history.
    pages: of the device, in order of position.
    keys: of full pages, as far as they have been needed.
    named: pages that are known by their keys.
    reused: positions that were there when the text got its device.
    filled: positions that have been written to the pages, programs under way included.
    pending: tokens that programs under way will have drawn.
    started: it has had a device.
    """

    id: int
    index: int
    tokens: array[int]
    prompt_len: int
    limit: int
    ends: frozenset[int]
    row: np.ndarray
    level: Level = Level.ALL
    logprobs: int | None = None
    penalized: bool = False
    siblings: Sequence[Text] = ()
    device: int | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    named: int = 0
    reused: int = 0
    filled: int = 0
    pending: int = 0
    started: bool = False
    finish: Finish | None = None

    @property
    def total(self) -> int:
        """Tokens of the text, those included that programs under way will have drawn."""
        return len(self.tokens) + self.pending

    @property
    def age(self) -> tuple[int, int]:
        """Sorts texts by their coming; the largest is the youngest."""
        return self.id, self.index

    def learn_token(self, token: int) -> None:
        """Adds a token that has been drawn."""
        if len(self.tokens) == self.prompt_len:
            self.tokens = self.tokens[:]  # from here on its own
        self.tokens.append(token)


def fresh_seed() -> int:
    """A seed that nobody knows before; 64 bits."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])


def make_texts(
    request: int,
    prompt: np.ndarray,
    params: SamplingParams,
    *,
    max_len: int,
    end_ids: Collection[int],
    stream: int,
    least: Level = Level.GREEDY,
) -> list[Text]:
    """The n texts of a request.

    Args:
        request: its id.
        prompt: its tokens, integers [n].
        params: how to continue it; without a seed it gets a fresh one.
        max_len: most tokens of a text.
        end_ids: of the model.
        stream: see `Engine.add`.
        least: of their levels.
    """
    limit = max_len
    if params.max_tokens is not None:
        limit = min(limit, len(prompt) + params.max_tokens)
    ends = frozenset(params.stop_token_ids).union(() if params.ignore_eos else end_ids)
    seed = params.seed
    if seed is None:
        seed = fresh_seed()
    # Four bytes a token, once for all texts: thousands of long prompts may wait.
    shared = array("i", prompt.astype(np.int32).tobytes())
    texts = []
    for index in range(params.n):
        # As in vLLM no id that could end a text comes before `min_tokens`, even if it is ignored.
        early = sorted(ends.union(end_ids))
        row = RowChoice.packed(params, seed, stream + index, len(prompt), early)
        text = Text(request, index, shared, len(prompt), limit, ends, row)
        text.logprobs, text.penalized = params.logprobs, params.has_penalties
        text.level = max(least, level_of([params]))
        texts.append(text)
    return texts
