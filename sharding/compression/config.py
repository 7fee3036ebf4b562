"""What of the gradients and weights of a run travels in fewer bytes; nothing by default."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from moejax.errors import UserError

__all__ = ["GradCompression", "MethodName"]

MethodName = Literal["none", "bf16", "int8", "int4", "top_k", "low_rank"]

ROTATED = 128
"""Block of a Hadamard rotation."""

READ_BY: dict[str, tuple[MethodName, ...]] = {
    "rounding": ("int8", "int4"),
    "block": ("int8", "int4"),
    "density": ("top_k",),
    "rank": ("low_rank",),
    "warmup_steps": ("top_k", "low_rank"),
}
"""Options that other methods pass over; `rotate` and `hosts` are refused with these at once."""


@dataclass(frozen=True)
class GradCompression:
    """How gradients are summed over devices; see docs/training.md.

    Attributes:
        method: `none`: float32. `bf16`: rounded to bfloat16. `int8`, `int4`: in blocks with a scale
            each. `top_k`: the largest numbers only, of momentum that devices keep; Adam's squares
            are then estimated from whole gradients. `low_rank`: a product of thin matrices. Sums
            are float32 always; routers, norms, embeddings and small parameters stay exact.
        rounding: of int8 and int4. `stochastic`: up or down by chance, right on average.
            `error_feedback`: to the nearest; a device adds next step what it did not send, and
            holds a float32 copy of its gradients for it.
        block: numbers that share a scale; 0: 256 at 8 bits, 32 at 4 bits, 128 if rotated.
        rotate: multiply blocks of 128 with a Hadamard matrix before rounding (int8, int4).
        density: part of the numbers that `top_k` sends.
        rank: of the matrices of `low_rank`.
        warmup_steps: steps at the start in which `top_k` and `low_rank` send everything.
        hosts: hosts that `data` runs over, in equal parts: sums are exact inside a host and
            compressed between hosts (bf16, int8, int4); 0: compressed everywhere.
        weight_gather: `int8`: weights stored in pieces are gathered as int8 in blocks of 256.
    """

    method: MethodName = "none"
    rounding: Literal["stochastic", "error_feedback"] = "stochastic"
    block: int = 0
    rotate: bool = False
    density: float = 0.01
    rank: int = 4
    warmup_steps: int = 0
    hosts: int = 0
    weight_gather: Literal["none", "int8"] = "none"

    def __post_init__(self) -> None:
        if self.block and (self.block < 16 or self.block % 16):
            raise UserError(f"block={self.block}: must be 0 or a multiple of 16")
        if self.rotate and self.block not in (0, ROTATED):
            raise UserError(
                f"block={self.block} with rotate=True: rotated blocks have {ROTATED} numbers; "
                "leave block at 0"
            )
        if self.rotate and self.method not in ("int8", "int4"):
            raise UserError(
                f"rotate=True with method={self.method}: only int8 and int4 are rotated; choose "
                "one of these or leave it off"
            )
        if self.hosts < 0 or self.hosts == 1:
            raise UserError(
                f"hosts={self.hosts}: must be 0, or at least 2 to have something between"
            )
        if self.hosts and self.method not in ("bf16", "int8", "int4"):
            raise UserError(
                f"hosts={self.hosts} with method={self.method}: only bf16, int8 and int4 are "
                "summed in two levels; choose one of these or leave it at 0"
            )
        if not 0 < self.density <= 1:
            raise UserError(f"density={self.density}: must be greater than 0 and at most 1")
        if self.rank < 1:
            raise UserError(f"rank={self.rank}: must be at least 1")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps={self.warmup_steps}: must be 0 or more")

    def check_read(self, start: GradCompression) -> None:
        """Refuses options that are asked for and that the method does not read.

        It is for flags, not for records: a run's own may hold options of the method that it had
        before.

        Args:
            start: what the flags start from. What it holds already was not asked for.

        Raises:
            UserError: there is one.
        """
        for field in fields(self):
            value, methods = getattr(self, field.name), READ_BY.get(field.name, (self.method,))
            if self.method in methods or value in (field.default, getattr(start, field.name)):
                continue
            flag = "--grad-compression." + field.name.replace("_", "-")
            raise UserError(
                f"{flag} {value} with --grad-compression.method {self.method}: only "
                f"{' and '.join(methods)} read{'s' * (len(methods) == 1)} it; choose "
                f"--grad-compression.method {' or '.join(methods)}, or leave {flag} at "
                f"{field.default}"
            )

    @property
    def block_size(self) -> int:
        """Numbers that share a scale, the default filled in."""
        if self.block or self.rotate:
            return self.block or ROTATED
        return 32 if self.method == "int4" else 256
