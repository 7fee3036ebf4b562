"""The process that renders chat templates: started by path, it needs only jinja2.

A template comes with a model, so it may be hostile. The sandbox of jinja2 keeps it from Python's
internals, but not from looping or building huge strings; the limits of a process of its own do.

One JSON object a line. The first line is the template and the limits; it is answered at once, and
again when the template is compiled. Each further line holds `conversations`, variables for the
template, and is answered by the text or the error of each.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

_NEEDS = (3, 1, 6)  # older ones let templates out of the sandbox
_ERROR_CHARS = 1000


class _Refused(Exception):
    """What the template says against the messages, by `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}` marks what a model wrote; only training asks for that."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """Ends at once where the sandbox alone would show nothing for what it keeps hidden."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"reads {attribute!r} of a {type(obj).__name__}")


def _limit_memory(limit_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML would read; chat templates expect plain JSON."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: Any) -> None:
    raise _Refused(str(message))


def _compile(text: str) -> Any:
    """A template in the environment that chat templates are written for.

    Source: huggingface.co/docs/transformers/chat_templating_writing.
    """
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < _NEEDS:
        raise RuntimeError(
            f"jinja2 {jinja2.__version__} is too old: pip install -U 'jinja2>=3.1.6'"
        )

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(text)


def _render(template: Any, variables: dict[str, Any], now: datetime, max_chars: int) -> str:
    pieces, size = [], 0
    # The same time in all texts of a request.
    for piece in template.generate(strftime_now=now.strftime, **variables):
        size += len(piece)
        if size > max_chars:
            raise _Refused(f"its text is longer than {max_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def _answer(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _error(error: Exception) -> dict[str, str]:
    # The template may have written the text.
    said = str(error)[:_ERROR_CHARS]
    if isinstance(error, _Refused):
        return {"refused": said}
    return {"error": f"{type(error).__name__}: {said}"}


def _main() -> None:
    start = json.loads(sys.stdin.readline())
    _limit_memory(start["memory_bytes"])
    _answer({})
    try:
        template = _compile(start["template"])
    except Exception as error:
        _answer(_error(error))
        return
    _answer({})
    for line in sys.stdin:
        now = datetime.now()
        answers = []
        for variables in json.loads(line)["conversations"]:
            try:
                answers.append({"text": _render(template, variables, now, start["max_chars"])})
            except Exception as error:
                answers.append(_error(error))
        _answer(answers)


if __name__ == "__main__":
    _main()
