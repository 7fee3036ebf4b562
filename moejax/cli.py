"""What both scripts share: flags from dataclasses, and errors that end in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from moejax.errors import UserError
from moejax.training.files import is_disk_full

__all__ = ["parse", "run_main"]

Config = TypeVar("Config")

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def run_main(main: Callable[[], int | None]) -> int:
    """Runs a script's main function; what a user can cause ends in one line, without a traceback.

    Args:
        main: returns the exit code, None for 0. SystemExit and real bugs pass through.

    Returns:
        The exit code: main's; 2 after a UserError or a full disk; 130 after Ctrl-C; 141 when the
        reader of the output has gone (`infer.py | head`).
    """
    # A terminal that knows fewer characters than the text must not end the program.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return main() or 0
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that must not fail as well.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if not is_disk_full(error):
            raise
        _say(f"error: the disk is full ({error}): free some space and start again")
        return 2


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        print(" ".join(message.split()), file=sys.stderr, flush=True)


def parse(
    default: Config,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> Config:
    """Reads flags such as `--model.num-layers 6` over a configuration.

    A field whose class has a static method `parse(text)` and a `__str__` that it reads back
    (`MeshShape`) is one flag; any other dataclass is a group of flags.

    Args:
        default: a frozen dataclass; its values are the flags' defaults.
        argv: the arguments; None takes those of the process.
        prog: the program's name in the help; None takes the script's.
        description: the help's first paragraph; None takes the docstring of the class.

    Returns:
        A configuration of the same class.

    Raises:
        UserError: a flag is unknown or a value does not fit, or the configuration refuses it.
        SystemExit: `--help` was asked for and printed.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or os.path.basename(sys.argv[0])
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config, unknown = tyro.cli(
                type(default),
                default=default,
                args=argv,
                prog=prog,
                description=description,
                return_unknown_args=True,
                registry=_registry(),
                # A part that may be missing has flags if the default has the part.
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(f"{_flatten(captured.getvalue())}; see {prog} --help") from None
    if unknown:
        raise UserError(_unknown_message(unknown, default, prog))
    return config


def _registry() -> Any:
    from tyro import constructors

    registry = constructors.ConstructorRegistry()

    @registry.primitive_rule
    def one_flag(info: Any) -> Any:
        if not _is_one_flag(info.type):
            return None
        return constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=info.type.__name__.upper(),
            instance_from_str=lambda words: info.type.parse(words[0]),
            is_instance=lambda value: isinstance(value, info.type),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _is_one_flag(cls: Any) -> bool:
    return dataclasses.is_dataclass(cls) and callable(getattr(cls, "parse", None))


def _flatten(box: str) -> str:
    """What a framed error message says, in one line: its first part and the flag's usage."""
    rows = [_ANSI.sub("", line).strip().strip("│|").strip() for line in box.splitlines()]
    framed = any(row.startswith("╭") for row in rows)
    rows = [row for row in rows if row and row[0] not in "╭╰┌└+"]
    if not framed:
        # Where stdout cannot hold box characters the title stands above the first rule.
        rules = [i for i, row in enumerate(rows) if set(row) <= set("─-")]
        rows = rows[rules[0] + 1 :] if rules else rows
    parts: list[list[str]] = [[]]
    for row in rows:
        if set(row) <= set("─-"):
            parts.append([])
        else:
            parts[-1].append(row)
    message = " ".join(parts[0]).removeprefix("Error parsing ").rstrip(". ")
    usage = next((part[1] for part in parts if len(part) > 1 and "helptext:" in part[0]), "")
    return f"{message}: write {usage}" if usage else message or "the arguments cannot be read"


def _unknown_message(unknown: Sequence[str], default: Any, prog: str) -> str:
    word = next((w for w in unknown if w.startswith("-")), unknown[0])
    if not word.startswith("-"):
        return f"{word!r}: an argument that belongs to no flag; see {prog} --help"
    flag = word.split("=")[0]
    wanted = flag.replace("_", "-")
    known = list(_flags(default))
    # `--num-layers` for `--model.num-layers` first, then what is spelled alike.
    close = [k for k in known if k.rpartition(".")[2] == wanted.lstrip("-")]
    close = close or difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
    hint = f"; the closest is {close[0]}" if close else ""
    return f"{flag}: no such flag{hint}; see {prog} --help"


def _flags(config: Any, prefix: str = "") -> Iterator[str]:
    """The flags of a configuration, `--no-…` forms included."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value) and not _is_one_flag(type(value)):
            yield from _flags(value, f"{prefix}{name}.")
            continue
        yield f"--{prefix}{name}"
        if hints[field.name] is bool:
            yield f"--{prefix}no-{name}"
