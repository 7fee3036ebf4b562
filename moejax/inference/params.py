"""What a request may ask of its sampling: the names, meanings and defaults of vLLM."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moejax.errors import UserError

__all__ = ["MAX_LOGPROBS", "SamplingParams"]

MAX_LOGPROBS = 20
_MAX_TEXTS = 1024
_MAX_STOPS = 64
_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued (docs.vllm.ai, `SamplingParams`).

    Penalties change the logits, temperature divides them, then the filters `min_p`, `top_k` and
    `top_p` apply in this order, as in vLLM. `stop` may be given as one string; lists become tuples,
    None an empty one.

    n: number of texts; with temperature 0 they are equal.
    temperature: divides the logits; 0 takes the most probable token, always.
    top_p: only the fewest most probable tokens whose mass, among those that the other filters
        left, is at least p (arXiv 1904.09751).
    top_k: only the k most probable tokens; 0 or -1: all (arXiv 1805.04833).
    min_p: only tokens at least this times as probable as the most probable (arXiv 2407.01082).
    seed: of the random numbers, 64 bits; None or -1: a new one for each request.
    stop: strings that end the text and are not part of it.
    stop_token_ids: ids that end the text beside the model's own.
    ignore_eos: the model's own end ids do not end the text.
    max_tokens: most tokens of the text; None: as many as the context holds.
    min_tokens: no end id and no stop id comes before so many tokens, and no stop string counts.
    logprobs: log-probabilities of each token and of so many most probable ones; None: none.
    presence_penalty: taken off the logit of each token that the text has.
    frequency_penalty: taken off, for each time that the text has the token.
    repetition_penalty: of each token that prompt or text have, a positive logit is divided by it
        and a negative one multiplied (arXiv 1909.05858).

    Raises:
        UserError: a value is out of range or of the wrong type.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self._set("stop", _as_tuple(self.stop))
        self._set("stop_token_ids", _as_tuple(self.stop_token_ids))
        for field in fields(self):
            fine, rule = _RULES[field.name]
            value = getattr(self, field.name)
            if not fine(value):
                raise UserError(f"{field.name}={value!r:.80}: must {rule}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens={self.min_tokens}: must be at most max_tokens={self.max_tokens}; "
                "lower it or raise max_tokens"
            )
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            self._set(name, float(getattr(self, name)))
        self._set("stop_token_ids", tuple(dict.fromkeys(map(int, self.stop_token_ids))))
        if self.top_k == -1:
            self._set("top_k", 0)
        if self.seed == -1:
            self._set("seed", None)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        neutral = (0.0, 0.0, 1.0)
        return tuple(getattr(self, name) for name in _PENALTIES) != neutral


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _integer(low: int, high: int, optional: bool = False) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if value is None:
            return optional
        # A bool is an Integral, too.
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and low <= int(value) <= high

    return check


def _number(fine: Callable[[float], bool]) -> Callable[[Any], bool]:
    """A finite number, not a bool, of which `fine` holds."""

    def check(value: Any) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        try:
            return math.isfinite(value) and fine(float(value))
        except OverflowError:  # an int beyond every float
            return False

    return check


def _all(fine: Callable[[Any], bool], most: int) -> Callable[[Any], bool]:
    return lambda xs: isinstance(xs, tuple) and len(xs) <= most and all(map(fine, xs))


_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_PENALTY = (_number(lambda x: -2 <= x <= 2), "lie between -2 and 2 (0: none)")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (_integer(1, _MAX_TEXTS), f"be a whole number from 1 to {_MAX_TEXTS}"),
    "temperature": (
        _number(lambda x: 0 <= x <= 1e30),
        "be 0 (greedy) or a greater number; most models want at most 2",
    ),
    "top_p": (_number(lambda x: 0 < x <= 1), "be greater than 0 and at most 1 (all tokens)"),
    "top_k": (_integer(-1, 2**31 - 1), "be 0 or -1 (all tokens), or a whole number of tokens"),
    "min_p": (_number(lambda x: 0 <= x <= 1), "lie between 0 (all tokens) and 1"),
    "seed": (
        _integer(-(2**63), 2**64 - 1, optional=True),
        "be a whole number of 64 bits, or None (a new one for each request)",
    ),
    "stop": (
        _all(lambda s: isinstance(s, str) and s != "", _MAX_STOPS),
        f"be a string or at most {_MAX_STOPS} strings, none empty",
    ),
    "stop_token_ids": (
        _all(_integer(0, 2**31 - 1), _MAX_STOPS),
        f"be at most {_MAX_STOPS} token ids",
    ),
    "ignore_eos": (lambda x: type(x) is bool, "be True or False"),
    "max_tokens": (
        _integer(1, _MAX_TOKENS, optional=True),
        "be a whole number from 1 on, or None (as many as fit the context)",
    ),
    "min_tokens": (_integer(0, _MAX_TOKENS), "be a whole number from 0 on"),
    "logprobs": (
        _integer(0, MAX_LOGPROBS, optional=True),
        f"be a whole number from 0 to {MAX_LOGPROBS}, or None (no log-probabilities)",
    ),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": (
        _number(lambda x: 1e-30 <= x <= 1e30),
        "be greater than 0 (1: no penalty)",
    ),
}
