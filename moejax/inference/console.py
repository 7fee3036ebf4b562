"""What `infer.py` reads and writes: prompts, text as it comes, and figures at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from moejax.errors import UserError
from moejax.inference.text import Completion

__all__ = ["Printer", "interact", "read_prompts"]

Continue = Callable[[Sequence[str]], bool | None]
_GREETING = "Type the beginning of a text. Ctrl-C ends a text, Ctrl-D quits."


def read_prompts(flags: Sequence[str]) -> list[str]:
    """The prompts of the command line; `-` stands for standard input, taken as it is.

    Raises:
        UserError: standard input is not UTF-8, or is asked for twice.
    """
    if list(flags).count("-") > 1:
        raise UserError("-p - given twice: standard input is one prompt; name it once")
    return [_decoded(sys.stdin.buffer.read()) if flag == "-" else flag for flag in flags]


def interact(continue_texts: Continue, greeting: str = _GREETING) -> None:
    """Continues one line after the other, until Ctrl-D or the end of the input.

    On a terminal Ctrl-C ends the text under way and an error is shown; elsewhere both end the loop.

    Args:
        continue_texts: prints the continuation of prompts; True ends the loop.
        greeting: for a person who types.

    Raises:
        UserError: a line is refused, unless a person types.
    """
    typed = sys.stdin.isatty()
    if typed:
        _note(greeting)
    for line in _typed_lines() if typed else map(_decoded, sys.stdin.buffer):
        try:
            if continue_texts([line.rstrip("\r\n")]):
                return
        except KeyboardInterrupt:
            if not typed:
                raise
            print(flush=True)
        except UserError as error:
            if not typed:
                raise
            _note(f"error: {error}")


class Printer:
    """Prints texts as they come: one alone, or several one after the other under headings."""

    def __init__(self, prompts: Sequence[str]):
        """Begins with the first prompt."""
        # A terminal that knows fewer characters must not end the program.
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._prompts = prompts
        self._waiting = [""] * len(prompts)
        self._current = 0
        self._start = time.perf_counter()
        self._first: float | None = None
        self._begin()

    def on_text(self, index: int, text: str) -> None:
        """Shows text of the current prompt, keeps that of later ones."""
        if self._first is None:
            self._first = time.perf_counter()
        if index == self._current:
            print(text, end="", flush=True)
        else:
            self._waiting[index] += text

    def finish(self, completions: Sequence[Completion]) -> None:
        """Shows what was kept, and on stderr how fast it went."""
        end = time.perf_counter()
        while self._current + 1 < len(self._prompts):
            print()
            self._current += 1
            self._begin()
            print(self._waiting[self._current], end="")
        print(flush=True)
        count = sum(completion.num_tokens for completion in completions)
        seconds = end - self._start
        first = (self._first or end) - self._start
        full = sum(completion.reason == "context" for completion in completions)
        _note(
            f"[{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s; first text after "
            f"{first:.2f} s{'; the context is full' if full else ''}]"
        )

    def _begin(self) -> None:
        if len(self._prompts) > 1:
            print(f"=== {self._current + 1} of {len(self._prompts)} ===")
        print(self._prompts[self._current], end="", flush=True)


def _typed_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` editing and history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except UnicodeDecodeError as error:
            _note(f"error: the line is not UTF-8 at byte {error.start}; type UTF-8")


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
            "give text in UTF-8"
        ) from None


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
