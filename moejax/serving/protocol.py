"""What clients may ask: bodies of `/v1/completions` and `/v1/chat/completions`, checked.

Names and meanings are those of OpenAI's API reference, and of vLLM's for what that adds
(`top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos`,
`chat_template_kwargs`). A field is taken, or passed over because it cannot change the text, or
refused: none is lost silently. A field that is null is one that is not there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moejax.errors import UserError
from moejax.inference.params import MAX_LOGPROBS, SamplingParams
from moejax.serving.errors import ApiError
from moejax.serving.text_model import TextModel

__all__ = ["ENDPOINTS", "Job", "Kind", "read_job"]

Kind = Literal["completion", "chat"]
ENDPOINTS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

_MAX_TEXTS = 128

_SAMPLING = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("ignore_eos", "max_tokens", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
_OWN = {
    "completion": ("model", "prompt", "stream", "stream_options", "echo", "logprobs", "best_of"),
    "chat": (
        *("model", "messages", "stream", "stream_options", "logprobs", "top_logprobs"),
        *("max_completion_tokens", "chat_template_kwargs"),
    ),
}
_PASSED_OVER = {
    *("user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention"),
    *("safety_identifier", "parallel_tool_calls", "prediction"),
}
"""Fields that cannot change what the text says."""

# Fields that would change it, and the values that do not ask for anything.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}


@dataclass(frozen=True)
class Job:
    """A request that is fit to be run.

    kind: which endpoint's.
    prompts: token ids of each prompt.
    params: how to continue them; its `logprobs` says whether log-probabilities are wanted.
    stream, include_usage: whether to answer bit by bit, and with a count of tokens at the end.
    echo: texts that go before the continuations, one a prompt; empty if none do.
    """

    kind: Kind
    prompts: tuple[np.ndarray, ...]
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    echo: tuple[str, ...] = ()


def read_job(kind: Kind, body: Any, model: TextModel, max_len: int | None = None) -> Job:
    """Checks a body and turns its texts into token ids.

    Args:
        kind: of the endpoint.
        body: of the request, parsed.
        model: whose texts they are.
        max_len: most tokens of a text; one that cannot fit is refused before the work. None: any.

    Raises:
        ApiError: 404 for another model's name, else 400 with the field that is at fault.
    """
    if not isinstance(body, Mapping):
        raise ApiError(400, "the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        _check_known(kind, name, value)
    _check_model(given, model)
    streams = _flag(given, "stream")
    usage = _stream_options(given, streams)
    params = _sampling(kind, given, model)
    echo: tuple[str, ...] = ()
    try:
        _check_length(given.get("messages" if kind == "chat" else "prompt"), model, max_len)
        if kind == "chat":
            prompts = [_chat_prompt(given, model)]
        else:
            prompts, texts = _prompts(given, model)
            echo = tuple(texts) if _flag(given, "echo") else ()
    except UserError as error:
        raise ApiError.of(error, "messages" if kind == "chat" else "prompt") from None
    if len(prompts) * params.n > _MAX_TEXTS:
        raise ApiError(
            400, f"{len(prompts)} prompts × n={params.n}: at most {_MAX_TEXTS} texts", param="n"
        )
    if echo and params.logprobs is not None:
        raise ApiError(
            400, "echo with logprobs: prompts have no log-probabilities here", param="echo"
        )
    return Job(kind, tuple(prompts), params, streams, usage, echo)


def _check_known(kind: Kind, name: str, value: Any) -> None:
    known = (*_OWN[kind], *_SAMPLING)
    if name in known or name in _PASSED_OVER:
        return
    if name in _UNSUPPORTED:
        if value in _UNSUPPORTED[name]:
            return
        raise ApiError(
            400,
            f"{name}: not supported here, and it would change the text; leave it out",
            param=name,
            code="unsupported_parameter",
        )
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; the closest is {close[0]}" if close else ""
    raise ApiError(
        400, f"{name:.80}: no such field{hint}", param=name[:80], code="unknown_parameter"
    )


def _check_model(given: Mapping[str, Any], model: TextModel) -> None:
    name = _typed(given, "model", lambda x: isinstance(x, str), "be a string", model.name)
    if name != model.name:
        raise ApiError(
            404,
            f"model {name!r:.80}: not served here; {model.name!r} is",
            param="model",
            code="model_not_found",
        )


def _sampling(kind: Kind, given: Mapping[str, Any], model: TextModel) -> SamplingParams:
    values: dict[str, Any] = {name: given[name] for name in _SAMPLING if name in given}
    if kind == "chat":
        most = given.get("max_completion_tokens")
        if most is not None and values.setdefault("max_tokens", most) != most:
            raise _mistake("max_completion_tokens", most, "be max_tokens, if both are given")
        # An answer has the length that it needs, unless someone says otherwise.
        values.setdefault("max_tokens", model.defaults.values.get("max_tokens"))
        wanted = _flag(given, "logprobs")
        if "top_logprobs" in given and not wanted:
            raise _mistake("top_logprobs", given["top_logprobs"], "come with logprobs=true")
        if wanted:
            values["logprobs"] = _count(given, "top_logprobs")
    elif "logprobs" in given:
        values["logprobs"] = _count(given, "logprobs")
    best_of = given.get("best_of")
    if best_of is not None and best_of != values.get("n", 1):
        raise _mistake("best_of", best_of, "equal n: choosing among more texts is not supported")
    try:
        params = model.defaults.params(**values)
        if kind == "chat" and model.chat_stop:
            values["stop"] = (*params.stop, *model.chat_stop)
            params = model.defaults.params(**values)
        return params
    except UserError as error:
        # They begin with `field=value`.
        field = str(error).partition("=")[0]
        if field == "max_tokens" and field not in given:
            field = "max_completion_tokens"
        raise ApiError.of(error, field if field in given else None) from None


def _count(given: Mapping[str, Any], name: str) -> int:
    fine = lambda x: type(x) is int and 0 <= x <= MAX_LOGPROBS  # noqa: E731
    return _typed(given, name, fine, f"be a whole number from 0 to {MAX_LOGPROBS}", 0)


def _stream_options(given: Mapping[str, Any], streams: bool) -> bool:
    options = _typed(given, "stream_options", lambda x: isinstance(x, Mapping), "be an object", {})
    if options and not streams:
        raise _mistake("stream_options", options, "come with stream=true")
    unknown = sorted(options.keys() - {"include_usage", "include_obfuscation"})
    if unknown:
        raise ApiError(
            400, f"stream_options.{unknown[0]:.80}: no such field", param="stream_options"
        )
    return _flag(options, "include_usage", "stream_options.")


def _check_length(value: Any, model: TextModel, max_len: int | None) -> None:
    """Refuses a chat, or a prompt of several, that is too long whatever its tokens are."""
    if max_len is None:
        return
    many = isinstance(value, list) and all(isinstance(one, str) for one in value)
    longest = max(map(_characters, value if many else [value]), default=0)
    if longest > max_len * model.token_characters:
        raise UserError(
            f"{longest} characters: prompt and continuation share a context of {max_len} tokens"
        )


def _characters(value: Any) -> int:
    """Of all texts in a value of JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _chat_prompt(given: Mapping[str, Any], model: TextModel) -> np.ndarray:
    if "messages" not in given:
        raise ApiError(400, "messages: missing; give a list of messages", param="messages")
    return model.encode_chat(given["messages"], given.get("chat_template_kwargs"))


