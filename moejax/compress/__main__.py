"""Makes a model with fewer or smaller experts and says what that costs.

python -m moejax.compress MODEL OUT --experts 48                  merges experts of every layer
python -m moejax.compress MODEL OUT --experts 48 --method prune   leaves some out instead
python -m moejax.compress MODEL OUT --method share --sharing.kind up   one up projection for all
python -m moejax.compress MODEL OUT --method group --group.size 2   two side by side as one
python train.py --init-from OUT                                   trains it on
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from moejax.cli import parse, run_main
from moejax.compress.config import CompressConfig

__all__ = ["main"]

_DESCRIPTION = "Makes a model with fewer or smaller experts and says what that costs."


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    required: Any = tyro.MISSING
    start = CompressConfig(required, required)

    def run() -> None:
        from moejax.compress.command import compress_model

        config = parse(start, argv, "python -m moejax.compress", _DESCRIPTION)
        compress_model(config, lambda line: print(line, flush=True))

    return run_main(run)


if __name__ == "__main__":
    sys.exit(main())
