"""The messages of a chat, checked: what the OpenAI API allows, as far as it is text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.errors import UserError

__all__ = ["ROLES", "Message", "read_messages", "read_variables"]

ROLES = ("system", "developer", "user", "assistant")

Message = dict[str, str]
"""`role`, `content` and perhaps `name`."""

_MAX_MESSAGES = 4096


def read_messages(messages: Any, max_chars: int) -> list[Message]:
    """Checks messages and makes each content one text; its parts are joined by line ends.

    A key whose value is None says nothing and is passed over.

    Args:
        messages: what should be a list of messages.
        max_chars: most characters of all together.

    Raises:
        UserError: names the place of what is wrong.
    """
    if not isinstance(messages, (list, tuple)) or not 0 < len(messages) <= _MAX_MESSAGES:
        raise UserError(f"messages: must be a list of 1 to {_MAX_MESSAGES} messages")
    read = [_read_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    size = sum(len(message["content"]) for message in read)
    if size > max_chars:
        raise UserError(f"messages: {size} characters; give at most {max_chars}")
    return read


def _read_message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: must be an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    unknown = sorted(map(str, given.keys() - {"role", "content", "name"}))
    if unknown:
        raise UserError(
            f"{where}.{unknown[0]:.40}: not supported; a message has role, content and name"
        )
    role = given.get("role")
    if role not in ROLES:
        raise UserError(f"{where}.role={role!r:.40}: must be one of {', '.join(ROLES)}")
    out = {"role": role, "content": _read_content(f"{where}.content", given.get("content"))}
    if "name" in given:
        name = given["name"]
        if not isinstance(name, str) or not 0 < len(name) <= 64:
            raise UserError(f"{where}.name={name!r:.80}: must be a string of 1 to 64 characters")
        out["name"] = _unicode(f"{where}.name", name)
    return out


def _read_content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return _unicode(where, content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UserError(f"{where}: must be a string or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise UserError(
                f"{where}[{i}].type={kind!r:.40}: must be 'text'; this model reads text alone"
            )
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where}[{i}].text: must be a string")
        texts.append(_unicode(f"{where}[{i}].text", part["text"]))
    return "\n".join(texts)


def _unicode(where: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} is half a surrogate pair; give text in UTF-8"
        ) from None
    return text


def read_variables(variables: Mapping[str, Any] | None, taken: Sequence[str]) -> dict[str, Any]:
    """Checks the variables that a request gives to a chat template.

    Texts are short words, so that none can spell a special token of its own making.

    Args:
        variables: names and values; None: none.
        taken: names that are not free.

    Raises:
        UserError: a name or a value is refused.
    """
    if not isinstance(variables or {}, Mapping):
        raise UserError("chat_template_kwargs: must be an object of names and values")
    out = {}
    for name, value in (variables or {}).items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
            raise UserError(f"chat_template_kwargs: {name!r:.80} is no name of a variable")
        if name in (*taken, "strftime_now", "add_generation_prompt"):
            raise UserError(f"chat_template_kwargs.{name}: set by the program; leave it out")
        word = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", value)
        if not word and type(value) not in (bool, int, float, type(None)):
            raise UserError(
                f"chat_template_kwargs.{name}: must be true, false, a number, null or a word of "
                "letters, digits, _, - and ."
            )
        out[name] = value
    return out
