"""Rendering a chat template in a process of its own, with limits on time, memory and text."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.errors import UserError

__all__ = ["TemplateProcess"]

_WORKER = Path(__file__).with_name("template_worker.py")
_MEMORY_BYTES = 1 << 30
_MAX_TEMPLATE_CHARS = 1 << 20
_MAX_CHARS = 1 << 24
_MAX_LINE_BYTES = 1 << 28  # three texts of the longest messages, escaped
_START_S = 60.0  # a busy machine may take long to start Python


class TemplateProcess:
    """A compiled template; may be used from several threads.

    source: what messages name, a path for instance.
    seconds: most time for compiling it, and for the texts of one call.

    Raises:
        UserError: jinja2 is missing, or the template is too large or does not compile.
    """

    def __init__(self, template: str, source: str, seconds: float = 5.0):
        if importlib.util.find_spec("jinja2") is None:
            raise UserError(
                f"{source}: chat templates need jinja2: pip install 'moejax[serve]' or give a "
                "prompt as text"
            )
        if len(template) > _MAX_TEMPLATE_CHARS:
            raise UserError(
                f"{source}: a chat template of {len(template)} characters: at most "
                f"{_MAX_TEMPLATE_CHARS}; give a smaller one"
            )
        self._template = template
        self._source = source
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        with self._lock:
            self._start()

    def render(self, conversations: Sequence[dict[str, Any]]) -> list[str | UserError]:
        """Renders the template with each set of variables, at the same time of day.

        Returns:
            for each a text, or the error that the template ended with.

        Raises:
            UserError: it took too long or too much memory.
        """
        with self._lock:
            worker = self._worker or self._start()
            try:
                answers = worker.ask({"conversations": list(conversations)}, self._seconds)
            except BaseException:
                self._worker = None
                worker.end()
                raise
        return [a["text"] if "text" in a else self._failed(a) for a in answers]

    def close(self) -> None:
        """Ends the process; the next text starts another."""
        with self._lock:
            if self._worker is not None:
                self._worker.end()
            self._worker = None

    def _start(self) -> _Worker:
        worker = _Worker(self._source)
        start = {
            "template": self._template,
            "memory_bytes": _MEMORY_BYTES,
            "max_chars": _MAX_CHARS,
        }
        try:
            worker.ask(start, _START_S)
            answer = worker.next(self._seconds)
            if answer:
                raise self._failed(answer)
        except BaseException:
            worker.end()
            raise
        self._worker = worker
        return worker

    def _failed(self, answer: dict[str, str]) -> UserError:
        said = " ".join(answer.get("refused", answer.get("error", "")).split())[:300]
        if "refused" in answer:
            return UserError(f"{self._source}: the chat template refuses: {said}")
        return UserError(
            f"{self._source}: the chat template fails ({said}); mend it or give a prompt as text"
        )


class _Worker:
    """One process, asked by one thread at a time."""

    def __init__(self, source: str):
        self._source = source
        # -P: files beside the worker are no modules. A session of its own: Ctrl-C is not for it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(
            target=_read_lines, args=(self._process.stdout, self._answers), daemon=True
        ).start()
        self._finalizer = weakref.finalize(self, _end, self._process)

    def ask(self, question: dict[str, Any], seconds: float) -> Any:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a process that is gone has no next answer
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        return self.next(seconds)

    def next(self, seconds: float) -> Any:
        """The next answer, which must come within so many seconds."""
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise UserError(
                f"{self._source}: the chat template took longer than {seconds:g} s; give another "
                "one or a shorter conversation"
            ) from None
        if not line:
            raise UserError(
                f"{self._source}: the process of the chat template ended, as one does that needs "
                "too much memory; give another template or a shorter conversation"
            )
        return json.loads(line)

    def end(self) -> None:
        self._finalizer()


def _read_lines(stream: Any, answers: queue.Queue[bytes]) -> None:
    with stream:
        # A line that is longer ends the process, as its output is closed.
        while (line := stream.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
            answers.put(line)
    answers.put(b"")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # what was still to be written cannot be
        process.stdin.close()
