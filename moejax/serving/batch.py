"""Batch files: requests in, answers out, a line each, in the format of OpenAI's batches.

The answers come in the order in which they end. A run that was killed goes on where it was: a line
is written at once and whole, or torn, and a torn last line is taken off before the next is written.
"""

from __future__ import annotations

import os
import queue
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import IO, Annotated, Any

import tyro

from moejax.errors import UserError
from moejax.inference.engine import QueueFull
from moejax.progress import NowAndThen
from moejax.serving.answers import Answer
from moejax.serving.batch_file import (
    line_id,
    lines,
    name_of,
    open_input,
    open_output,
    read_line,
    write_all,
)
from moejax.serving.errors import ApiError
from moejax.serving.flags import EngineFlags
from moejax.serving.json_text import to_json
from moejax.serving.loop import EngineLoop, Piece
from moejax.serving.protocol import ENDPOINTS, Job, read_job
from moejax.serving.start import note, running_model
from moejax.serving.text_model import TextModel

__all__ = ["BatchConfig", "Result", "main", "run_batch"]

DESCRIPTION = """Answers a file of requests.

Lines of the input: {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions" or
"/v1/completions", "body": {...}}. Started again with the same files it goes on where it was."""


@dataclass(frozen=True)
class BatchConfig(EngineFlags):
    """A batch.

    Attributes:
        input: file of requests, a JSON object each line.
        output: file that answers are appended to, as they are finished.
        name: of the model, as the requests name it; the folder's if not given.
    """

    input: Annotated[str, tyro.conf.arg(aliases=["-i"], metavar="FILE")] = ""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = ""
    name: str = ""


@dataclass(frozen=True)
class Result:
    """Of a batch: lines answered and refused now, and found in the output; tokens made.

    failed_before: of the lines found in the output, how many were refused.
    """

    answered: int
    failed: int
    skipped: int
    tokens: int
    seconds: float
    failed_before: int = 0

    def __str__(self) -> str:
        speed = self.tokens / max(self.seconds, 1e-9)
        before = f" ({self.failed_before} failed)" if self.failed_before else ""
        return (
            f"[{self.answered} answered, {self.failed} failed, {self.skipped} were there{before}; "
            f"{self.tokens} tokens in {self.seconds:.1f} s, {speed:.1f} tokens/s]"
        )


def main(config: BatchConfig) -> int:
    """The mode `batch` of `infer.py`: 0 if no line failed, now or in an earlier run, else 1.

    Raises:
        UserError: whatever a user can mend.
    """
    for name in ("input", "output"):
        if not getattr(config, name):
            raise UserError(f"--{name}: missing; name a file")
    if os.path.realpath(config.input) == os.path.realpath(config.output):
        raise UserError(f"--output {config.output}: is the input; name another file")
    # Files first: a wrong name should be told before a model is loaded.
    with (
        open_input(config.input) as source,
        open_output(config.output) as (out, done),
        running_model(config, name=config.name) as (model, loop),
    ):
        result = run_batch(source, out, done, model, loop, 2 * config.max_rows)
    note(str(result))
    return 1 if result.failed or result.failed_before else 0


def run_batch(
    source: IO[bytes],
    out: IO[bytes],
    done: Mapping[str, bool],
    model: TextModel,
    loop: EngineLoop,
    together: int,
) -> Result:
    """Answers the lines of a file.

    Args:
        source: the requests.
        out: gets a line for each, whole, as soon as it is answered.
        done: names of lines that the output holds, see `name_of`, and whether they failed.
        model: what answers.
        loop: runs the engine.
        together: requests under way at once.
    """
    return _Batch(out, done, model, loop, together).run(source)


@dataclass
class _Line:
    number: int
    custom_id: str | None
    answer: Answer


class _Batch:
    def __init__(
        self,
        out: IO[bytes],
        done: Mapping[str, bool],
        model: TextModel,
        loop: EngineLoop,
        together: int,
    ):
        self._out, self._done, self._model, self._loop = out, done, model, loop
        # The loop's thread leaves pieces here.
        self._pieces: queue.Queue[tuple[_Line, Piece]] = queue.Queue()
        self._together = min(together, loop.engine.settings.max_waiting)
        self._longest = loop.engine.max_len
        self._under_way = 0
        self._result = Result(0, 0, 0, 0, 0.0)

    def run(self, source: IO[bytes]) -> Result:
        start, tell = time.monotonic(), NowAndThen(note)
        seen: set[str] = set()
        for number, data in enumerate(lines(source), 1):
            if not data.strip():
                continue
            while self._under_way >= self._together:
                self._take()
            self._begin(number, data, seen)
            tell(f"{self._result.answered} answered, at line {number}")
        while self._under_way:
            self._take()
        return replace(self._result, seconds=time.monotonic() - start)

    def _begin(self, number: int, data: bytes, seen: set[str]) -> None:
        custom_id = None
        try:
            request = read_line(data)
            name = request["custom_id"]
            if name in seen:
                raise ApiError(400, f"custom_id {name!r:.80}: an earlier line has it, too")
            seen.add(name)
            custom_id = name
            if self._skip(name_of(number, custom_id)):
                return
            job = read_job(ENDPOINTS[request["url"]], request["body"], self._model, self._longest)
            if job.stream:
                raise ApiError(400, "stream=True: a file has no streams; leave it out")
            self._submit(_Line(number, custom_id, Answer(job, self._model)), job)
        except ApiError as error:
            if error.status >= 500:
                raise UserError(error.message) from None
            if self._skip(name_of(number, custom_id)):
                return
            self._write_error(number, custom_id, error)
        else:
            self._under_way += 1

    def _skip(self, name: str) -> bool:
        """Whether a line is in the output already; counts it then."""
        if name not in self._done:
            return False
        self._count(skipped=1, failed_before=int(self._done[name]))
        return True

    def _submit(self, line: _Line, job: Job) -> None:
        while True:
            try:
                self._loop.submit(job.prompts, job.params, lambda p: self._pieces.put((line, p)))
                return
            except QueueFull:
                # A line of many prompts may have to wait for others to begin, or to be cancelled.
                if self._under_way:
                    self._take()
                else:
                    time.sleep(0.01)
            except UserError as error:
                raise ApiError.of(error) from None

    def _take(self) -> None:
        line, piece = self._pieces.get()
        try:
            line.answer.take(piece)
        except ApiError as error:  # not this line's fault: it is left for the next run
            raise UserError(f"{error.message}; start again to go on") from None
        if not line.answer.done:
            return
        self._under_way -= 1
        response = {
            "status_code": 200,
            "request_id": line.answer.id,
            "body": line.answer.body(),
        }
        self._count(answered=1, tokens=line.answer.generated)
        self._write(line.number, line.custom_id, response, None)

    def _write_error(self, number: int, custom_id: str | None, error: ApiError) -> None:
        self._count(failed=1)
        if custom_id is None:
            # Without a name of its own there is no response, only an error.
            told = {"code": error.code or "invalid_line", "message": f"line {number}: {error}"}
            self._write(number, None, None, told)
            return
        request_id = f"req-{uuid.uuid4().hex}"
        response = {"status_code": error.status, "request_id": request_id, "body": error.body}
        self._write(number, custom_id, response, None)

    def _write(self, number: int, custom_id: str | None, response: Any, error: Any) -> None:
        line = {
            "id": line_id(number),
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        # The file is unbuffered: what is written survives a kill.
        write_all(self._out, to_json(line) + b"\n")

    def _count(self, **more: int) -> None:
        counts = {name: getattr(self._result, name) + n for name, n in more.items()}
        self._result = replace(self._result, **counts)
