"""Fits the predictors that say which experts a model will choose, and measures all of them.

python -m moejax.offload MODEL FITS.npz        a run, a model folder, or a folder of transformers
python -m moejax.offload packaged FITS.npz     the model of the package
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from moejax.cli import parse, run_main
from moejax.offload.fit_config import FitConfig

__all__ = ["main"]

_DESCRIPTION = "Fits predictors of a model's choice of experts and measures them on other text."


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    required: Any = tyro.MISSING
    start = FitConfig(required, required)

    def run() -> None:
        from moejax.offload.command import fit_model

        config = parse(start, argv, "python -m moejax.offload", _DESCRIPTION)
        fit_model(config, lambda line: print(line, flush=True))

    return run_main(run)


if __name__ == "__main__":
    sys.exit(main())
