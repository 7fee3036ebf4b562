"""Flags that several modes of `infer.py` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.inference.engine import EngineSettings

__all__ = ["EngineFlags", "ModelFlags"]


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and where it runs.

    Attributes:
        model: run directory, model folder or folder of transformers; the packaged model if not
            given.
        mesh: such as data=2,expert=4,tensor=1; `auto` lays the experts over all devices.
        devices: number of fake devices on a CPU; 0: as many as the mesh needs.
        dtype: of the computation; `auto` is float32 on a CPU and the model's own elsewhere.
        expert_weights: keep the experts' weights in 8 bits, about half the memory of bfloat16;
            changes the text a little.
    """

    model: str = ""
    mesh: str = "auto"
    devices: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    expert_weights: Literal["none", "int8", "fp8"] = "none"

    def __post_init__(self) -> None:
        if self.devices < 0:
            raise UserError(f"--devices {self.devices}: must be 0 (as needed) or more")


@dataclass(frozen=True)
class EngineFlags(ModelFlags):
    """How much is continued at once.

    Attributes:
        max_rows: most texts continued at once, of all devices together.
        max_len: most tokens of a text, prompt included; 0: the model's context.
        pages: pages of the key-value cache on each device; 0: as many as are needed or fit.
        page_len: tokens of a page.
        prefill_chunk: most tokens of prompts that a device runs between two steps of decoding.
        max_waiting: most requests that wait; more are refused.
        deterministic: a text's bits do not depend on the other texts (slower).
        decode_exchange: how experts' rows travel between devices when single tokens are decoded;
            `auto` measures, `config` is what the model's configuration says.
    """

    max_rows: int = 32
    max_len: int = 0
    pages: int = 0
    page_len: int = 64
    prefill_chunk: int = 512
    max_waiting: int = 1024
    deterministic: bool = False
    decode_exchange: Literal["auto", "config", "ring", "all_to_all", "remote"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_len", "pages"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 (as needed) "
                    "or more"
                )
        hold = self.pages * self.page_len
        if 0 < hold < self.max_len:
            raise UserError(
                f"--pages {self.pages} --page-len {self.page_len}: hold {hold} tokens, fewer than "
                f"--max-len {self.max_len}; give more pages or a smaller length"
            )

    def engine_settings(self) -> EngineSettings:
        """The settings of the engine.

        Raises:
            UserError: one is out of range.
        """
        from moejax.inference.engine import EngineSettings

        return EngineSettings(
            max_rows=self.max_rows,
            page_len=self.page_len,
            pages=self.pages or None,
            prefill_chunk=self.prefill_chunk,
            max_len=self.max_len or None,
            max_waiting=self.max_waiting,
            deterministic=self.deterministic,
        )
