"""`python -m pallas_kernels.tuning`: the command, and how it ends."""

# What takes long to import is imported in main, where Ctrl-C is met.
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["main"]

INTERRUPTED = 130  # as shells report it


def _silence() -> None:
    """Python writes what is left to stdout when it ends; nobody reads it any more."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        SystemExit: with one line on what is asked wrongly, or cannot be done; 130 after Ctrl-C; 1
            when nobody reads what it prints.
    """
    try:
        from pallas_kernels.tuning.command import execute

        execute(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("tuning: interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        _silence()
        sys.exit(1)
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        from pallas_kernels.tuning.search import first_line

        sys.exit(f"tuning: {first_line(error)}")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # at once: Python would wait for what is being compiled
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(INTERRUPTED)
        raise
