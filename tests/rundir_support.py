"""What the tests of run directories share: a configuration, and errors of one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from moejax.config import ModelConfig
from moejax.errors import UserError


@dataclass(frozen=True)
class Adam:
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Sgd:
    rate: float = 1e-1


@dataclass(frozen=True)
class Train:
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: Adam | Sgd = field(default_factory=Adam)
    schedule: Literal["cosine", "wsd"] = "cosine"
    steps: int = 10
    limit: int | float = 3
    data: tuple[str, ...] = ()
    tokenizer: Path | None = None
    resume: bool = True


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)
