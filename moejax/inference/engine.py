"""Continuous batching: texts join and leave between steps, and share the pages of the cache.

Orca, OSDI 2022 (iteration-level scheduling); PagedAttention, arXiv 2309.06180; chunked prefill,
arXiv 2308.16369. Each `Engine.step` starts one decoding step of all texts and, if prompts wait, one
bounded piece of those; then it reads what the step before drew. So the devices work while Python
does, and a text that ended is run once more for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.inference.drawing import Drawn, Level
from moejax.inference.exchange_choice import DecodeExchange, Picked, Timer
from moejax.inference.followers import Sharing
from moejax.inference.memory import default_pages
from moejax.inference.params import SamplingParams
from moejax.inference.placing import ServingPlacement
from moejax.inference.programs import Programs
from moejax.inference.request import (
    EngineSettings,
    EngineStats,
    Event,
    Finish,
    QueueFull,
    TokenLogprobs,
)
from moejax.inference.scheduler import Plan, Scheduler
from moejax.inference.shapes import Shapes
from moejax.inference.step_programs import StepPrograms
from moejax.inference.texts import Text, fresh_seed, make_texts
from moejax.offload.experts import OffloadedExperts
from moejax.offload.programs import OffloadedPrograms
from moejax.training.state import Blueprint

__all__ = ["Engine", "EngineSettings", "EngineStats", "Event", "QueueFull", "TokenLogprobs"]

_MOST_END_IDS = 64


class Engine:
    """Continues the token ids of many requests at once, with a model laid over a mesh.

    One thread calls `step`, `warm_up` and `stats`. `add` and `cancel` may be called from any
    thread: they only leave a note, which the next `step` takes up.

    Args:
        blueprint: model and mesh.
        params: weights split by their use, as from `load_weights`.
        biases: selection biases, likewise.
        sharing: of several processes, see `follow`; None: this one alone calls the engine, or all
            of them make the same calls.
        num_ids: ids from here on are never chosen; None: the model's vocabulary.
        end_ids: ids that end a text, unless `ignore_eos` is set.
        settings: see `EngineSettings`.
        placing: keeps the experts' weights in slots; `blueprint` and `params` are its own then.
        offload: keeps them in host memory; `blueprint` and `params` are the model's without them.

    Raises:
        UserError: a setting does not fit the model.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        params: Any,
        biases: Any,
        *,
        num_ids: int | None = None,
        end_ids: Sequence[int] = (),
        settings: EngineSettings | None = None,
        placing: ServingPlacement | None = None,
        offload: OffloadedExperts | None = None,
        sharing: Sharing | None = None,
    ):
        settings = settings or EngineSettings()
        config = blueprint.config
        longest = config.max_context if settings.max_len is None else settings.max_len
        if longest > config.max_context:
            raise UserError(
                f"max_len={longest}: must lie between 1 and max_context={config.max_context}"
            )
        if len(end_ids) > _MOST_END_IDS:
            raise UserError(f"{len(end_ids)} end_ids: give at most {_MOST_END_IDS}")
        devices = blueprint.shape.data * blueprint.shape.expert
        rows = -(-settings.max_rows // devices)
        pages = settings.pages or default_pages(blueprint, settings.page_len, rows, longest)
        self.settings = settings
        self.max_len = min(longest, pages * settings.page_len)
        self._vocabulary = config.vocab_size
        self._num_ids = config.vocab_size if num_ids is None else num_ids
        self._end_ids = tuple(end_ids)
        self._shapes = Shapes(settings, rows, self.max_len)
        self._scheduler = self._make_scheduler(devices, pages)
        make: Any = Programs
        if offload is not None:
            make = partial(OffloadedPrograms, experts=offload, by_copy=settings.deterministic)
        self._programs: StepPrograms = make(
            blueprint,
            params,
            biases,
            num_ids=self._num_ids,
            slots=rows,
            pages=pages,
            page_len=settings.page_len,
            max_len=self.max_len,
            one_wave=settings.deterministic and blueprint.shape.expert > 1,
            placing=placing,
        )
        self._placing, self._sharing, self._offload = placing, sharing, offload
        # Of other threads: `_lock` guards these four.
        self._lock = threading.Lock()
        self._added: list[list[Text]] = []
        self._cancelled: list[tuple[int, int | None]] = []
        self._next_id = 0
        self._unstarted: set[int] = set()

        self._requests: dict[int, list[Text]] = {}
        self._under_way: list[tuple[Plan, Drawn]] = []
        self._generated = self._decodes = self._prefills = 0

    def add(
        self,
        prompt_ids: Sequence[int] | np.ndarray,
        params: SamplingParams | None = None,
        *,
        stream: int = 0,
    ) -> int:
        """Leaves a request for the next `step`; from any thread.

        Args:
            prompt_ids: at least one token.
            params: how to continue it; stop strings are the caller's affair.
            stream: of the random numbers: the text of index i draws those of stream + i.

        Returns:
            The id of the request, in its events and for `cancel`.

        Raises:
            QueueFull: too many requests wait already.
            UserError: the prompt is empty, holds an id that the model does not have, or is too
                long.
        """
        params = params or SamplingParams()
        tokens = np.asarray(prompt_ids)
        self._check(tokens)
        with self._lock:
            if len(self._unstarted) >= self.settings.max_waiting:
                raise QueueFull(
                    f"{len(self._unstarted)} requests wait already, with max_waiting="
                    f"{self.settings.max_waiting}: try again later"
                )
            request, self._next_id = self._next_id, self._next_id + 1
            self._unstarted.add(request)
        if self._sharing is not None:
            params = replace(params, seed=fresh_seed() if params.seed is None else params.seed)
            self._sharing.remember(request, tokens, params, stream)
        self._leave(request, tokens, params, stream)
        return request

    def _leave(self, request: int, tokens: np.ndarray, params: SamplingParams, stream: int) -> None:
        """The note that a request has come."""
        texts = make_texts(
            request,
            tokens,
            params,
            max_len=self.max_len,
            end_ids=self._end_ids,
            stream=stream,
            # The same program for all, so that a row's bits do not depend on the other rows.
            least=Level.ALL if self.settings.deterministic else Level.GREEDY,
        )
        with self._lock:
            self._added.append(texts)

    def cancel(self, id: int, index: int | None = None) -> None:
        """Ends a request, or one of its texts, at the next `step`; from any thread.

        Texts that have not ended yet give an event. One that is unknown or over is no error: it
        may have ended a moment ago.
        """
        with self._lock:
            self._cancelled.append((id, index))

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._added or self._requests or self._under_way)

    def step(self) -> list[Event]:
        """Starts the next steps on the devices and reads the last ones.

        Returns:
            What is new, the texts of the decoding step first; may be empty while work goes on.
        """
        events: list[Event] = []
        if self._placing is not None:
            self._placing.between_steps()
        self._take_notes(events)
        if self._scheduler.lacks_pages():
            # Texts that end give pages back, and only what is known can be run again.
            self._read(events)
            self._scheduler.preempt()
        started = []
        decode = self._scheduler.plan_decode()
        if decode is not None:
            started.append((decode, self._programs.run(decode)))
            self._decodes += 1
        prefill = self._scheduler.plan_prefill()
        if prefill is not None:
            started.append((prefill, self._programs.run(prefill)))
            self._prefills += 1
            self._no_longer_waits(w.text.id for works in prefill.rows for w in works if w.first)
        self._read(events)
        self._under_way = started
        return events

    def follow(self) -> None:
        """Does the steps that process 0 does, until its engine is closed; of another process."""
        assert self._sharing is not None
        while (notes := self._sharing.next()) is not None:
            for texts, tokens in notes.expected:
                self.expect(texts, tokens)
            for request, prompt, params, stream in notes.added:
                self._leave(request, np.array(prompt), SamplingParams(**params), stream)
            self._cancelled += [(request, index) for request, index in notes.cancelled]
            self.step()

    def pick_exchange(
        self, how: DecodeExchange = "auto", timer: Timer | None = None
    ) -> Picked | None:
        """Chooses how decoding steps exchange rows; before `warm_up`, or its programs are in vain.

        Without it they do as steps with prompts do in any case: as the model's config says, or,
        with deterministic settings, by a ring in one wave.

        Args:
            how, timer: see `exchange_choice.pick`, which also says what is returned and raised.
        """
        return self._programs.pick_exchange(self._shapes.decode_rows(), how, timer)

    def warm_up(self, report: Callable[[int, int], None] | None = None) -> int:
        """Compiles every step that can come, so that no text waits for it later.

        Args:
            report: called with (programs done, programs in all) after each.

        Returns:
            how many programs there are.
        """
        return self._programs.compile_all(self._shapes.all(), report)

    def stats(self) -> EngineStats:
        """What the engine is doing and has done."""
        scheduler, pools = self._scheduler, self._scheduler.pools
        running = scheduler.running
        texts = sum(map(len, self._requests.values())) + sum(map(len, self._added))
        return EngineStats(
            running=running,
            waiting=texts - running,
            rows=self._shapes.rows * len(pools),
            pages=sum(pool.size for pool in pools),
            pages_held=sum(pool.held for pool in pools),
            pages_kept=sum(pool.kept for pool in pools),
            prompt_tokens=scheduler.prompt_tokens,
            reused_tokens=scheduler.reused_tokens,
            generated_tokens=self._generated,
            preemptions=scheduler.preemptions,
            decode_steps=self._decodes,
            prefill_steps=self._prefills,
            programs=self._programs.compiled(),
            placement=None if self._placing is None else self._placing.stats(),
            offload=None if self._offload is None else self._offload.stats(),
        )

    def expect(self, texts: int, tokens: int) -> None:
        """Lets steps be at least large enough for so many texts that get so long.

        Fewer programs are compiled then, where a few texts are all there is, and more of each step
        is padding.
        """
        if self._sharing is not None and self._sharing.leads:
            self._sharing.expect(texts, tokens)
        self._shapes.expect(-(-texts // len(self._scheduler.pools)), tokens)

    def reset(self) -> None:
        """Forgets all requests and pages, but no program: after an exception came out of `step`."""
        pools = self._scheduler.pools
        with self._lock:
            self._added, self._cancelled, self._unstarted = [], [], set()
        self._requests, self._under_way = {}, []
        self._programs.reset()
        self._scheduler = self._make_scheduler(len(pools), pools[0].size)

    def close(self) -> None:
        """Ends what goes on beside the steps; when no step comes any more."""
        if self._placing is not None:
            self._placing.close()
        if self._offload is not None:
            self._offload.close()
        if self._sharing is not None and self._sharing.leads:
            self._sharing.end()

    def _make_scheduler(self, devices: int, pages: int) -> Scheduler:
        settings = self.settings
        return Scheduler(
            self._shapes,
            devices,
            pages,
            settings.page_len,
            reuse=settings.prefix_reuse and not settings.deterministic,
            reserve=settings.deterministic,
        )

    def _check(self, tokens: np.ndarray) -> None:
        if tokens.ndim != 1 or tokens.size == 0:
            raise UserError("no prompt, or one without tokens: give at least one token each")
        if not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"a prompt of {tokens.dtype}: give token ids, which are integers")
        vocabulary = self._vocabulary
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            wrong = tokens[(tokens < 0) | (tokens >= vocabulary)][0]
            raise UserError(
                f"a prompt with token id {wrong}: ids lie between 0 and {vocabulary - 1}"
            )
        if len(tokens) >= self.max_len:
            raise UserError(
                f"a prompt of {len(tokens)} tokens: prompt and continuation share a context of "
                f"{self.max_len} tokens; give at most {self.max_len - 1}"
            )

    def _take_notes(self, events: list[Event]) -> None:
        """Takes up what `add` and `cancel` left."""
        with self._lock:
            added, self._added = self._added, []
            cancelled, self._cancelled = self._cancelled, []
        if self._sharing is not None and self._sharing.leads:
            self._sharing.tell([texts[0].id for texts in added], cancelled)
        for texts in added:
            self._requests[texts[0].id] = list(texts)
            self._scheduler.submit(texts)
        for request, index in cancelled:
            for text in list(self._requests.get(request, ())):
                if index in (None, text.index):
                    self._finish(text, "cancelled")
                    events.append(Event(text.id, text.index, finish="cancelled"))

    def _no_longer_waits(self, requests: Iterable[int]) -> None:
        with self._lock:
            self._unstarted.difference_update(requests)

    def _finish(self, text: Text, finish: Finish) -> None:
        self._scheduler.finish(text, finish)
        texts = self._requests[text.id]
        texts.remove(text)
        if not texts:
            del self._requests[text.id]
            self._no_longer_waits([text.id])

    def _read(self, events: list[Event]) -> None:
        """Waits for the steps under way and turns what they drew into events."""
        for plan, drawn in self._under_way:
            token_B, logprob_B, ids_Bk, logprobs_Bk = drawn.read()
            for device, works in enumerate(plan.rows):
                for row, work in enumerate(works, device * plan.shape.rows):
                    text = work.text
                    if not work.draws or text.finish is not None:
                        continue
                    logprobs: tuple[TokenLogprobs, ...] = ()
                    if text.logprobs is not None:
                        k = text.logprobs
                        top = tuple(ids_Bk[row, :k].tolist()), tuple(logprobs_Bk[row, :k].tolist())
                        logprobs = (TokenLogprobs(float(logprob_B[row]), *top),)
                    events.append(self._append(text, int(token_B[row]), logprobs))
        self._under_way = []

    def _append(self, text: Text, token: int, logprobs: tuple[TokenLogprobs, ...]) -> Event:
        text.pending -= 1
        if token in text.ends:
            self._finish(text, "stop")
            return Event(text.id, text.index, finish="stop", stop_id=token)
        text.learn_token(token)
        self._scheduler.learn(text)
        self._generated += 1
        finish: Finish | None = "length" if len(text.tokens) == text.limit else None
        if finish is not None:
            self._finish(text, finish)
        return Event(text.id, text.index, (token,), logprobs, finish)
