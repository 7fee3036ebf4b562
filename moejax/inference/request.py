"""What goes into the engine and what comes out: settings, events, counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moejax.errors import UserError
from moejax.offload.statistics import OffloadStats

__all__ = [
    "EngineSettings",
    "EngineStats",
    "Event",
    "Finish",
    "PlacementStats",
    "QueueFull",
    "TokenLogprobs",
]

Finish = Literal["stop", "length", "cancelled"]


class QueueFull(UserError):
    """More requests wait than `EngineSettings.max_waiting` allows; try again later."""


@dataclass(frozen=True)
class EngineSettings:
    """How much an engine does at once.

    Attributes:
        max_rows: most texts continued at once, of all devices together; rounded up to the same
            number on every device (data × expert).
        page_len: positions of a page of the key-value cache, in tokens; kernels take powers of 2,
            on TPU from 16 on.
        pages: pages of each device; None: as many as `max_rows` texts of `max_len` tokens need, or
            as fit into what memory the device reports to be free.
        prefill_chunk: most tokens of prompts that a device runs between two decoding steps.
        max_len: most tokens of a text, prompt included; None: the model's context.
        max_waiting: most requests that wait for their start; `Engine.add` refuses more.
        prefix_reuse: keep pages of texts that ended for later ones that begin alike. A reused key
            may differ in its last bits from one that is computed again.
        deterministic: every step has the largest shape, no prefix is reused and a text reserves all
            its pages at its start, so that its bits do not depend on the other texts.
    """

    max_rows: int = 64
    page_len: int = 64
    pages: int | None = None
    prefill_chunk: int = 512
    max_len: int | None = None
    max_waiting: int = 1024
    prefix_reuse: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in "max_rows", "page_len", "pages", "prefill_chunk", "max_len", "max_waiting":
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")


@dataclass(frozen=True)
class PlacementStats:
    """What was done about where experts live.

    following: whether the traffic is followed; a planner that failed has stopped.
    looks: at the traffic, so far.
    experts_moved: to a device that had them not, of all layers, copies included; so far.
    copies: slots that hold an expert once more, of all layers; now.
    layers_waiting: whose experts have yet to be carried where they are planned.
    planner_seconds: that plans took, in a thread of their own; so far.
    """

    following: bool
    looks: int
    experts_moved: int
    copies: int
    layers_waiting: int
    planner_seconds: float


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine; pages and rows are of all devices together.

    running, waiting: texts with and without a place on a device.
    rows: most texts that run at once.
    pages, pages_held, pages_kept: in all, used by texts, kept for texts that begin alike.
    prompt_tokens: run in prefill steps, those of preempted texts again.
    reused_tokens: that needed not be run, because an earlier text began alike.
    generated_tokens: given to the caller.
    preemptions: times a text had to give back its pages.
    decode_steps, prefill_steps: that were started.
    programs: that have been compiled.
    placement: of the experts; None where all are at home.
    offload: of experts in host memory; None where all are on the devices.
    """

    running: int
    waiting: int
    rows: int
    pages: int
    pages_held: int
    pages_kept: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    preemptions: int
    decode_steps: int
    prefill_steps: int
    programs: int
    placement: PlacementStats | None = None
    offload: OffloadStats | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities where a token was drawn, in nats, as the model gave them.

    logprob: of the token.
    top_ids, top_logprobs: the most probable ids, as many as were asked for, best first.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Event:
    """News of one text.

    id: of the request, from `Engine.add`.
    index: which of the request's n texts.
    tokens: new ids, the one that ended the text left out.
    logprobs: of each of `tokens`, where they were asked for; else empty.
    finish: None while the text goes on; `stop`: an end id came; `length`: `max_tokens` were made
        or the context is full; `cancelled`: `Engine.cancel`.
    stop_id: the id that ended the text, with `stop`.
    """

    id: int
    index: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    stop_id: int | None = None
