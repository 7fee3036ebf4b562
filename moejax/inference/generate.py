"""Generation of token ids, all prompts at once and awaited: a short form of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moejax.errors import UserError
from moejax.inference.engine import Engine, EngineSettings, Event
from moejax.inference.params import SamplingParams
from moejax.inference.sampling import SamplingConfig
from moejax.training.state import Blueprint

__all__ = ["Generated", "Generator"]

_ROWS_OF_DEVICE = 8  # texts that run at once; more wait for their turn
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Generated:
    """The continuation of one prompt.

    tokens: int32 [n], the end-of-text id left out.
    reason: why it ended: the model ended the text, the caller stopped it, `max_tokens` were made,
        or the context was full.
    """

    tokens: np.ndarray
    reason: Literal["end", "stopped", "max_tokens", "context"]


class Generator:
    """Continues token ids with a model laid over a mesh.

    Args:
        blueprint: model and mesh.
        params: weights split by their use, as from `load_weights`.
        biases: selection biases, likewise.
        max_len: most tokens of a text, prompt included; None: the model's context.
        num_ids: ids from here on are never chosen; None: the model's vocabulary.

    Raises:
        UserError: `max_len` is longer than the model's context.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        params: Any,
        biases: Any,
        max_len: int | None = None,
        num_ids: int | None = None,
    ):
        self.blueprint = blueprint
        settings = EngineSettings(
            max_rows=_ROWS_OF_DEVICE * blueprint.shape.data * blueprint.shape.expert,
            max_len=max_len,
            max_waiting=_NO_LIMIT,
            # The same call gives the same bits, whatever was generated before.
            prefix_reuse=False,
        )
        self._engine = Engine(blueprint, params, biases, num_ids=num_ids, settings=settings)
        self.max_len = self._engine.max_len

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        sampling: SamplingConfig,
        max_tokens: int,
        end_id: int | None = None,
        requests: Sequence[int] | None = None,
        on_token: Callable[[int, int], bool] | None = None,
    ) -> list[Generated]:
        """Continues prompts of any lengths together.

        Args:
            prompts: token ids int32 [n], at least one each.
            sampling: how tokens are drawn.
            max_tokens: most tokens of a continuation.
            end_id: the id that ends a text; None: none does.
            requests: a number for each prompt, of which its random numbers depend; None counts.
            on_token: called with (index of the prompt, id) for each token as it comes, but for
                the end's; True stops that prompt.

        Returns:
            A continuation for each prompt.

        Raises:
            UserError: there is no prompt, one is empty or does not fit the context, or
                `max_tokens` is less than 1.
        """
        self._check(prompts, max_tokens)
        lengths = [len(prompt) for prompt in prompts]
        params = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            max_tokens=min(max_tokens, self.max_len),
            stop_token_ids=() if end_id is None else (end_id,),
        )
        engine = self._engine
        # A few programs serve all of a call: texts that get longer or end first need no others.
        engine.expect(len(prompts), min(max(lengths) + max_tokens, self.max_len))
        streams = range(len(prompts)) if requests is None else requests
        made: list[list[int]] = [[] for _ in prompts]
        reasons: dict[int, Any] = {}

        def take(index: int, event: Event) -> None:
            for token in event.tokens:
                made[index].append(token)
                if on_token is not None and on_token(index, token):
                    reasons[index] = "stopped"
                    engine.cancel(event.id)
                    return
            if event.finish == "stop":
                reasons[index] = "end"
            elif event.finish == "length":
                reasons[index] = "max_tokens" if len(made[index]) == max_tokens else "context"

        try:
            index_of = {
                engine.add(prompt, params, stream=int(stream)): index
                for index, (prompt, stream) in enumerate(zip(prompts, streams, strict=True))
            }
            while engine.has_work:
                for event in engine.step():
                    index = index_of[event.id]
                    if index not in reasons:
                        take(index, event)
        except BaseException:  # Ctrl-C, too, may have come in the middle of a step
            engine.reset()
            raise
        return [Generated(np.array(m, np.int32), reasons[i]) for i, m in enumerate(made)]

    def _check(self, prompts: Sequence[np.ndarray], max_tokens: int) -> None:
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: must be at least 1")
        if not prompts or min(map(len, prompts)) == 0:
            raise UserError("no prompt, or one without tokens: give at least one token each")
        longest = max(map(len, prompts))
        if longest >= self.max_len:
            raise UserError(
                f"a prompt of {longest} tokens: prompt and continuation share a context of "
                f"{self.max_len} tokens; give at most {self.max_len - 1}"
            )
