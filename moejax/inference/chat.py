"""Chats to token ids, by the chat template of a model's folder.

A template is a program that writes the text of a chat, special tokens included; the text of a
message must not be able to write any. So each special token in the finished text is traced to
where its characters came from. The template is rendered twice: with the messages as they are, and
with every character of theirs that some special token has swapped for a private one. Where the
second text, swapped back, is the first, it tells for each place whether a message wrote a part of
it: such a place is encoded as plain text. A template that reads its messages may write something
else the second time (it may look for `</think>`, say). Then only the special tokens that a message
spells outright are swapped, and the special tokens of both texts must be the same; else the chat
is refused. Added tokens that the tokenizer does not call special may be spelled by anybody.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.data.special_tokens import Written
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.folder_files import file_in, read_json, read_small
from moejax.inference.messages import ROLES, Message, read_messages, read_variables
from moejax.inference.template_process import TemplateProcess

__all__ = ["ChatTemplate"]

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
_MAX_CONTENT = 1 << 23


class ChatTemplate:
    """Writes chats the way a model was trained on them.

    Without a template in the folder a chat is written plainly, a line `role: content` for each
    message and `assistant:` at the end. There nothing keeps a message from looking like several.

    stop: strings that end an answer beside the model's own ids: those that begin another message
        where the chat is written plainly, else none.
    """

    stop: tuple[str, ...]

    def __init__(
        self,
        folder: Path | None,
        tokenizer: Tokenizer,
        *,
        bos_id: int | None = None,
        seconds: float = 5.0,
    ):
        """Reads and compiles the template.

        Args:
            folder: of the model: `chat_template.jinja`, or `chat_template` in
                `tokenizer_config.json`; None: no template.
            tokenizer: of the model.
            bos_id: stands before a plainly written chat; a template writes its own.
            seconds: most time for rendering a chat.

        Raises:
            UserError: a file is damaged or leads out of the folder, jinja2 is missing, or the
                template does not compile.
        """
        self._tokenizer = tokenizer
        self._bos_id = bos_id
        self._process: TemplateProcess | None = None
        self._names: dict[str, str] = {}
        text = None
        if folder is not None:
            config = read_json(file_in(folder, "tokenizer_config.json"), optional=True)
            text, source = _find_template(folder, config)
            named = read_json(file_in(folder, "special_tokens_map.json"), optional=True)
            self._names = _token_names({**named, **config})
        if text is not None:
            self._process = TemplateProcess(text, source, seconds)
        self.stop = () if text is not None else tuple(f"\n{role}:" for role in ROLES)

    def close(self) -> None:
        """Ends the process that renders; it is started again when needed."""
        if self._process is not None:
            self._process.close()

    def render(
        self,
        messages: Any,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat, for people: what in it is a special token it does not tell.

        Raises:
            UserError: see `encode_chat`.
        """
        read = read_messages(messages, _MAX_CONTENT)
        if self._process is None:
            return _plain(read, add_generation_prompt)
        shared = self._shared(add_generation_prompt, variables)
        return _text(self._process.render([{**shared, "messages": read}])[0])

    def encode_chat(
        self,
        messages: Any,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """The token ids of a chat, with all special tokens that the model wants.

        Args:
            messages: a list of {"role": "system" | "developer" | "user" | "assistant",
                "content": text}; a content may also be a list of {"type": "text", "text": text},
                which is joined by line ends.
            add_generation_prompt: ends with the beginning of an answer.
            variables: for the template, such as `enable_thinking`: names and plain values.

        Returns:
            int32 [n].

        Raises:
            UserError: the messages are not as said, the template refuses them, fails or takes too
                long, or a message spells special tokens and the template reads them.
        """
        read = read_messages(messages, _MAX_CONTENT)
        if self._process is None:
            ids = self._tokenizer.encode(_plain(read, add_generation_prompt))
            return ids if self._bos_id is None else np.insert(ids, 0, np.int32(self._bos_id))
        shared = self._shared(add_generation_prompt, variables)
        return self._tokenizer.special.encode(*self._traced(shared, read))

    def _shared(self, prompt: bool, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            **self._names,
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
            **read_variables(variables, taken=(*_TOKEN_NAMES, "messages", "tools", "documents")),
        }

    def _traced(self, shared: dict[str, Any], messages: list[Message]) -> tuple[str, Written]:
        """The text of a chat, and which of its special tokens the template wrote."""
        assert self._process is not None
        special = self._tokenizer.special
        swap = _Swap(special.ids, messages)
        spelled = swap.spelled(messages)
        sent = [messages, swap.all(messages), *([] if spelled == messages else [spelled])]
        answers = self._process.render([{**shared, "messages": m} for m in sent])
        text, swapped, partly = _text(answers[0]), answers[1], answers[-1]
        if isinstance(swapped, str) and swap.back(swapped) == text:
            return text, swap.written(swapped)
        if spelled == messages:
            partly = text
        if isinstance(swapped, str) and isinstance(partly, str) and swap.back(partly) == text:
            # Joining or changing texts may have made a special token that none spells.
            written = swap.written(partly)
            if special.find(text, written) == special.find(swapped):
                return text, written
        raise UserError(
            "messages: one of them spells a special token, and the chat template reads it; take "
            "it out of the message"
        )


class _Swap:
    """Swaps the characters of special tokens for private ones that no message has."""

    def __init__(self, names: Iterable[str], messages: list[Message]):
        self._names = tuple(names)
        # Spaces are left alone, as templates strip them.
        characters = sorted({c for name in self._names for c in name if not c.isspace()})
        used = {c for message in messages for v in message.values() for c in _PRIVATE.findall(v)}
        first, last = map(ord, "\U000f0000\U0010fffd")
        free = [c for c in map(chr, range(first, last + 1)) if c not in used]
        if len(free) < len(characters):
            raise UserError("messages: they use up all private characters; take some out")
        self._to = dict(zip(characters, free))
        self._table = str.maketrans(self._to)
        self._back = str.maketrans({private: c for c, private in self._to.items()})
        self._private = frozenset(self._to.values())

    def back(self, text: str) -> str:
        return text.translate(self._back)

    def written(self, swapped: str) -> Written:
        """Whether a place of a text has no character that was swapped."""
        return lambda start, end: self._private.isdisjoint(swapped[start:end])

    def all(self, messages: list[Message]) -> list[Message]:
        return [_changed(message, lambda text: text.translate(self._table)) for message in messages]

    def spelled(self, messages: list[Message]) -> list[Message]:
        """Only in special tokens that a message spells."""
        return [_changed(message, self._spelled) for message in messages]

    def _spelled(self, text: str) -> str:
        inside = np.zeros(len(text), bool)
        for name in self._names:
            start = text.find(name)
            while start >= 0:
                inside[start : start + len(name)] = True
                start = text.find(name, start + 1)
        if not inside.any():
            return text
        return "".join(self._to.get(c, c) if i else c for c, i in zip(text, inside))


def _changed(message: Message, change: Callable[[str], str]) -> Message:
    return {key: text if key == "role" else change(text) for key, text in message.items()}


def _text(answer: str | UserError) -> str:
    if isinstance(answer, UserError):
        raise answer
    return answer


def _plain(messages: list[Message], add_generation_prompt: bool) -> str:
    lines = "".join(f"{m['role']}: {m['content'].strip()}\n" for m in messages)
    return lines + "assistant:" if add_generation_prompt else lines


def _find_template(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The text of the template and where it stands."""
    path = file_in(folder, "chat_template.jinja")
    try:
        return read_small(path).decode(), str(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8; restore it") from None
    source = f"{folder / 'tokenizer_config.json'}: chat_template"
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        if "default" not in named:
            raise UserError(f"{source}: names {sorted(map(str, named))}, none 'default'; add one")
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise UserError(f"{source}: must be a text or a list of named ones; correct it")
    return found, source


def _token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """What a template calls `bos_token` and the like: strings, or objects with `content`."""
    names = {}
    for name in _TOKEN_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[name] = value
    return names
