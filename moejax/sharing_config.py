"""Configuration of what the experts of a layer share, and the shapes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moejax.errors import UserError

__all__ = ["Shapes", "Sharing", "SharingConfig"]

Sharing = Literal["none", "up", "in", "basis"]
Shapes = dict[str, tuple[int, ...]]
"""Shapes of parameters by name."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class SharingConfig:
    """What the experts of one layer share. What is not named here each expert has of its own.

    It saves parameters and their moments, not products: every expert's matrices are made from the
    parts before they are multiplied with (`moejax.shared_bank`).

    Attributes:
        kind: `none`; `up`: one up projection for all, of gated activations; `in`: one gate and up
            projection, or one input projection; `basis`: expert e's input projections are
            Σ_m c_em·B_m of M shared matrices of that shape, its output projection likewise of M
            others: low rank along the experts, where each matrix alone keeps its full rank. Basis
            Sharing (arXiv 2410.03765) does so over layers, with vectors for matrices; MoBE (arXiv
            2508.05257) multiplies such a combination with a thin matrix of each expert's own, and
            leaves output projections as they are.
        rank: M of `basis`, None for the others. With M = E every layer of experts can be said.
    """

    kind: Sharing = "none"
    rank: int | None = None

    def __post_init__(self) -> None:
        _require(
            self.rank is None or self.kind == "basis",
            f"rank={self.rank} with sharing kind={self.kind!r}: only 'basis' has one; leave it out",
        )
        _require(
            self.kind != "basis" or (self.rank is not None and self.rank >= 1),
            f"rank={self.rank} with sharing kind='basis': must be at least 1, the number of shared "
            "matrices",
        )

    @property
    def active(self) -> bool:
        """Whether anything is shared."""
        return self.kind != "none"

    def own(self, d_in: int, num_in: int, hidden: int, d_out: int) -> Shapes:
        """Matrices of one expert.

        Args:
            d_in: width of its rows, D.
            num_in: N, input projections.
            hidden: H, or a device's share of it.
            d_out: width of its results, D.
        """
        w_out: Shapes = {"w_out": (hidden, d_out)}
        if self.kind == "basis":
            assert self.rank is not None
            return {"c_in": (self.rank,), "c_out": (self.rank,)}
        if self.kind == "in":
            return w_out
        return {"w_in": (d_in, num_in - (self.kind == "up"), hidden), **w_out}

    def shared(self, d_in: int, num_in: int, hidden: int, d_out: int) -> Shapes:
        """Matrices of a layer's experts together; arguments as for `own`."""
        if self.kind == "basis":
            assert self.rank is not None
            return {
                "w_basis_in": (self.rank, d_in, num_in, hidden),
                "w_basis_out": (self.rank, hidden, d_out),
            }
        if self.kind == "none":
            return {}
        return {"w_shared": (d_in, 1 if self.kind == "up" else num_in, hidden)}
