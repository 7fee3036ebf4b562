"""What `python -m moejax.offload` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from moejax.errors import UserError
from moejax.training.config import DataConfig

__all__ = ["FitConfig"]


@dataclass(frozen=True)
class FitConfig:
    """Fits predictors of a model's choices, and measures them on other text.

    Attributes:
        model: run directory, model folder, or folder of transformers; `packaged`: the model of the
            package.
        out: the .npz file to write, for the flags of offloading; one that is there is replaced.
        data: text to fit on, its held-out part to measure on; seq_len: tokens of a window.
        tokens: to fit on.
        windows: to measure on, of each held-out document at most.
        prompt: tokens at the beginning of each of these that count as its prompt.
        ridge: how strongly fits are held back, greater than 0; more for less text.
        seed: of the choice of text to fit on.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    data: DataConfig = field(default_factory=DataConfig)
    tokens: int = 65536
    windows: int = 2
    prompt: int = 64
    ridge: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.windows < 1:
            raise UserError(
                f"--tokens {self.tokens} --windows {self.windows}: both must be at least 1"
            )
        if not 0 <= self.prompt <= self.data.seq_len - 2:
            raise UserError(
                f"--prompt {self.prompt}: windows have {self.data.seq_len} tokens, of which at "
                "least 2 must follow the prompt; pass less, or a larger --data.seq-len"
            )
        if not 0 < self.ridge < float("inf"):
            raise UserError(f"--ridge {self.ridge}: must be greater than 0")