def _prompts(given: Mapping[str, Any], model: TextModel) -> tuple[list[np.ndarray], list[str]]:
    """Ids of each prompt, and its text."""
    value = given.get("prompt")
    told = "be a text, a list of texts, a list of token ids or a list of such lists, none empty"
    many: list[Any] = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not many or len(many) > _MAX_TEXTS:
        raise _mistake("prompt", f"{len(many)} prompts", f"be from 1 to {_MAX_TEXTS} prompts")
    # All of one kind.
    if all(isinstance(one, str) for one in many):
        return [model.encode(one) for one in many], many
    if all(_is_ids(one) for one in many):
        ids = [model.token_ids(one) for one in many]
        return ids, [model.text_of(one) for one in many]
    raise _mistake("prompt", value, told)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


def _flag(given: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    return _typed(given, name, lambda x: type(x) is bool, "be true or false", False, prefix)


def _typed(
    given: Mapping[str, Any],
    name: str,
    fine: Callable[[Any], bool],
    rule: str,
    default: Any,
    prefix: str = "",
) -> Any:
    value = given.get(name, default)
    if value is not default and not fine(value):
        raise _mistake(prefix + name, value, rule)
    return value


def _mistake(name: str, value: Any, rule: str) -> ApiError:
    return ApiError(400, f"{name}={value!r:.80}: must {rule}", param=name)
